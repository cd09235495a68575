"""The float32 oracle of an installed package: Hugging Face with a dense mask.

The mask is :func:`vllm_sepllm.policy.visibility.visible_mask`, which serving never uses and which
the tests hold against the paper's formula spelled out again. They keep an oracle of their own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_sepllm.policy.visibility import BoolArray, Policy, visible_mask


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
        policy: the rule.
        separators: token ids.
    """

    def __init__(self, folder: Path, policy: Policy, separators: tuple[int, ...]) -> None:
        import transformers

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._model = model.to(self._device).eval()
        self._policy, self._separators = policy, separators

    def mask(self, token_ids: list[int], *, is_full: bool) -> BoolArray:
        """[num_tokens, num_tokens], rows are queries; ``is_full``: of full attention."""
        if is_full:
            return np.tri(len(token_ids), dtype=np.bool_)
        return visible_mask(self._policy, np.isin(token_ids, self._separators))

    @torch.inference_mode()
    def scores(self, prompt: list[int], answer: list[int], *, is_full: bool = False) -> Scores:
        """Teacher-forced: each token of the answer behind all before it."""
        token_ids = prompt + answer[:-1]
        mask = torch.from_numpy(self.mask(token_ids, is_full=is_full)).to(self._device)
        bias = torch.zeros(mask.shape, device=self._device).masked_fill_(~mask, float("-inf"))
        logits = self._model(
            torch.tensor([token_ids], device=self._device),
            # with four dimensions transformers takes it as it is
            attention_mask=bias[None, None],
            use_cache=False,
            logits_to_keep=len(answer),
        ).logits[0]
        every = logits.float().log_softmax(dim=-1).cpu()
        own = every.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        return Scores(own, every.max(dim=-1).values)
