"""A batch of requests without tensors: caches of positions, driven by plan and plan_batch.

Prefill chunks, single tokens and drafts that turn out right or wrong share a batch. After every
step a cache holds the rule's visible set, and nothing that is still read was overwritten.
"""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.labelled_cache import LabelledCache
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step import staging
from vllm_sepllm.policy.step.batch import plan_batch
from vllm_sepllm.policy.step.plan import PlannedCheckpoint, StepPlanBuilder
from vllm_sepllm.policy.step.staging import Staged, propose
from vllm_sepllm.policy.visibility import Policy, visible_mask

SEPARATORS = TokenSeparators((1,))  # token id 1 is the separator
MAX_DRAFTS = 2
MAX_PROPOSED = 1 + MAX_DRAFTS
BLOCK_SIZE = 4

policies = st.builds(
    Policy,
    initial_tokens=st.integers(0, 5),
    window=st.integers(2 * MAX_PROPOSED, 13),
    max_separators=st.none() | st.integers(0, 5),
)


@dataclass
class Request:
    """One request: its tokens, and how far they are computed."""

    name: str
    policy: Policy
    token_ids: list[int]
    num_tokens: int = 0
    last: Staged | None = None

    def __post_init__(self) -> None:
        self.index = SeparatorIndex(self.policy, SEPARATORS)
        self.mask = visible_mask(self.policy, np.array(self.token_ids, dtype=bool))


@dataclass
class Action:
    """What a request does in a step: so many certain tokens, or drafts of which some are right."""

    num_new: int
    num_drafts: int = 0
    num_right: int = 0


def run(
    cache: LabelledCache,
    requests: list[Request],
    actions: list[Action],
    checkpoints: dict[str, PlannedCheckpoint],
) -> None:
    """One step. Each query reads what the rule shows it, the drafts behind a wrong one aside."""
    engine = requests[0].policy
    plan = StepPlanBuilder(engine)
    for request, action in zip(requests, actions, strict=True):
        start, known = request.num_tokens, request.token_ids[: request.num_tokens + 1]
        request.index.extend(request.token_ids, layout.num_left_window(request.policy, start))
        if action.num_drafts or action.num_new == 1:
            commit, staged = propose(
                request.index, request.last, start, action.num_drafts, MAX_PROPOSED
            )
            request.last = staged
            if request.name in checkpoints:
                assert commit is None
                plan.add(request.name, request.index, known, start, 1, (checkpoints[request.name],))
            else:
                plan.add_proposing(request.name, request.index, known, start, commit, staged)
        else:
            assert request.last is None, "a prefill follows no drafts"
            chosen = (checkpoints[request.name],) if request.name in checkpoints else ()
            end = start + action.num_new
            plan.add(request.name, request.index, request.token_ids, start, end - start, chosen)
    sizes = [action.num_drafts + action.num_new for action in actions]
    first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    rows = plan.build().of(np.arange(len(requests)), 0)
    padding = 3
    step = plan_batch(rows, first, int(first[-1]) + padding, BLOCK_SIZE)
    labels = [
        position if position < request.num_tokens + action.num_new + action.num_right else "wrong"
        for request, action, size in zip(requests, actions, sizes, strict=True)
        for position in range(request.num_tokens, request.num_tokens + size)
    ]
    reads = cache.play(step, labels, lambda row, entry: (requests[row].name, entry))
    for row, request in enumerate(requests):
        for token in range(int(first[row]), int(first[row + 1])):
            if labels[token] != "wrong":
                visible = np.flatnonzero(request.mask[labels[token]])
                assert sorted(reads[token]) == visible.tolist()
    for request, action in zip(requests, actions, strict=True):
        request.num_tokens += action.num_new + action.num_right


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Policy], list[list[int]], list[list[Action]]]:
    """Requests with the engine's policy or a and n of their own, the longest never full."""
    policy = draw(policies)
    tokens = draw(
        st.lists(st.lists(st.integers(0, 1), min_size=8, max_size=60), min_size=1, max_size=3)
    )
    windows = st.sampled_from([policy.window, 2 * MAX_PROPOSED, 9, 17, 100])
    initial = st.sampled_from([policy.initial_tokens, 0, 9, 25])
    own = [replace(policy, window=draw(windows), initial_tokens=draw(initial)) for _ in tokens]
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        row = []
        for _ in tokens:
            drafts = draw(st.integers(0, MAX_DRAFTS))
            row.append(Action(1, drafts, draw(st.integers(0, drafts))))
        steps.append(row)
    return own, tokens, steps


@settings(max_examples=300, deadline=None)
@given(batches(), st.lists(st.integers(1, 20), min_size=3, max_size=3))
def test_drafts_never_overwrite_what_is_read(
    batch: tuple[list[Policy], list[list[int]], list[list[Action]]], prompts: list[int]
) -> None:
    """Prompts first, then steps in which rows with drafts and single tokens are mixed."""
    own, tokens, steps = batch
    cache = LabelledCache()
    requests = [Request(str(i), own[i], ids) for i, ids in enumerate(tokens)]
    starts = [min(p, len(r.token_ids) - 1) for p, r in zip(prompts, requests, strict=False)]
    order = sorted(range(len(requests)), key=lambda i: starts[i])
    requests = [requests[i] for i in order]
    run(cache, requests, [Action(starts[i]) for i in order], {})
    for step in steps:
        if any(r.num_tokens + MAX_PROPOSED > len(r.token_ids) for r in requests):
            break
        pairs = sorted(zip(step, requests, strict=False), key=lambda p: -p[0].num_drafts)
        run(cache, [r for _, r in pairs], [a for a, _ in pairs], {})
    if all(r.num_tokens < len(r.token_ids) for r in requests):  # commit what the last proposed
        run(cache, requests, [Action(1) for _ in requests], {})


@settings(max_examples=200, deadline=None)
@given(
    policies,
    st.lists(st.integers(0, 1), min_size=45, max_size=60),
    st.integers(0, 25),
    st.sampled_from([1, 2, 9, 20]),
    st.integers(1, 20),
)
def test_checkpoints_hold_the_state_at_their_position(
    policy: Policy, token_ids: list[int], start: int, num_new: int, offset: int
) -> None:
    """All blocks are the checkpoint's own, so its slots must hold the whole visible set."""
    cache, request = LabelledCache(), Request("only", policy, token_ids)
    if start:
        run(cache, [request], [Action(start)], {})
    position = start + min(offset, num_new)
    request.index.extend(token_ids, position)
    spilled = request.index.count_below(layout.num_left_window(policy, position))
    length = layout.compact_length(policy, position, spilled)
    blocks = {i: 10 + 3 * i for i in range(-(-length // BLOCK_SIZE))}
    checkpoint = PlannedCheckpoint(position, {0: blocks})
    run(cache, [request], [Action(num_new)], {"only": checkpoint})
    slots = (blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length))
    held = [cache.memory[slot] for slot in slots]
    assert sorted(held) == np.flatnonzero(request.mask[position - 1]).tolist()


def test_staging_lies_behind_what_the_next_commit_may_fill() -> None:
    """Literal numbers: 3 initial tokens, window 8, two drafts."""
    policy = Policy(3, 8)
    index = SeparatorIndex(policy, SEPARATORS)
    index.extend([0] * 4 + [1] + [0] * 20, 20)
    commit, staged = propose(index, None, 20, 2, 3)
    assert commit is None
    assert staged == Staged(20, 3 + 8 + 1 + 3)
    commit, staged = propose(index, staged, 22, 0, 3)
    assert staged is None
    assert commit is not None
    plan = StepPlanBuilder(policy)
    plan.add_proposing("only", index, [0] * 23, 22, commit, staged)
    step = plan_batch(plan.build().of(np.arange(1), 0), np.array([0, 1]), 1, BLOCK_SIZE)
    assert step.commits.source.tolist() == [15, 16]
    assert step.commits.target.tolist() == [3 + (20 - 3) % 8, 3 + (21 - 3) % 8]
    assert step.commit_spills.source.tolist() == []
    assert staging.num_entries(3) == 6


def test_a_prompt_of_one_token_may_come_behind_a_chunk() -> None:
    """Model Runner V1 does not sort new prompts among each other."""
    policy = Policy(2, 6)
    requests = [Request("long", policy, [0, 1] * 20), Request("short", policy, [1] * 9)]
    cache = LabelledCache()
    run(cache, requests[:1], [Action(20)], {})
    run(cache, requests, [Action(7), Action(1)], {})
    run(cache, requests, [Action(1), Action(1)], {})


def test_blocks_of_a_checkpoint_are_the_schedulers() -> None:
    """Slots are the same numbers whatever smaller blocks the kernels see."""
    policy = Policy(2, 6)
    request = Request("only", policy, [0] * 20)
    plan = StepPlanBuilder(policy)
    checkpoint = PlannedCheckpoint(10, {0: {0: 10}})
    plan.add("only", request.index, request.token_ids, 0, 12, (checkpoint,))
    rows = plan.build().of(np.arange(1), 0)
    step = plan_batch(rows, np.array([0, 12]), 12, 8)
    assert sorted(step.token_saves.slots.tolist()) == list(range(80, 88))
