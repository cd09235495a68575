"""Lengths of a model: the positions that it was trained on, and requests that are longer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vllm.config import ModelConfig

from vllm_sepllm.integration.patch import wrap_once

_MAY_EXCEED = ContextVar("sepllm_requests_may_exceed_the_trained_length", default=False)


def trained_length(model_config: ModelConfig) -> int | None:
    """Positions that the model was trained on, before YaRN's factor; None: it does not say."""
    derived, _ = model_config.model_arch_config.derived_max_model_len_and_key
    if derived == float("inf"):
        return None
    rope = getattr(model_config.hf_text_config, "rope_parameters", None) or {}
    if "yarn" in str(rope.get("rope_type")):
        return int(rope.get("original_max_position_embeddings") or derived)
    return int(derived)


@contextmanager
def unbounded(*, is_on: bool) -> Iterator[None]:
    """Let vLLM take a max_model_len beyond the trained length, if ``is_on``."""
    wrap_once(ModelConfig, "get_and_verify_max_len", _get_and_verify_max_len)
    token = _MAY_EXCEED.set(is_on)
    try:
        yield
    finally:
        _MAY_EXCEED.reset(token)


def _get_and_verify_max_len(
    original: Callable[..., int], self: ModelConfig, max_model_len: int | None
) -> int:
    """ModelConfig.get_and_verify_max_len, without the bound that renumbered positions lift.

    VLLM_ALLOW_LONG_MAX_MODEL_LEN does the same, but vLLM reads it once per process, and warns of
    positions that no request gets. To be dropped when a scheduler can say what it bounds.
    """
    trained = trained_length(self) if _MAY_EXCEED.get() else None
    if trained is None or max_model_len is None:
        return original(self, max_model_len)
    return max(max_model_len, original(self, min(max_model_len, trained)))
