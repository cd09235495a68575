"""Positions of kept tokens against the rule spelled out, whatever the chunks."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.labelled_cache import LabelledCache
from tests.support.rule import read_positions
from tests.support.simulated_cache import SEPARATORS
from vllm_sepllm.policy.epochs import MIN_EPOCH, Epoch, Epochs, epochs_of, has_room, renumber
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.epoch_table import EpochTable
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy

# far below MIN_EPOCH, so that a short text has many epochs
policies = st.builds(
    lambda a, n, s, room: Policy(a, n, s, a + n + s + room),
    st.integers(0, 5),
    st.integers(1, 17),
    st.integers(0, 6),
    st.integers(1, 30),
)
texts = st.lists(st.integers(0, 1), min_size=1, max_size=150)
sizes = st.lists(st.sampled_from([1, 1, 1, 2, 3, 7, 16, 40]), min_size=1, max_size=150)


class PositionedCache(LabelledCache):
    """Labels are (position in the text, position in the cache)."""

    def rotated(self, label: Any, delta: int) -> Any:
        token, position = label
        return token, position + delta


def cut(epochs: Epochs, token_ids: list[int], chunks: list[int]) -> list[tuple[int, int]]:
    """The steps of a request: chunks as wished for, cut at the end of each epoch."""
    steps, start = [], 0
    for size in chunks:
        end = min(start + size, len(token_ids), epochs.at(start, token_ids).end)
        if end > start:
            steps.append((start, end))
        start = end
    return steps


@settings(max_examples=400, deadline=None)
@given(policy=policies, token_ids=texts, chunks=sizes)
def test_every_query_reads_each_key_at_its_position(
    policy: Policy, token_ids: list[int], chunks: list[int]
) -> None:
    """Proves that rotations and shifts give the rule's positions, whatever the chunks."""
    index, cache = SeparatorIndex(policy, SEPARATORS), PositionedCache()
    epochs, table = Epochs(index), EpochTable()
    want = list(read_positions(policy, token_ids, len(token_ids)))
    for start, end in cut(epochs, token_ids, chunks):
        builder = StepPlanBuilder(policy)
        # an asynchronous scheduler does not know the newest tokens of a decode step
        known = token_ids[: end if end - start > 1 else max(0, end - policy.window)]
        builder.add("request", index, known, start, end - start)
        positions = table.step(np.array([0]), np.array([start]), [(epochs, known)].__getitem__)
        rows = replace(builder.build(), positions=positions).of(np.arange(1), 0)
        assert rows.positions is not None
        step = plan_batch(rows, np.array([0, end - start]), end - start, 16)
        shift = int(rows.positions.shift[0])
        labels = [(i, i - shift) for i in range(start, end)]
        reads = cache.play(step, labels, lambda row, entry: entry)
        for query, read in zip(range(start, end), reads, strict=True):
            assert sorted(read) == sorted(want[query].items())


@given(policy=policies, token_ids=texts, other=texts, data=st.data())
def test_epochs_of_equal_prefixes_agree(
    policy: Policy, token_ids: list[int], other: list[int], data: st.DataObject
) -> None:
    """Proves that what follows a prefix changes no epoch that begins in it."""
    num_shared = data.draw(st.integers(0, len(token_ids)))
    texts = token_ids, token_ids[:num_shared] + other
    one, two = (Epochs(SeparatorIndex(policy, SEPARATORS)) for _ in texts)
    for position in range(num_shared):
        assert one.at(position, texts[0]) == two.at(position, texts[1])


@given(policy=policies, token_ids=texts, positions=st.lists(st.integers(0, 149), min_size=1))
def test_epochs_do_not_depend_on_the_order_in_which_they_are_asked_for(
    policy: Policy, token_ids: list[int], positions: list[int]
) -> None:
    epochs = Epochs(SeparatorIndex(policy, SEPARATORS))
    for position in (p for p in positions if p < len(token_ids)):
        found = epochs.at(position, token_ids)
        assert found.start <= position < found.end
        assert found in epochs_of(policy, np.array(token_ids, dtype=bool))
        assert found == Epochs(SeparatorIndex(policy, SEPARATORS)).at(position, token_ids)


@given(policy=policies, token_ids=texts, other=texts, data=st.data())
def test_a_truncated_request_has_the_epochs_of_its_new_tokens(
    policy: Policy, token_ids: list[int], other: list[int], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(token_ids)))
    index = SeparatorIndex(policy, SEPARATORS)
    epochs = Epochs(index)
    epochs.at(len(token_ids) - 1, token_ids)
    index.truncate(kept)
    epochs.truncate(kept)
    text = token_ids[:kept] + other
    fresh = Epochs(SeparatorIndex(policy, SEPARATORS))
    for position in range(len(text)):
        assert epochs.at(position, text) == fresh.at(position, text)


def test_the_epochs_of_a_text_by_hand() -> None:
    """a = 1, n = 3, s = 2, L = 8; separators are marked by 1."""
    policy = Policy(1, 3, 2, 8)
    #            0  1  2  3  4  5  6  7  8  9 10 11
    token_ids = [0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0]
    index = SeparatorIndex(policy, SEPARATORS)
    epochs = Epochs(index)
    assert epochs.at(7, token_ids) == Epoch(0, 8, 0, 0)
    # after 8 tokens: 0 | 3 4 | 5 6 7 at positions 0 to 5, so token 8 is at 6 and token 9 at 7
    second = epochs.at(8, token_ids)
    assert second == Epoch(8, 10, 2, 3)
    moved = epochs.renumbering(second)
    # the ring, then separators 1 and 2 of those that left (3 and 4), in the tail at 4 + 1, 4 + 0
    assert moved.entries.tolist() == [1, 2, 3, 5, 4]
    assert moved.delta.tolist() == [-2, -2, -2, 1 - 3, 2 - 4]
    # after 10 tokens: 0 | 3 4 | 7 8 9: the tail stays, the window moves from 5, 6, 7 to 3, 4, 5
    third = epochs.at(10, token_ids)
    assert third == Epoch(10, 12, 4, 3)
    assert epochs.renumbering(third).entries.tolist() == [1, 2, 3]
    assert epochs.renumbering(third).delta.tolist() == [-2, -2, -2]


@given(policy=policies, part=texts)
def test_positions_only_fall_and_stay_below_the_trained_length(
    policy: Policy, part: list[int]
) -> None:
    """Proves that a table of L rotations has every one that is made."""
    assert policy.max_position is not None
    token_ids = (part * 200)[:200]
    index = SeparatorIndex(policy, SEPARATORS)
    epochs = Epochs(index)
    last = epochs.at(0, token_ids)
    while last.end < len(token_ids):
        new = epochs.at(last.end, token_ids)
        separators = index.positions(last.num_spilled, new.num_spilled)
        delta = renumber(policy, last, new, separators).delta
        assert ((delta < 0) & (delta > -policy.max_position)).all()
        last = new


def test_room_for_an_epoch_is_an_inequality() -> None:
    least = 4 + 60 + 32 + MIN_EPOCH
    assert has_room(Policy(4, 60, 32, least))
    assert not has_room(Policy(4, 60, 32, least - 1))
    assert not has_room(Policy(4, 60, None, 10_000)), "an unbounded tail outgrows every length"
