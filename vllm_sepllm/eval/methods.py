"""The methods that are compared, and settings that give one method another's mean KV."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vllm_sepllm.config import ADDITIONAL_CONFIG_KEY, MIN_WINDOW, ResolvedConfig, SepLLMConfig
from vllm_sepllm.policy.kept import kept_lengths
from vllm_sepllm.policy.separators.definition import TokenSeparators

FULL, SEPLLM, STREAMING, FIXED = "full", "sepllm", "streaming-llm", "fixed-interval"
# requests on which windows are chosen: more of them move a window by less than one token
_MAX_SPANS = 64


@dataclass(frozen=True, slots=True)
class Method:
    """Settings to measure.

    Attributes:
        name: in keys and tables.
        settings: what ``additional_config["sepllm"]`` holds; None is vLLM's own full attention.
        mean_kv_of: name of the method whose mean KV this one is given by the choice of its window
            (and of its interval, where a "fixed-interval" names none).
    """

    name: str
    settings: Mapping[str, Any] | None
    mean_kv_of: str | None = None


# what a suite compares if it names no methods
DEFAULTS = (
    Method(FULL, None),
    Method(SEPLLM, {}),
    Method(STREAMING, {"preset": STREAMING}, SEPLLM),
    Method(FIXED, {"preset": FIXED}, SEPLLM),
)


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one request and the queries that are counted: positions [first, num_tokens)."""

    token_ids: Sequence[int]
    first: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What of a model decides how much is kept.

    Attributes:
        separators: what ``separators`` of a configuration means for its tokenizer.
        end_id: the token that ``protect`` of a configuration means for it.
        num_layers: of the model, all with ordinary attention.
        max_model_len: of every engine of the run; bounds the separators where the settings do not.
    """

    separators: Callable[[Any], TokenSeparators]
    end_id: Callable[[str | int], int]
    num_layers: int
    max_model_len: int


def mean_kept(
    settings: Mapping[str, Any] | None, spans: Sequence[Span], facts: ModelFacts
) -> float:
    """Keys that a counted query finds in the cache, the mean over queries and layers.

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
        policy = replace(config.policy, initial_tokens=config.initial.of(span.token_ids))
        kept = kept_lengths(policy, config.separators.mask(span.token_ids))
        means.append((share * (position + 1) + (1 - share) * kept)[span.first :])
    return float(np.concatenate(means).mean())


def resolve(methods: Sequence[Method], spans: Sequence[Span], facts: ModelFacts) -> list[Method]:
    """The methods of a suite with nothing left to choose on these spans.

    Raises:
        ValueError: if settings do not go with the model.
    """
    step = -(-len(spans) // _MAX_SPANS)
    sample = spans[::step]
    by_name = {method.name: method for method in methods}
    found = []
    for method in methods:
        if method.mean_kv_of is not None:
            model = by_name[method.mean_kv_of].settings
            method = replace(method, settings=_with_mean_kv(method, model or {}, sample, facts))
        found.append(method)
    return found


def rival(method: Method, methods: Sequence[Method]) -> Method | None:
    """The StreamingLLM of a method's mean KV; None if the suite has none."""
    budget = method.mean_kv_of or method.name
    for other in methods:
        if other.mean_kv_of == budget and (other.settings or {}).get("preset") == STREAMING:
            return other
    return None


def _with_mean_kv(
    method: Method, model: Mapping[str, Any], spans: Sequence[Span], facts: ModelFacts
) -> dict[str, Any]:
    """Settings of ``method`` that keep as many tokens as the settings ``model`` do.

    What ``method`` leaves open of initial tokens and full layers is that of ``model``.
    """
    target, config = mean_kept(model, spans, facts), _config(model)
    common = {"initial_tokens": config.initial_tokens, "full_layers": list(config.full_layers)}
    settings = {**common, **(method.settings or {})}
    if settings.get("preset") == FIXED and "interval" not in settings:
        # the interval nearest to the model's separators; the window makes up for its rounding
        def apart(interval: int) -> float:
            given = {**settings, "interval": interval, "window": config.window}
            return abs(mean_kept(given, spans, facts) - target)

        settings["interval"] = min(range(2, 65), key=apart)

    def kept(window: int) -> float:
        return mean_kept({**settings, "window": window}, spans, facts)

    longest = max(len(span.token_ids) for span in spans)
    return {**settings, "window": _window(kept, target, longest)}


def described(settings: Mapping[str, Any] | None, facts: ModelFacts) -> dict[str, Any] | None:
    """Settings with the defaults that they leave out: where one has changed, answers are others.

    Raises:
        ValueError: if the settings do not go with the model.
    """
    if settings is None:
        return None
    given = _config(settings).model_dump(mode="json", exclude_none=True)
    return {**given, "max_separators": _resolved(settings, facts).max_separators}


def _config(settings: Mapping[str, Any]) -> SepLLMConfig:
    return SepLLMConfig.from_additional_config({ADDITIONAL_CONFIG_KEY: dict(settings)})


def _resolved(settings: Mapping[str, Any], facts: ModelFacts) -> ResolvedConfig:
    """As an engine of the run resolves them."""
    config = _config(settings)
    return config.resolve(
        separators=facts.separators(config.separators),
        end_id=None if config.protect is None else facts.end_id(config.protect),
        num_layers=facts.num_layers,
        max_model_len=facts.max_model_len,
        # the engine's own is unknown here; nothing that is kept depends on it, and 1 never refuses
        block_size=1,
    )


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
