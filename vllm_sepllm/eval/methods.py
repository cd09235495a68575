"""The methods that are compared, and settings that give the others sepllm's mean KV."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, MIN_WINDOW, SepLLMConfig
from vllm_sepllm.policy.kept import kept_lengths

FULL, SEPLLM, STREAMING, FIXED = "full", "sepllm", "streaming-llm", "fixed-interval"


@dataclass(frozen=True, slots=True)
class Method:
    """A name and what ``additional_config["sepllm"]`` holds; None is vLLM's own full attention."""

    name: str
    settings: Mapping[str, Any] | None


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
    """

    separator_ids: Callable[[Any], tuple[int, ...]]
    num_layers: int


def mean_kept(
    settings: Mapping[str, Any] | None, spans: Sequence[Span], facts: ModelFacts
) -> float:
    """Keys that a scored query finds in the cache, the mean over queries and layers."""
    if settings is None:
        means = [np.arange(span.first, len(span.token_ids)) + 1.0 for span in spans]
        return float(np.concatenate(means).mean())
    config = SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: dict(settings)})
    separators = np.array(facts.separator_ids(config.separators), dtype=np.int64)
    num_full = len({layer % facts.num_layers for layer in config.full_layers})
    share = num_full / facts.num_layers
    means = []
    for span in spans:
        position = np.arange(len(span.token_ids))
        is_separator = np.isin(span.token_ids, separators)
        if config.interval is not None:
            is_separator = position % config.interval == 0
        kept = kept_lengths(config.policy, is_separator)
        means.append((share * (position + 1) + (1 - share) * kept)[span.first :])
    return float(np.concatenate(means).mean())


def at_equal_kept(
    sepllm: Mapping[str, Any], spans: Sequence[Span], facts: ModelFacts
) -> list[Method]:
    """StreamingLLM and FixLLM with windows that keep as many tokens as ``sepllm`` does.

    FixLLM takes the interval nearest to sepllm's separators at its window, then the window that
    makes up for the rounding.
    """
    target = mean_kept(sepllm, spans, facts)
    config = SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: dict(sepllm)})
    common = {"initial_tokens": config.initial_tokens, "full_layers": list(config.full_layers)}

    def streaming(window: int) -> dict[str, Any]:
        return {**common, "window": window, "preset": STREAMING}

    def fixed(window: int, interval: int) -> dict[str, Any]:
        return {**common, "window": window, "preset": FIXED, "interval": interval}

    longest = max(len(span.token_ids) for span in spans)
    interval = min(
        range(2, 65),
        key=lambda k: abs(mean_kept(fixed(config.window, k), spans, facts) - target),
    )

    def kept_by_streaming(window: int) -> float:
        return mean_kept(streaming(window), spans, facts)

    def kept_by_fixed(window: int) -> float:
        return mean_kept(fixed(window, interval), spans, facts)

    return [
        Method(STREAMING, streaming(_window(kept_by_streaming, target, longest))),
        Method(FIXED, fixed(_window(kept_by_fixed, target, longest), interval)),
    ]


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
