"""Budgets are those of the rule, and the methods that are compared keep as many tokens."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.eval.methods import (
    FIXED,
    SEPLLM,
    STREAMING,
    Method,
    ModelFacts,
    Span,
    described,
    mean_kept,
    resolve,
    rival,
)
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.visibility import Policy, visible_mask

SEPARATORS = (3, 5)
FACTS = ModelFacts(
    lambda spec: TokenSeparators(() if spec == () else SEPARATORS),
    end_id=lambda protect: {"end": 20}[str(protect)],
    num_layers=10,
    max_model_len=4000,
)


def span(num_tokens: int, first: int, seed: int = 0) -> Span:
    return Span(np.random.default_rng(seed).integers(0, 20, num_tokens).tolist(), first)


def test_mean_kept_is_the_mean_of_the_masks_rows() -> None:
    part = span(400, 200)
    is_separator = np.isin(part.token_ids, SEPARATORS)
    rows = visible_mask(Policy(3, 20), is_separator).sum(axis=1)[200:]
    settings = {"initial_tokens": 3, "window": 20}
    assert mean_kept(settings, [part], FACTS) == pytest.approx(rows.mean())
    # two layers of ten read everything
    full = np.arange(200, 400) + 1
    with_full = settings | {"full_layers": [0, -1]}
    wanted = 0.2 * full.mean() + 0.8 * rows.mean()
    assert mean_kept(with_full, [part], FACTS) == pytest.approx(wanted)
    assert mean_kept(None, [part], FACTS) == pytest.approx(full.mean())


def test_described_settings_spell_the_defaults_out() -> None:
    """So that answers under another default are not taken for this one's."""
    assert described(None, FACTS) is None
    found = described({"window": 40}, FACTS)
    defaults = SepLLMConfig().model_dump(mode="json", exclude_none=True)
    assert found == {**defaults, "window": 40, "max_separators": 256}
    assert json.loads(json.dumps(found)) == found
    assert described({"window": 40, "initial_tokens": 4, "max_separators": 256}, FACTS) == found
    # a quarter of max_model_len, or none
    assert described({"separators": "extended"}, FACTS)["max_separators"] == 1000
    assert described({"preset": STREAMING}, FACTS)["max_separators"] == 0
    with pytest.raises(ValueError, match="layers -10 to 9"):
        described({"full_layers": [10]}, FACTS)


def test_a_protected_prefix_is_kept_of_each_request_as_far_as_it_goes() -> None:
    """One of 100 tokens, and one that begins too late."""
    settings = {"protect": "end", "max_protected": 100, "window": 20}
    for place, initial_tokens in ((99, 100), (100, 4)):
        part = span(400, 200)
        token_ids = [*part.token_ids[:place], 20, *part.token_ids[place + 1 :]]
        rows = visible_mask(Policy(initial_tokens, 20), np.isin(token_ids, SEPARATORS)).sum(axis=1)
        found = mean_kept(settings, [Span(token_ids, 200)], FACTS)
        assert found == pytest.approx(rows[200:].mean())
    wanted = [Method("protected", settings), Method("s", {"preset": STREAMING}, "protected")]
    parts = [Span([*range(19)] * 5 + [20, *range(19)] * 10, 200)]
    _, streaming = resolve(wanted, parts, FACTS)
    assert streaming.settings is not None
    assert streaming.settings["initial_tokens"] == 4
    kept = mean_kept(settings, parts, FACTS)
    assert mean_kept(streaming.settings, parts, FACTS) == pytest.approx(kept, rel=0.02)


def test_separators_are_bounded_as_in_the_engine() -> None:
    """Three of four tokens are separators, a quarter of max_model_len stays."""
    separators = TokenSeparators(tuple(range(15)))
    facts = replace(FACTS, separators=lambda _spec: separators, max_model_len=401)
    part = span(400, 200)
    is_separator = np.isin(part.token_ids, range(15))
    assert is_separator.mean() > 0.5
    rows = visible_mask(Policy(3, 20, 100), is_separator).sum(axis=1)[200:]
    unbounded = visible_mask(Policy(3, 20), is_separator).sum(axis=1)[200:]
    assert unbounded.mean() > rows.mean() + 10
    settings = {"initial_tokens": 3, "window": 20}
    assert mean_kept(settings, [part], facts) == pytest.approx(rows.mean())


@pytest.mark.parametrize("full_layers", [[0, 10], list(range(10))])
def test_layers_that_the_model_does_not_have_are_refused(full_layers: list[int]) -> None:
    with pytest.raises(ValueError, match="full_layers"):
        mean_kept({"full_layers": full_layers}, [span(40, 20)], FACTS)


def test_an_interval_is_counted_by_position() -> None:
    part = span(400, 200)
    rows = visible_mask(Policy(3, 20), np.arange(400) % 7 == 0).sum(axis=1)[200:]
    settings = {"initial_tokens": 3, "window": 20, "preset": FIXED, "interval": 7}
    assert mean_kept(settings, [part], FACTS) == pytest.approx(rows.mean())


@pytest.mark.parametrize("full_layers", [(), (0, -1)])
def test_methods_keep_as_many_tokens_within_two_percent(full_layers: tuple[int, ...]) -> None:
    spans = [span(1000, 500, seed) for seed in range(3)]
    sepllm = {"window": 60, "full_layers": list(full_layers)}
    wide = {"window": 300, "initial_tokens": 1}
    wanted = [
        Method("full", None),
        Method(SEPLLM, sepllm),
        Method(STREAMING, {"preset": STREAMING}, SEPLLM),
        Method(FIXED, {"preset": FIXED}, SEPLLM),
        Method("no-separators", {"separators": ()}, SEPLLM),
        Method("wide", wide),
        Method("wide-streaming", {"preset": STREAMING, "initial_tokens": 7}, "wide"),
    ]
    found = {method.name: method for method in resolve(wanted, spans, FACTS)}
    assert list(found) == [method.name for method in wanted]
    kept = {name: mean_kept(method.settings, spans, FACTS) for name, method in found.items()}
    for name in (STREAMING, FIXED, "no-separators"):
        assert kept[name] == pytest.approx(kept[SEPLLM], rel=0.02)
        assert found[name].settings["full_layers"] == list(full_layers)
    assert kept["wide-streaming"] == pytest.approx(kept["wide"], rel=0.02)
    assert kept["wide"] != pytest.approx(kept[SEPLLM], rel=0.1)
    assert found["wide"].settings == wide
    assert found[STREAMING].settings["initial_tokens"] == 4
    # what a method says itself stays
    assert found["wide-streaming"].settings["initial_tokens"] == 7
    # one token in ten is a separator
    assert 8 <= found[FIXED].settings["interval"] <= 12
    assert found[STREAMING].settings["window"] > 100


def test_the_rival_is_the_plain_window_of_the_same_budget() -> None:
    sepllm, other = Method(SEPLLM, {}), Method("other", {"window": 60})
    fixed = Method(FIXED, {"preset": FIXED}, SEPLLM)
    streaming = Method(STREAMING, {"preset": STREAMING}, SEPLLM)
    wide = Method("wide-streaming", {"preset": STREAMING, "window": 400})
    methods = [Method("full", None), sepllm, other, fixed, wide, streaming]
    assert rival(sepllm, methods) is rival(fixed, methods) is rival(streaming, methods) is streaming
    assert rival(other, methods) is None
    assert rival(methods[0], methods) is None


def test_windows_do_not_depend_on_how_many_questions_there_are_beyond_the_sample() -> None:
    """A hundred requests: every second one is enough."""
    spans = [span(300, 200, seed) for seed in range(100)]
    wanted = [Method(SEPLLM, {"window": 60}), Method("s", {"preset": STREAMING}, SEPLLM)]
    assert resolve(wanted, spans, FACTS) == resolve(wanted, spans[::2], FACTS)
