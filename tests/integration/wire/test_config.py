"""What the selection writes is what every process reads, and nothing else counts as selected."""

import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm.config import SchedulerConfig

from vllm_sepllm.config import ResolvedConfig, SepLLMConfig
from vllm_sepllm.integration.wire.config import (
    ASYNC_SCHEDULER,
    SCHEDULER,
    is_selected,
    read_config,
    write_config,
)
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.separators.definition import IntervalSeparators, TokenSeparators

COUNTS = st.integers(0, 2**30 - 1)
IDS = st.lists(st.integers(0, 200_000), unique=True).map(tuple)
SEPARATORS = st.one_of(
    st.builds(IntervalSeparators, st.integers(1, 64)),
    st.builds(TokenSeparators, IDS),
    st.builds(TokenSeparators, IDS, IDS.filter(bool), IDS),
)
INITIAL = st.builds(Initial, COUNTS) | st.builds(
    # no more than max_model_len below
    Initial,
    COUNTS,
    st.integers(0, 200_000),
    st.integers(1, 64),
)
CONFIGS = st.builds(
    ResolvedConfig,
    initial=INITIAL,
    window=st.integers(16, 2**29),
    max_separators=COUNTS,
    separators=SEPARATORS,
    full_layers=st.lists(st.integers(0, 98), unique=True).map(sorted).map(tuple),
    checkpoint_interval=st.integers(1, 2**30),
)


def vllm_config(additional: Any, scheduler_cls: str | None = None) -> Any:
    scheduler = SchedulerConfig.default_factory(scheduler_cls=scheduler_cls)
    return SimpleNamespace(additional_config=additional, scheduler_config=scheduler)


@given(CONFIGS)
def test_what_is_written_is_read_in_another_process(config: ResolvedConfig) -> None:
    made = vllm_config({"sepllm": {"window": 64}, "other": 1})
    given_by_user = made.additional_config
    write_config(made, config)
    assert given_by_user == {"sepllm": {"window": 64}, "other": 1}
    assert made.additional_config["other"] == 1
    # vLLM hashes it as JSON and sends it as a pickle
    text = json.dumps(made.additional_config)
    for sent in (json.loads(text), pickle.loads(pickle.dumps(made.additional_config))):
        assert read_config(vllm_config(sent)) == config


@given(CONFIGS)
def test_what_is_written_is_what_a_user_may_write(config: ResolvedConfig) -> None:
    """So the configuration that an engine logs can be given to another one."""
    made = vllm_config({})
    write_config(made, config)
    again = SepLLMConfig.from_additional_config(made.additional_config)
    own = again.separators
    separators = own if isinstance(own, TokenSeparators) else TokenSeparators(tuple(own))
    assert not isinstance(again.protect, str)
    resolved = again.resolve(
        separators=separators,
        end_id=again.protect,
        num_layers=100,
        max_model_len=64,
        block_size=1,
    )
    assert resolved == config


def test_only_our_scheduler_says_that_sepllm_is_selected() -> None:
    """A VllmConfig that EngineArgs did not make may hold our key as the user wrote it."""
    for name in (SCHEDULER, ASYNC_SCHEDULER):
        assert is_selected(vllm_config({"sepllm": {}}, name))
    for name in (None, "vllm.v1.core.sched.scheduler.Scheduler"):
        assert not is_selected(vllm_config({"sepllm": {"window": 64}}, name))
