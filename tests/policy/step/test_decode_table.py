"""Steps of many requests at once equal the rule, counted anew for each of them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import rule
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.decode_table import DecodeTable
from vllm_sepllm.policy.visibility import Policy

SEPARATORS = TokenSeparators((1,))


@settings(max_examples=150, deadline=None)
@given(
    policy=st.builds(Policy, initial_tokens=st.integers(0, 5), window=st.integers(1, 20)),
    texts=st.lists(st.lists(st.integers(0, 1), min_size=120, max_size=120), min_size=1, max_size=5),
    # request, and how far its next step is from where it stands: 0 goes on, others jump
    moves=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0, 0, 0, 0, 1, 30, -7])), max_size=150
    ),
    stop=st.integers(1, 40),
    lag=st.sampled_from([0, 1, 1000]),
)
def test_steps_equal_a_count(
    policy: Policy,
    texts: list[list[int]],
    moves: list[tuple[int, int]],
    stop: int,
    lag: int,
) -> None:
    """Also after jumps (prefill, preemption), and with no token known but those that are needed."""
    table = DecodeTable()
    slots = [table.add() for _ in texts]
    indices = [SeparatorIndex(policy, SEPARATORS) for _ in texts]
    at = [0] * len(texts)
    for which, jump in moves:
        jumper = which % len(texts)
        at[jumper] += jump
        at = [position % 119 for position in at]
        start = np.array(at)
        for row in table.unknown(np.array(slots), start).tolist():
            known = texts[row][: max(at[row] + 1 - policy.window, at[row] + 1 - lag, 0)]
            table.look_up(slots[row], indices[row], known, at[row], at[row] + stop)
        spilled, spills = table.step(np.array(slots), start)
        for row, text in enumerate(texts):
            before, after = (len(rule.spilled(policy, text, at[row] + more)) for more in (0, 1))
            assert (spilled[row], spills[row]) == (before, after > before)
            at[row] += 1


def test_more_separators_than_a_slot_lays_out() -> None:
    policy = Policy(2, 100)
    table, index = DecodeTable(), SeparatorIndex(policy, SEPARATORS)
    slots = np.array([table.add()])
    for position in range(500):
        start = np.array([position])
        if len(table.unknown(slots, start)):
            table.look_up(0, index, [1] * position, position, 10**6)
        spilled, spills = table.step(slots, start)
        assert (spilled[0], spills[0]) == (max(0, position - 102), position >= 102)


def test_slots_grow_and_return() -> None:
    table = DecodeTable()
    slots = [table.add() for _ in range(200)]
    assert sorted(slots) == list(range(200))
    assert len(table.unknown(np.array(slots), np.zeros(200, dtype=np.int64))) == 200
    table.remove(17)
    assert table.add() == 17


def test_a_forgotten_slot_is_unknown() -> None:
    policy = Policy(0, 4)
    table, index = DecodeTable(), SeparatorIndex(policy, SEPARATORS)
    slots, start = np.array([table.add()]), np.array([9])
    table.look_up(0, index, [1] * 9, 9, 100)
    assert len(table.unknown(slots, start)) == 0
    table.forget(0)
    assert len(table.unknown(slots, start)) == 1
