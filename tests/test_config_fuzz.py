"""Whatever is written for any key: one clear ValueError, or a policy that later steps can use."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import rule
from vllm_sepllm.config import ResolvedConfig, SepLLMConfig
from vllm_sepllm.policy.initial import protected_end
from vllm_sepllm.policy.layout import compact_length
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.separators.rules import token_separators
from vllm_sepllm.policy.step.checkpoint import checkpoint_positions
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import visible_mask

VOCAB_SIZE = 128
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.integers(-(2**200), 2**200),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.sampled_from(["paper", "extended", "streaming-llm", "fixed-interval", ".", "auto", "64"]),
    st.sampled_from([np.int64(64), object, 2**31, 2**63]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2),
    ),
    max_leaves=5,
)
# what a user is likely to mean, so that not every example fails at its first key
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "initial_tokens": st.integers(0, 40),
    "protect": st.none() | st.integers(0, VOCAB_SIZE - 1),
    "max_protected": st.integers(1, 200),
    "window": st.integers(16, 300),
    "separators": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9),
    "preset": st.sampled_from([None, None, "streaming-llm", "fixed-interval"]),
    "interval": st.none() | st.integers(1, 40),
    "max_separators": st.none() | st.integers(0, 300),
    "full_layers": st.lists(st.sampled_from([0, 1, -1, -2, 4]), max_size=2),
    "checkpoint_interval": st.none() | st.sampled_from([100, 128, 256, 512]),
}
# sums of such numbers leave 32 and 64 bits
HUGE = st.integers(2**20, 2**80)


@st.composite
def settings_of_a_user(draw: st.DrawFn) -> Any:
    """Sensible values of some keys, of which one or none is something else."""
    names = draw(st.sets(st.sampled_from(sorted(SepLLMConfig.model_fields))))
    # the default separators need a tokenizer
    chosen = {name: draw(LIKELY.get(name, ANYTHING)) for name in sorted(names | {"separators"})}
    if draw(st.booleans()):
        chosen[draw(st.sampled_from(sorted(chosen)))] = draw(HUGE | ANYTHING)
    return chosen


def usable(config: ResolvedConfig, num_layers: int, max_model_len: int) -> None:
    """What the scheduler and the workers do with a policy, at both ends of a request."""
    written = json.loads(json.dumps(config.to_json()))
    assert ResolvedConfig.from_json(written) == config
    SepLLMConfig.from_additional_config({"sepllm": written})
    assert len(config.full_layers) < num_layers
    assert all(0 <= layer < num_layers for layer in config.full_layers)
    token_ids = [(7 * i) % VOCAB_SIZE for i in range(60)]
    policy = replace(config.policy, initial_tokens=config.initial.of(token_ids))
    assert config.policy.initial_tokens <= policy.initial_tokens
    assert policy.initial_tokens <= config.largest_policy.initial_tokens
    is_separator = config.separators.mask(token_ids)
    read = np.flatnonzero(visible_mask(policy, is_separator)[59]).tolist()
    assert read == rule.visible(policy, list(is_separator), 59)
    assert read[-1] == 59, "a query reads itself"
    index = SeparatorIndex(policy, config.separators)
    builder = StepPlanBuilder(policy)
    builder.add("request", index, token_ids, 0, 50)
    builder.add("other", index, token_ids, 50, 10)
    assert builder.build() is not None
    positions = checkpoint_positions(0, 600, interval=config.checkpoint_interval, wanted=())
    assert len(positions) == 600 // config.checkpoint_interval
    assert 0 < compact_length(policy, max_model_len, 0) <= max_model_len


@given(
    settings_of_a_user() | ANYTHING,
    st.integers(1, 9),
    st.integers(1, 2000),
    st.sampled_from([32, 64, 128]),
)
@settings(max_examples=400)
def test_a_clear_error_or_a_usable_policy(
    given_by_user: object, num_layers: int, max_model_len: int, block_size: int
) -> None:
    try:
        config = SepLLMConfig.from_additional_config({"sepllm": given_by_user})
        protect = config.protect
        resolved = config.resolve(
            separators=token_separators(config.separators, None, VOCAB_SIZE),
            end_id=None if protect is None else protected_end(protect, None, VOCAB_SIZE),
            num_layers=num_layers,
            max_model_len=max_model_len,
            block_size=block_size,
        )
    except ValueError as error:
        text = str(error)
        assert "\n" not in text
        assert any(name in text for name in [*SepLLMConfig.model_fields, "sepllm"]), text
        return
    usable(resolved, num_layers, max_model_len)


@given(ANYTHING)
def test_other_plugins_may_use_additional_config_as_they_like(value: object) -> None:
    """Only our key is read, of a dictionary."""
    if not isinstance(value, dict):
        assert SepLLMConfig.from_additional_config(value) == SepLLMConfig()
    assert SepLLMConfig.from_additional_config({"other": value}) == SepLLMConfig()
