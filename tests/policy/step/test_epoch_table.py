"""Positions of many requests at once equal those of each request alone."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.policy.epochs import Epochs
from vllm_sepllm.policy.separators.definition import (
    IntervalSeparators,
    Separators,
    TokenSeparators,
)
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.epoch_table import EpochTable
from vllm_sepllm.policy.visibility import Policy

SEPARATORS = TokenSeparators((1,))


@settings(max_examples=100, deadline=None)
@given(
    window=st.integers(1, 9),
    texts=st.lists(st.lists(st.integers(0, 1), min_size=120, max_size=120), min_size=1, max_size=4),
    # request, and how far its next step is from where it stands: 0 goes on, others jump
    moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 0, 0, 1, 30, -7]))),
)
def test_positions_are_those_of_each_request_alone(
    window: int, texts: list[list[int]], moves: list[tuple[int, int]]
) -> None:
    """Also after jumps (preemption, prefix hits); slots are far apart, and rows in any order."""
    policy = Policy(2, window, 3, 20)
    requests = [Epochs(SeparatorIndex(policy, SEPARATORS)) for _ in texts]
    table, at = EpochTable(), [0] * len(texts)
    for which, jump in moves:
        mover = which % len(texts)
        at[mover] = (at[mover] + jump) % 119
        rows = [(i + which) % len(texts) for i in range(len(texts))]
        slots, start = np.array(rows) * 50, np.array(at)[rows]

        known = [texts[i][: max(0, at[i] + 1 - window)] for i in rows]
        of_rows = list(zip([requests[i] for i in rows], known, strict=True))
        found = table.step(slots, start, of_rows.__getitem__)
        for row, request in enumerate(rows):
            epochs = Epochs(SeparatorIndex(policy, SEPARATORS))
            epoch = epochs.at(at[request], texts[request])
            assert found.shift[row] == epoch.shift
            begins = epoch.start == at[request] > 0
            assert (row in found.renumber) == begins
            if begins:
                wanted = epochs.renumbering(epoch)
                assert found.renumber[row].entries.tolist() == wanted.entries.tolist()
                assert found.renumber[row].delta.tolist() == wanted.delta.tolist()
        at = [(position + 1) % 119 for position in at]


@pytest.mark.parametrize("separators", [SEPARATORS, IntervalSeparators(3)])
@pytest.mark.parametrize("max_separators", [0, 2])
def test_rows_that_begin_an_epoch_are_named(separators: Separators, max_separators: int) -> None:
    """Proves that a step at a boundary turns keys, and that no other does."""
    policy = Policy(1, 3, max_separators, 12)
    token_ids = [1] * 40
    length = 4 + max_separators
    epochs = [Epochs(SeparatorIndex(policy, separators)) for _ in range(3)]
    starts = np.array([0, 12, 12 + 12 - length])
    table = EpochTable()
    planned = table.step(np.arange(3), starts, lambda row: (epochs[row], token_ids))
    assert planned.shift.tolist() == [0, 12 - length, 2 * (12 - length)]
    assert [*planned.renumber] == [1, 2]
    turned = planned.of(np.array([2, 0]))
    assert (turned.shift.tolist(), [*turned.renumber]) == ([2 * (12 - length), 0], [0])
    assert not table.step(np.arange(1), np.array([13]), lambda _: (epochs[0], token_ids)).renumber


def test_a_step_inside_of_epochs_asks_for_no_row() -> None:
    """Proves that most steps walk over no request, and that a slot's next request is asked for."""
    epochs = Epochs(SeparatorIndex(Policy(1, 3, 2, 12), SEPARATORS))
    asked: list[int] = []

    def of_row(row: int) -> tuple[Epochs, Sequence[int]]:
        asked.append(row)
        return epochs, [0] * 40

    table, slots = EpochTable(), np.arange(2)
    for start in range(12):
        table.step(slots, np.full(2, start), of_row)
    assert asked == [0, 1]
    table.forget(1)
    table.forget(1000)
    table.step(slots, np.full(2, 11), of_row)
    assert asked == [0, 1, 1]
    assert table.step(slots[:0], slots[:0], of_row).shift.tolist() == []
