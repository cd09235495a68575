"""The independent oracle: Hugging Face transformers, float32, eager, an explicit 4D mask.

It shares no code with the engine side: the mask is the formula of the paper, spelled out again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Rule:
    """The rule as the oracle applies it; ``full_layers`` counts from 0.

    With ``interval`` the tokens at its multiples are the separators, whatever their ids. A token of
    ``line_breaks`` is one behind a token of ``closers``.
    """

    initial_tokens: int
    window: int
    separator_ids: frozenset[int]
    max_separators: int | None = None
    full_layers: frozenset[int] = frozenset()
    interval: int | None = None
    line_breaks: frozenset[int] = frozenset()
    closers: frozenset[int] = frozenset()


def causal_mask(num_tokens: int) -> torch.Tensor:
    """Full attention: [num_tokens, num_tokens] bool."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()


def sepllm_mask(token_ids: Sequence[int], rule: Rule) -> torch.Tensor:
    """The SepLLM rule, row by row: [num_tokens, num_tokens] bool."""
    num_tokens = len(token_ids)
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    separators = [
        j
        for j, t in enumerate(token_ids)
        if t in rule.separator_ids
        or (j > 0 and t in rule.line_breaks and token_ids[j - 1] in rule.closers)
    ]
    if rule.interval is not None:
        separators = list(range(0, num_tokens, rule.interval))
    for i in range(num_tokens):
        mask[i, : min(i + 1, rule.initial_tokens)] = True
        mask[i, max(0, i - rule.window + 1) : i + 1] = True
        far = [j for j in separators if rule.initial_tokens <= j <= i - rule.window]
        if rule.max_separators is not None:
            far = far[len(far) - min(len(far), rule.max_separators) :]
        mask[i, far] = True
    return mask


@lru_cache(maxsize=2)
def load_model(path: Path) -> torch.nn.Module:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def log_probabilities(
    path: Path, token_ids: Sequence[int], rule: Rule | None, first: int = 0
) -> torch.Tensor:
    """What the model thinks after each token from ``first`` on: [num_tokens, vocab_size] float32.

    ``rule`` None is full attention. Sliding-window layers keep their window under any rule.
    """
    model = load_model(path)
    ids = torch.tensor([list(token_ids)])
    full = causal_mask(len(token_ids))
    sparse = full if rule is None else sepllm_mask(token_ids, rule)
    kinds = getattr(model.config, "layer_types", None)
    handles = []
    for index, attention in enumerate(_attention_modules(model)):
        mask = full if rule is None or index in rule.full_layers else sparse
        if kinds is not None and kinds[index] == "sliding_attention":
            mask = full.triu(1 - model.config.sliding_window)
        bias = _bias(mask)
        handles.append(
            attention.register_forward_pre_hook(
                lambda _module, args, kwargs, bias=bias: (args, kwargs | {"attention_mask": bias}),
                with_kwargs=True,
            )
        )
    try:
        logits = model(ids, use_cache=False, logits_to_keep=len(token_ids) - first).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits.float().log_softmax(dim=-1)


def _attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """One per layer, in order; GPT-NeoX has names of its own."""
    if model.config.model_type == "gpt_neox":
        return [layer.attention for layer in model.gpt_neox.layers]
    return [layer.self_attn for layer in model.model.layers]


def _bias(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
