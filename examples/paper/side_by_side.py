"""Our rule beside the authors' SepCache on one text: how far apart their results are.

Run as ``python -m examples.paper.side_by_side MODEL --text FILE``. Hugging Face's model in
float32 with explicit masks; no engine, because vLLM serves the first of the two alone.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.paper.sepcache import SepCache, sepcache_mask
from vllm_sepllm.eval.text import divergences
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.visibility import BoolArray, Policy, visible_mask

POLICY = Policy(4, 124, 64)
SIZES = SepCache(4, 64, 124, 320)


@dataclass(frozen=True, slots=True)
class Line:
    """One algorithm over the scored tokens, which all lines share.

    Attributes:
        name: of the algorithm.
        kept: mean keys that a query reads.
        perplexity: of the scored tokens.
        divergence: mean KL from full attention, nats.
    """

    name: str
    kept: float
    perplexity: float
    divergence: float


def masks(is_separator: BoolArray, prompt_lengths: Sequence[int]) -> dict[str, BoolArray]:
    """Full attention, ours, and SepCache for each place where the prompt might end."""
    num_tokens = len(is_separator)
    found = {"full attention": np.tril(np.ones((num_tokens, num_tokens), dtype=np.bool_))}
    found["SepLLM, every token alike"] = visible_mask(POLICY, is_separator)
    for length in prompt_lengths:
        name = f"SepCache, prompt of {length:,} tokens"
        found[name] = sepcache_mask(SIZES, is_separator, length)
    return found


@torch.inference_mode()
def compare(
    model: Any, token_ids: Sequence[int], found: dict[str, BoolArray], first: int
) -> list[Line]:
    """The lines over queries [first, num_tokens - 1); the first mask is the one to compare with."""
    lines: list[Line] = []
    full = torch.empty(0)
    for name, mask in found.items():
        bias = torch.zeros(mask.shape).masked_fill(~torch.from_numpy(mask), float("-inf"))
        logits = model(torch.tensor([list(token_ids)]), attention_mask=bias[None, None]).logits
        logprobs = logits[0, first:-1].float().log_softmax(dim=-1)
        full = full if lines else logprobs
        targets = torch.tensor(token_ids[first + 1 :])
        nll = -logprobs.gather(1, targets[:, None]).mean()
        kept = float(mask[first:-1].sum(axis=1).mean())
        divergence = float(np.mean(divergences(full, logprobs)))
        lines.append(Line(name, kept, float(nll.exp()), divergence))
    return lines


def markdown(lines: Sequence[Line]) -> str:
    """A table."""
    head = ["| algorithm | mean KV | perplexity | KL to full |", "| --- | ---: | ---: | ---: |"]
    rows = [
        f"| {x.name} | {x.kept:,.0f} | {x.perplexity:.2f} | {x.divergence:.4f} |" for x in lines
    ]
    return "\n".join([*head, *rows])


def main() -> None:
    """Print the table of 1,536 tokens from the middle of a text, the last 512 scored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer(args.text.read_text("utf-8"), add_special_tokens=False)["input_ids"]
    start = max(0, len(ids) // 2 - 768)
    ids = ids[start : start + 1536]
    is_separator = token_separators("extended", tokenizer).mask(ids)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = masks(is_separator, [256, 640, 1024])
    print(markdown(compare(model, ids, found, 1024)))


if __name__ == "__main__":
    main()
