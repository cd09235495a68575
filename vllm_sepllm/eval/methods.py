"""The methods that are compared, and settings that give the others sepllm's mean KV."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, MIN_WINDOW, ResolvedConfig, SepLLMConfig
from vllm_sepllm.policy.kept import kept_lengths

FULL, SEPLLM, STREAMING, FIXED = "full", "sepllm", "streaming-llm", "fixed-interval"


@dataclass(frozen=True, slots=True)
class Method:
    """Settings to measure.

    Attributes:
        name: in keys and tables.
        settings: what ``additional_config["sepllm"]`` holds; None is vLLM's own full attention.
        rival: name of the StreamingLLM of the same mean KV; None if there is none.
    """

    name: str
    settings: Mapping[str, Any] | None
    rival: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run measures besides full attention.

    Attributes:
        sepllm: settings that set the budget of ``equal``, StreamingLLM and FixLLM.
        budgets: further settings, each with a StreamingLLM of its own mean KV.
        equal: settings whose window is chosen to keep as many tokens as ``sepllm`` does.
        also: settings as they are.
    """

    sepllm: Mapping[str, Any]
    budgets: Sequence[Method] = ()
    equal: Sequence[Method] = ()
    also: Sequence[Method] = ()


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one request and the queries that are scored: positions [first, num_tokens)."""

    token_ids: Sequence[int]
    first: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What of a model decides how much is kept.

    Attributes:
        separator_ids: what ``separators`` of a configuration means for its tokenizer.
        num_layers: of the model, all with ordinary attention.
        max_model_len: of every engine of the run; bounds the separators where the settings do not.
    """

    separator_ids: Callable[[Any], tuple[int, ...]]
    num_layers: int
    max_model_len: int


def mean_kept(
    settings: Mapping[str, Any] | None, spans: Sequence[Span], facts: ModelFacts
) -> float:
    """Keys that a scored query finds in the cache, the mean over queries and layers.

    Raises:
        ValueError: if the settings do not go with the model.
    """
    if settings is None:
        means = [np.arange(span.first, len(span.token_ids)) + 1.0 for span in spans]
        return float(np.concatenate(means).mean())
    config = _resolved(settings, facts)
    share = len(config.full_layers) / facts.num_layers
    means = []
    for span in spans:
        position = np.arange(len(span.token_ids))
        kept = kept_lengths(config.policy, config.separators.mask(span.token_ids))
        means.append((share * (position + 1) + (1 - share) * kept)[span.first :])
    return float(np.concatenate(means).mean())


def methods(wanted: Wanted, spans: Sequence[Span], facts: ModelFacts) -> list[Method]:
    """Everything that a run measures on these spans, full attention first.

    Raises:
        ValueError: if settings do not go with the model.
    """
    target = mean_kept(wanted.sepllm, spans, facts)
    fixed = _fixed(wanted.sepllm, target, spans, facts)
    found = [
        Method(FULL, None),
        Method(SEPLLM, wanted.sepllm, STREAMING),
        Method(STREAMING, _streaming(wanted.sepllm, target, spans, facts), STREAMING),
        Method(FIXED, fixed, STREAMING),
    ]
    for method in wanted.equal:
        settings = _with_window(method.settings or {}, target, spans, facts)
        found.append(Method(method.name, settings, STREAMING))
    for method in wanted.budgets:
        own = method.settings or {}
        rival = f"{method.name}-streaming"
        streaming = _streaming(own, mean_kept(own, spans, facts), spans, facts)
        found += [Method(method.name, own, rival), Method(rival, streaming, rival)]
    return [*found, *wanted.also]


def _streaming(
    sepllm: Mapping[str, Any], target: float, spans: Sequence[Span], facts: ModelFacts
) -> dict[str, Any]:
    """StreamingLLM with the initial tokens and full layers of ``sepllm``."""
    return _with_window({**_common(sepllm), "preset": STREAMING}, target, spans, facts)


def _fixed(
    sepllm: Mapping[str, Any], target: float, spans: Sequence[Span], facts: ModelFacts
) -> dict[str, Any]:
    """FixLLM with the interval nearest to sepllm's separators at its window.

    The window makes up for the rounding.
    """
    common = {**_common(sepllm), "preset": FIXED}
    window = _config(sepllm).window

    def apart(interval: int) -> float:
        settings = {**common, "interval": interval, "window": window}
        return abs(mean_kept(settings, spans, facts) - target)

    interval = min(range(2, 65), key=apart)
    return _with_window({**common, "interval": interval}, target, spans, facts)


def _common(sepllm: Mapping[str, Any]) -> dict[str, Any]:
    config = _config(sepllm)
    return {"initial_tokens": config.initial_tokens, "full_layers": list(config.full_layers)}


def _config(settings: Mapping[str, Any]) -> SepLLMConfig:
    return SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: dict(settings)})


def _resolved(settings: Mapping[str, Any], facts: ModelFacts) -> ResolvedConfig:
    """As an engine of the run resolves them."""
    config = _config(settings)
    return config.resolve(
        separator_ids=facts.separator_ids(config.separators),
        num_layers=facts.num_layers,
        max_model_len=facts.max_model_len,
        # the engine's own is unknown here; nothing that is kept depends on it, and 1 never refuses
        block_size=1,
    )


def _with_window(
    settings: Mapping[str, Any], target: float, spans: Sequence[Span], facts: ModelFacts
) -> dict[str, Any]:
    """``settings`` with the window whose mean KV comes nearest to ``target``."""

    def kept(window: int) -> float:
        return mean_kept({**settings, "window": window}, spans, facts)

    longest = max(len(span.token_ids) for span in spans)
    return {**settings, "window": _window(kept, target, longest)}


def _window(kept: Callable[[int], float], target: float, longest: int) -> int:
    """The window that comes nearest to ``target``; ``kept`` does not fall with the window."""
    low, high = MIN_WINDOW, max(MIN_WINDOW, longest)
    while low < high:
        middle = (low + high) // 2
        if kept(middle) < target:
            low = middle + 1
        else:
            high = middle
    below = max(MIN_WINDOW, low - 1)
    return min((below, low), key=lambda window: abs(kept(window) - target))
