"""The policy that a model was trained with, read from its config.json.

The fields are those of the authors' ``sepllm_gpt_neox`` checkpoints. A mask is part of such a model
as its weights are, so what is missing, or cannot be served exactly, is an error, not a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NO_SEPARATORS = [-1]
# fields not named here or below print, pad, choose a kernel or were never implemented
_UNSUPPORTED = {
    "USE_BiPE": "bilevel position encoding (BiPE), which numbers tokens by segment",
    "USE_SA_SOFTMAX": "self-adjusting softmax, which weighs keys by more than their scores",
    "USE_SA_SOFTMAX_NO_DENO": "self-adjusting softmax, which weighs keys by more than their scores",
}


@dataclass(frozen=True, slots=True)
class TrainedPolicy:
    """What a checkpoint's attention reads, in the words of ``SepLLMConfig``.

    ``max_separators`` is more than a request can have: training bounded nothing.
    """

    initial_tokens: int
    window: int
    separators: tuple[int, ...]
    full_layers: tuple[int, ...]
    max_separators: int


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse what changes attention beyond which keys it reads.

    Raises:
        ValueError: one sentence.
    """
    for key, what in _UNSUPPORTED.items():
        if config.get(key):
            raise ValueError(
                f"vllm_sepllm does not support checkpoints with {what}; serve one with {key} false"
            )


def is_full_attention(config: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was trained with ordinary attention, as a baseline."""
    return bool(config.get("USE_ORIGINAL_FULL_ATTEN"))


def trained_policy(
    config: Mapping[str, Any], *, num_layers: int, max_model_len: int
) -> TrainedPolicy:
    """Read the policy of a checkpoint.

    Args:
        config: of the checkpoint, as in its config.json.
        num_layers: attention layers of the model.
        max_model_len: tokens of the longest request; a layer with this window or more is full.

    Raises:
        ValueError: if a field is missing or wrong, or if sepllm cannot serve the mask exactly.
    """
    check_architecture(config)
    if is_full_attention(config):
        raise ValueError(
            "this checkpoint was trained with full attention (USE_ORIGINAL_FULL_ATTEN); serve it "
            "without --attention-backend sepllm"
        )
    if not config.get("EXCLUDE_DIAGONAL", True):
        raise ValueError(
            "vllm_sepllm does not support checkpoints with EXCLUDE_DIAGONAL false, whose window is "
            "another one in prefill; serve one with EXCLUDE_DIAGONAL true"
        )
    windows = _windows(config, num_layers)
    window = min(windows)
    full_layers = tuple(layer for layer, size in enumerate(windows) if size > window)
    other = sorted({windows[layer] for layer in full_layers if windows[layer] < max_model_len})
    if other:
        raise ValueError(
            f"this checkpoint has layers with windows of {window} and of {other} tokens, and "
            f"vllm_sepllm serves one window beside layers that read everything; set "
            f"--max-model-len to {other[0]} or less"
        )
    separators = [] if config.get("streamingLLM") else _ints(config, "separator_token_ids")
    return TrainedPolicy(
        initial_tokens=_int(config, "init_tok_max_idx") + 1,
        window=window,
        separators=() if separators == _NO_SEPARATORS else tuple(separators),
        full_layers=full_layers,
        max_separators=max_model_len,
    )


def _windows(config: Mapping[str, Any], num_layers: int) -> list[int]:
    """The window of each layer; both phases must have the same."""
    prefill = _phase(config, "prefill", "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS", num_layers)
    decode = _phase(config, "generate", "USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS", num_layers)
    if prefill != decode:
        raise ValueError(
            f"vllm_sepllm reads the same window in prefill and decode, this checkpoint has "
            f"{prefill} and {decode}; set its generate windows to the prefill windows, which it "
            "was trained with"
        )
    return prefill


def _phase(config: Mapping[str, Any], phase: str, by_layer: str, num_layers: int) -> list[int]:
    if not config.get(by_layer):
        return [_int(config, f"{phase}_local_window_size")] * num_layers
    # the authors' spelling
    key = "prefill_loc_win_size_list" if phase == "prefill" else "generate_win_loc_size_list"
    windows = _ints(config, key)
    if len(windows) != num_layers:
        raise ValueError(
            f"{key} must have a window for each of {num_layers} layers, got {len(windows)}; "
            "correct the checkpoint's config.json"
        )
    return windows


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(_wrong(key, "an integer", value))
    return value


def _ints(config: Mapping[str, Any], key: str) -> list[int]:
    value = config.get(key)
    is_list = isinstance(value, list) and len(value) > 0
    if not is_list or any(not isinstance(i, int) or isinstance(i, bool) for i in value or ()):
        raise ValueError(_wrong(key, "a list of integers", value))
    return list(value or ())


def _wrong(key: str, wanted: str, got: object) -> str:
    return (
        f"a checkpoint trained with SepLLM needs {key} in its config.json, {wanted}, got {got!r}; "
        "add the value that it was trained with"
    )
