"""The float32 oracle of an installed package: Hugging Face with a dense mask.

The mask is :func:`vllm_sepllm.policy.visibility.visible_mask`, which serving never uses and which
the tests hold against the paper's formula spelled out again. They keep an oracle of their own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_sepllm.policy import layout
from vllm_sepllm.policy.epochs import Epoch, epochs_of
from vllm_sepllm.policy.visibility import BoolArray, IntArray, Policy, visible_mask


@dataclass(frozen=True, slots=True)
class Scores:
    """What the oracle thinks of an answer.

    Attributes:
        own: log-probability of each token of the answer.
        best: that of the token that it would have chosen in its place.
    """

    own: torch.Tensor
    best: torch.Tensor


class Oracle:
    """The model in float32, on the GPU if there is one; TF32 stays off, as torch has it.

    Args:
        folder: of the model.
        separators: token ids.
    """

    def __init__(self, folder: Path, separators: tuple[int, ...]) -> None:
        import transformers

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = model.to(self._device).eval()
        self._separators = separators

    @torch.inference_mode()
    def scores(self, prompt: list[int], answer: list[int], policy: Policy | None) -> Scores:
        """Teacher-forced: each token of the answer behind all before it; None: full attention."""
        import transformers

        token_ids = prompt + answer[:-1]
        is_separator = np.isin(token_ids, self._separators)
        mask = np.tri(len(token_ids), dtype=np.bool_)
        epochs = [Epoch(0, len(token_ids), 0, 0)]
        if policy is not None:
            mask = visible_mask(policy, is_separator)
        if policy is not None and policy.max_position is not None:
            epochs = epochs_of(policy, is_separator)
        cache, positions = transformers.DynamicCache(), np.empty(0, dtype=np.int64)
        logits = []
        for epoch in epochs:
            own = slice(epoch.start, min(epoch.end, len(token_ids)))
            before, positions = positions, positions_in(policy, epoch, is_separator[: own.stop])
            self._turn(cache, positions[: epoch.start] - before)
            visible = torch.from_numpy(mask[own, : own.stop]).to(self._device)
            bias = torch.zeros(visible.shape, device=self._device)
            found = self._model(
                torch.tensor([token_ids[own]], device=self._device),
                # with four dimensions transformers takes it as it is
                attention_mask=bias.masked_fill_(~visible, float("-inf"))[None, None],
                position_ids=torch.from_numpy(positions[own])[None].to(self._device),
                past_key_values=cache,
                logits_to_keep=min(len(answer), own.stop - own.start),
            )
            logits.append(found.logits[0])
        every = torch.cat(logits)[-len(answer) :].float().log_softmax(dim=-1).cpu()
        return Scores(
            every.gather(1, torch.tensor(answer)[:, None]).squeeze(1), every.max(dim=-1).values
        )

    def _turn(self, cache: Any, delta: IntArray) -> None:
        """Give all keys in the cache another position: [num_cached], new one less old one."""
        if not delta.any():
            return
        rotary, turns = self._model.model.rotary_emb, torch.from_numpy(delta)[None].to(self._device)
        for layer in cache.layers:
            cos, sin = (part / rotary.attention_scaling for part in rotary(layer.keys, turns))
            one, other = layer.keys.chunk(2, dim=-1)
            layer.keys = layer.keys * cos + torch.cat([-other, one], dim=-1) * sin


def positions_in(policy: Policy | None, epoch: Epoch, is_separator: BoolArray) -> IntArray:
    """Positions of all tokens for the queries of an epoch: [num_tokens] flags -> [num_tokens].

    Those of tokens that no query of the epoch reads mean nothing.
    """
    text = np.arange(len(is_separator))
    positions = text - epoch.shift
    if policy is None or epoch.start == 0:
        return positions
    initial = text < policy.initial_tokens
    positions[initial] = text[initial]
    spilled = np.flatnonzero(is_separator & ~initial)[: epoch.num_spilled]
    kept = spilled[len(spilled) - layout.num_tail(policy, len(spilled)) :]
    positions[kept] = policy.initial_tokens + np.arange(len(kept))
    return positions
