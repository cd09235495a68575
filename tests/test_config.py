"""A wrong setting is one clear sentence; a right one round-trips through JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sepllm.config import ResolvedConfig, SepLLMConfig
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators
from vllm_sepllm.policy.visibility import Policy


def read(given: object) -> SepLLMConfig:
    return SepLLMConfig.from_additional_config({"sepllm": given})


def test_absent_means_defaults() -> None:
    config = SepLLMConfig.from_additional_config({})
    assert (config.initial_tokens, config.window, config.separators) == (4, 508, "sentences")
    assert (config.max_separators, config.full_layers) == (None, ())


def test_unknown_key_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'windows', valid keys are \['initial_tok"):
        read({"windows": 64})


NO_SEPARATORS = (
    "separators must be one of 'paper', 'extended', 'unwrapped', 'sentences', a list of strings or"
)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 15}, "window: Input should be greater than or equal to 16, got 15"),
        ({"window": 2**30}, "window: Input should be less than or equal to 1073741823"),
        ({"window": "64"}, "window: Input should be a valid integer, got '64'"),
        ({"window": True}, "window: Input should be a valid integer, got True"),
        ({"initial_tokens": -1}, "initial_tokens: Input should be greater than or equal to 0"),
        ({"max_separators": 1.5}, "max_separators: Input should be a valid integer, got 1.5"),
        ({"separators": "all"}, NO_SEPARATORS),
        ({"separators": [1, "."]}, NO_SEPARATORS),
        ({"separators": [""]}, NO_SEPARATORS),
        ({"full_layers": [0.5]}, "full_layers: Input should be a valid integer"),
        (
            {"preset": "h2o"},
            "preset: Input should be 'streaming-llm' or 'fixed-interval', got 'h2o",
        ),
        ({"preset": "fixed-interval"}, 'preset "fixed-interval" and interval go together'),
        ({"interval": 8}, 'preset "fixed-interval" and interval go together'),
        ({"preset": "streaming-llm", "interval": 8}, "and interval go together"),
        ({"preset": "fixed-interval", "interval": 0}, "interval: Input should be greater than or"),
        (
            {"preset": "streaming-llm", "separators": "paper"},
            "preset 'streaming-llm' keeps no separators, got separators='paper'; remove one",
        ),
        (
            {"preset": "streaming-llm", "max_separators": 100},
            "preset 'streaming-llm' keeps no separators, got max_separators=100; remove one",
        ),
        ({"max_protected": 100}, "protect is not set: set both, .* or neither"),
        (
            {"positions": "text", "max_position": 900},
            'positions is "text": set both, .* or neither',
        ),
        ({"positions": "renumbered", "full_layers": [0]}, "remove full_layers, or set positions"),
        ({"positions": "alibi"}, "positions: Input should be 'text' or 'renumbered', got 'alibi'"),
        ({"positions": "renumbered", "max_position": 0}, "max_position: Input should be greater"),
        ([], "must be an object with any of"),
    ],
)
def test_wrong_values_are_refused_by_name(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(given)


def test_two_mistakes_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"window: .*unknown key 'x'"):
        read({"window": 1, "x": 2})


def test_resolving_derives_what_was_left_open_and_nothing_else() -> None:
    config = read({"window": 60, "separators": ["."], "full_layers": [-1, 0]})
    resolved = config.resolve(
        separators=TokenSeparators((7, 9)), num_layers=30, max_model_len=8192, block_size=32
    )
    assert resolved == ResolvedConfig(
        initial=Initial(4),
        window=60,
        max_separators=2048,
        separators=TokenSeparators((7, 9)),
        full_layers=(0, 29),
        checkpoint_interval=512,
    )
    assert resolved.policy == Policy(4, 60, 2048)
    again = read(resolved.to_json()).resolve(
        separators=TokenSeparators((7, 9)), num_layers=30, max_model_len=4096, block_size=32
    )
    assert again == resolved


@pytest.mark.parametrize(
    ("given", "max_model_len", "max_separators"),
    [
        ({}, 1 << 20, 256),
        ({}, 1000, 250),
        ({"max_separators": 300}, 1000, 300),
        ({"separators": "extended"}, 1 << 20, 1 << 18),
        ({"separators": [7]}, 1 << 20, 1 << 18),
    ],
)
def test_the_default_rule_alone_keeps_no_more_than_256(
    given: dict[str, Any], max_model_len: int, max_separators: int
) -> None:
    resolved = read(given).resolve(
        separators=TokenSeparators((7,)), num_layers=2, max_model_len=max_model_len, block_size=32
    )
    assert resolved.max_separators == max_separators


@pytest.mark.parametrize(
    ("given", "max_separators"),
    [
        ({"preset": "streaming-llm"}, 0),
        ({"separators": []}, 0),
        ({"preset": "fixed-interval", "interval": 8}, 250),
        # every other token: a quarter would drop some
        ({"preset": "fixed-interval", "interval": 2}, 500),
    ],
)
def test_presets_have_no_separators_and_room_for_what_they_keep(
    given: dict[str, Any], max_separators: int
) -> None:
    config = read(given)
    assert config.separators == ()
    resolved = config.resolve(
        separators=TokenSeparators(()), num_layers=2, max_model_len=1000, block_size=32
    )
    assert resolved.max_separators == max_separators
    interval = given.get("interval")
    nothing = TokenSeparators(())
    assert resolved.separators == (IntervalSeparators(interval) if interval else nothing)
    # what the workers read back
    assert ResolvedConfig.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers -4 to 3, got \[4, -5\]"):
        read({"full_layers": [4, -5]}).resolve(
            separators=TokenSeparators(()), num_layers=4, max_model_len=64, block_size=32
        )
    with pytest.raises(ValueError, match="all 2 layers, which leaves nothing"):
        read({"full_layers": [0, 1]}).resolve(
            separators=TokenSeparators(()), num_layers=2, max_model_len=64, block_size=32
        )


@given(
    st.dictionaries(
        st.sampled_from([*SepLLMConfig.model_fields, "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.sampled_from([0.5, 64.0, ".", "", "x"]),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=4,
        ),
    )
)
def test_anything_gives_a_config_or_a_clear_error(given: dict[str, object]) -> None:
    try:
        config = read(given)
    except ValueError as error:
        message = str(error)
    else:
        assert read(json.loads(config.model_dump_json())) == config
        return
    assert message.startswith('additional_config["sepllm"]')


def test_a_checkpoint_interval_is_whole_blocks() -> None:
    resolved = read({"checkpoint_interval": 96}).resolve(
        separators=TokenSeparators(()), num_layers=2, max_model_len=64, block_size=32
    )
    assert resolved.checkpoint_interval == 96
    with pytest.raises(ValueError, match="must be a multiple of the block size 32, got 100"):
        read({"checkpoint_interval": 100}).resolve(
            separators=TokenSeparators(()), num_layers=2, max_model_len=64, block_size=32
        )


RENUMBERED = {"separators": TokenSeparators((7,)), "num_layers": 2, "block_size": 32}


def test_renumbered_positions_bound_what_a_request_keeps() -> None:
    """Proves it for lengths given and trained, and that a length of millions changes nothing."""
    for fields, trained, length in (({"max_position": 800}, 8192, 800), ({}, 8192, 8192)):
        config = read({"positions": "renumbered", "separators": "extended"} | fields)
        resolved = config.resolve(**RENUMBERED, max_model_len=4_000_000, trained_length=trained)
        assert resolved.policy == Policy(4, 508, length // 4, max_position=length)
        assert ResolvedConfig.from_json(json.loads(json.dumps(resolved.to_json()))) == resolved
    short = read({"positions": "renumbered", "separators": "extended"}).resolve(
        **RENUMBERED, max_model_len=1000, trained_length=8192
    )
    assert short.max_separators == 250


@pytest.mark.parametrize(
    ("given", "trained", "message"),
    [
        ({}, None, "does not say on how many positions it was trained"),
        # 4 + 252 + 100 + 64
        (
            {"max_separators": 101, "max_position": 420},
            8192,
            "positions below 420 have no room: 4 i",
        ),
        (
            {"protect": "<end>", "max_position": 4000},
            8192,
            "set max_separators, window, max_protect",
        ),
        (
            {"preset": "fixed-interval", "interval": 1},
            8192,
            "8192 separators and 64 new tokens are",
        ),
    ],
)
def test_kept_tokens_that_leave_no_room_for_new_ones_are_refused(
    given: dict[str, Any], trained: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read({"positions": "renumbered"} | given).resolve(
            **RENUMBERED,
            max_model_len=1 << 20,
            trained_length=trained,
            end_id=5 if "protect" in given else None,
        )


def test_the_smallest_room_is_enough() -> None:
    config = read(
        {"positions": "renumbered", "window": 252, "max_separators": 100, "max_position": 420}
    )
    resolved = config.resolve(**RENUMBERED, max_model_len=1 << 20, trained_length=8192)
    assert resolved.max_position == 420
