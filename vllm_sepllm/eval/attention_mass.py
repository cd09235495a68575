"""How much of a model's attention goes to what SepLLM keeps, measured with full attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sepllm.policy.kept import State, token_states
from vllm_sepllm.policy.visibility import BoolArray, Policy

_NAMES = {
    State.INITIAL: "initial",
    State.SEPARATOR: "kept separator",
    State.WINDOW: "window",
    State.FORGOTTEN: "forgotten",
}


@dataclass(frozen=True, slots=True)
class Mass:
    """One class of tokens, the mean over layers, heads and the queries that were looked at.

    Attributes:
        name: of the class.
        mass: share of the attention that it gets.
        share: share of the tokens that it is.
    """

    name: str
    mass: float
    share: float


def queries(policy: Policy, num_tokens: int, num_queries: int = 64) -> list[int]:
    """Evenly from the first query that forgets something, or from the start of a short text."""
    first = policy.num_dense if num_tokens > policy.num_dense else 0
    return sorted(set(np.linspace(first, num_tokens - 1, num_queries).astype(int).tolist()))


@torch.inference_mode()
def measure(
    model: Any, token_ids: Sequence[int], is_separator: BoolArray, policy: Policy
) -> list[Mass]:
    """Attention mass per class.

    Args:
        model: a Hugging Face decoder with ``attn_implementation="eager"``; needs memory for one
            layer's [num_heads, num_tokens, num_tokens] at a time.
        token_ids: the text.
        is_separator: [num_tokens].
        policy: what the classes are read from.

    Raises:
        ValueError: if the model has no ``layers`` with a ``self_attn`` that gives its weights.
    """
    chosen = queries(policy, len(token_ids))
    per_layer: list[torch.Tensor] = []  # [num_queries, num_tokens] each

    def see(_module: object, _arguments: object, output: Any) -> None:
        per_layer.append(output[1][0][:, chosen].float().mean(dim=0))

    layers = getattr(model.get_decoder(), "layers", ())
    hooks = [x.self_attn.register_forward_hook(see) for x in layers if hasattr(x, "self_attn")]
    try:
        model(torch.tensor([list(token_ids)]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not per_layer:
        raise ValueError(
            f"{type(model).__name__} has no layers with self_attn, whose attention is measured; "
            "leave --attention out"
        )
    weights = torch.stack(per_layer).mean(dim=0).numpy()
    states = np.stack([token_states(policy, is_separator, query) for query in chosen])
    num_read = (states != State.FUTURE).sum(axis=1)
    found = []
    for state, name in _NAMES.items():
        is_state = states == state
        mass = np.where(is_state, weights, 0.0).sum(axis=1).mean()
        found.append(Mass(name, float(mass), float((is_state.sum(axis=1) / num_read).mean())))
    return found
