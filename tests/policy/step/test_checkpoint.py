"""A checkpoint holds exactly the state of a request that stopped at its position."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.simulated_cache import Cache, policies
from vllm_sepllm.policy.step import checkpoint, prefill
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy


def chunk_of(cache: Cache, num_new_tokens: int) -> prefill.Chunk:
    builder = StepPlanBuilder(cache.policy)
    builder.add("r", cache.index, cache.token_ids, cache.num_tokens, num_new_tokens)
    plan = builder.build()
    end = cache.num_tokens + num_new_tokens
    return prefill.Chunk(
        cache.policy, cache.num_tokens, end, int(plan.num_spilled[0]), plan.listed[0].separators
    )


@settings(max_examples=300, deadline=None)
@given(
    policy=policies,
    token_ids=st.lists(st.integers(0, 1), min_size=2, max_size=90),
    block_size=st.sampled_from([1, 4, 7]),
    may_wrap=st.booleans(),
    data=st.data(),
)
def test_checkpoint_and_shared_blocks_are_the_state_at_the_position(
    policy: Policy,
    token_ids: list[int],
    block_size: int,
    may_wrap: bool,
    data: st.DataObject,
) -> None:
    start = data.draw(st.integers(0, len(token_ids) - 2))
    end = data.draw(st.integers(start + 2, len(token_ids)))
    position = data.draw(st.integers(start + 1, end))
    cache, want = Cache(policy, token_ids), Cache(policy, token_ids)
    for part, stop in ((cache, start), (want, position)):
        while part.num_tokens < stop:
            part.step(min(5, stop - part.num_tokens), 128)

    chunk = chunk_of(cache, end - start)
    spilled = want.index.count_below(max(policy.initial_tokens, position - policy.window))
    # a tail that wraps within the step is rewritten under the checkpoint's shared blocks
    limit = policy.max_separators
    may_wrap = may_wrap or (limit is not None and chunk.num_spilled_after > limit)
    own = checkpoint.written_blocks(policy, block_size, position, spilled, may_wrap=may_wrap)
    parts = checkpoint.checkpoint_parts(chunk, position, block_size, own)
    got = {
        int(t): cache.entries[int(s)]
        for s, t in zip(parts.copy_source, parts.copy_target, strict=True)
    }
    got |= {int(t): start + int(k) for k, t in zip(parts.tokens, parts.target, strict=True)}

    cache.step(end - start, 128)
    shared = [i for i in want.entries if i // block_size not in own]
    got |= {i: cache.entries[i] for i in shared}
    assert got == want.entries


@given(policies, st.integers(0, 80), st.integers(0, 40), st.sampled_from([1, 4, 7]))
def test_blocks_that_are_not_written_are_full_and_outside_the_ring(
    policy: Policy, num_tokens: int, num_spilled: int, block_size: int
) -> None:
    """Before it: initial tokens alone; behind it: separators, unless they go round as well."""
    num_spilled = min(num_spilled, max(0, num_tokens - policy.num_dense))
    own = checkpoint.written_blocks(policy, block_size, num_tokens, num_spilled, may_wrap=False)
    length = checkpoint.layout.compact_length(policy, num_tokens, num_spilled)
    for i in range(-(-length // block_size)):
        entries = range(i * block_size, (i + 1) * block_size)
        is_initial = entries.stop <= policy.initial_tokens
        is_tail = entries.start >= policy.num_dense
        assert (i in own) is not ((is_initial or is_tail) and entries.stop <= length)
    goes_round = checkpoint.written_blocks(
        policy, block_size, num_tokens, num_spilled, may_wrap=True
    )
    initial = range(min(policy.initial_tokens, length) // block_size)
    assert goes_round == [i for i in range(-(-length // block_size)) if i not in initial]


@given(policies, st.integers(0, 60), st.integers(1, 40), st.sampled_from([1, 4, 7]))
def test_overwritten_blocks_are_those_whose_entries_change(
    policy: Policy, start: int, size: int, block_size: int
) -> None:
    """Entries are compared by the position they hold, before and after the step."""
    cache = Cache(policy, [0] * (start + size))
    while cache.num_tokens < start:
        cache.step(min(5, start - cache.num_tokens), 128)
    before = dict(cache.entries)
    cache.step(size, 128)
    changed = {i // block_size for i, held in before.items() if cache.entries[i] != held}
    found = checkpoint.overwritten_blocks(policy, block_size, start, start + size)
    assert changed <= set(found)
    filled = {i // block_size for i in cache.entries if i not in before}
    assert set(found) - changed <= filled


def test_positions_are_the_multiples_and_the_wanted() -> None:
    def positions(start: int, end: int, *wanted: int) -> list[int]:
        return checkpoint.checkpoint_positions(start, end, interval=100, wanted=wanted)

    assert positions(0, 250, 64, 200, 260) == [64, 100, 200]
    assert positions(100, 199) == []
    assert positions(100, 200) == [200]
    assert positions(99, 100, 100) == [100]


def test_one_position_in_each_stretch() -> None:
    """Stretches are (0, 10], (10, 20] and so on: their ends are where others begin."""
    assert checkpoint.first_of_each([], 10) == []
    assert checkpoint.first_of_each([3, 9, 10, 11, 20, 21, 45, 46], 10) == [3, 11, 21, 45]


def test_nothing_is_numbered_twice() -> None:
    chunk = prefill.Chunk(Policy(1, 4), 0, 20, 0, np.array([3, 9, 12]))
    parts = checkpoint.checkpoint_parts(chunk, 15, 4, [0, 1])
    targets = np.concatenate([parts.copy_target, parts.target])
    assert len(set(targets.tolist())) == len(targets) == 7
