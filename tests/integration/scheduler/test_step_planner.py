"""Planning all requests at once gives the plan that planning them one by one gives."""

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm_sepllm.integration.scheduler.live_requests import LiveRequest, LiveRequests
from vllm_sepllm.integration.scheduler.step_planner import StepPlanner
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.separators.index import SeparatorIndex
from vllm_sepllm.policy.step.plan import PlannedCheckpoint, StepPlan, StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy

SEPARATORS = TokenSeparators((1,))
INTERVAL = 16


def checkpoints_at(start: int, end: int) -> tuple[PlannedCheckpoint, ...]:
    """A stand-in for the manager: one at every multiple of the interval."""
    return tuple(PlannedCheckpoint(p, {}) for p in range(start + 1, end + 1) if p % INTERVAL == 0)


class Machine:
    """Requests with endless texts; tokens become known ``lag`` steps late."""

    def __init__(self, policy: Policy, lag: int, choices: dict[str, tuple[int, int]]) -> None:
        self.policy, self.lag = policy, lag
        self.choices = choices
        self.requests: dict[str, Any] = {}
        self.texts: dict[str, list[int]] = {}
        self.live = LiveRequests(SEPARATORS, policy)
        self.planner = StepPlanner(
            self.live, self.plan_checkpoints, lambda policy: INTERVAL, block_size=INTERVAL
        )

    def own(self, name: str) -> Policy:
        """The policy of a request."""
        if name not in self.choices:
            return self.policy
        initial_tokens, window = self.choices[name]
        return replace(self.policy, initial_tokens=initial_tokens, window=window)

    @staticmethod
    def plan_checkpoints(live: LiveRequest, start: int, end: int) -> tuple[PlannedCheckpoint, ...]:
        """None beyond the known tokens, as PrefixCache."""
        return checkpoints_at(start, end) if end <= len(live.request._all_token_ids) else ()

    def arrive(self, name: str, seed: int, num_prompt: int) -> None:
        gen = np.random.default_rng(seed)
        self.texts[name] = (gen.random(400) < 0.3).astype(int).tolist()
        self.requests[name] = SimpleNamespace(
            request_id=name,
            num_computed_tokens=0,
            num_prompt_tokens=num_prompt,
            _all_token_ids=self.texts[name][:num_prompt],
            block_hashes=[],
        )
        self.live.add(self.requests[name], self.own(name))

    def finish(self, name: str) -> None:
        del self.requests[name], self.texts[name]
        self.live.forget(name)

    def step(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            request = self.requests[name]
            end = request.num_computed_tokens + size
            known = max(request.num_prompt_tokens, end - self.lag)
            request._all_token_ids = self.texts[name][:known]
        output = SimpleNamespace(
            num_scheduled_tokens=sizes, total_num_scheduled_tokens=sum(sizes.values())
        )
        self.compare(pickle.loads(pickle.dumps(self.planner.plan(output))), sizes)  # type: ignore[arg-type]
        for name, size in sizes.items():
            self.requests[name].num_computed_tokens += size

    def compare(self, plan: StepPlan, sizes: dict[str, int]) -> None:
        assert sorted(plan.rows) == sorted(sizes)
        for name, size in sizes.items():
            request = self.requests[name]
            start, known = request.num_computed_tokens, request._all_token_ids
            index = SeparatorIndex(self.own(name), SEPARATORS)
            taken = checkpoints_at(start, start + size) if start + size <= len(known) else ()
            builder = StepPlanBuilder(self.policy)
            builder.add(name, index, known, start, size, taken)
            want, row = builder.build(), plan.rows[name]
            assert plan.start[row] == want.start[0]
            assert plan.num_spilled[row] == want.num_spilled[0]
            assert plan.spills[row] == want.spills[0]
            assert plan.policy.of_row(row) == self.own(name)
            assert (row in plan.listed) == (0 in want.listed)
            if row in plan.listed:
                listed, wanted = plan.listed[row], want.listed[0]
                assert listed.checkpoints == wanted.checkpoints
                assert listed.separators.tolist() == wanted.separators.tolist()


@settings(max_examples=120, deadline=None)
@given(
    policy=st.builds(
        Policy,
        initial_tokens=st.integers(0, 4),
        window=st.integers(4, 20),
        max_separators=st.sampled_from([3, None]),
    ),
    lag=st.integers(0, 3),
    choices=st.dictionaries(
        st.sampled_from(["r0", "r1", "r2"]),
        st.tuples(st.sampled_from([0, 2, 30, 300]), st.sampled_from([4, 9, 50, 900])),
    ),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["step"] * 8 + ["chunk", "skip", "preempt", "finish", "again"]),
            st.integers(0, 3),
        ),
        max_size=80,
    ),
)
def test_plans_agree(
    policy: Policy, lag: int, choices: dict[str, tuple[int, int]], actions: list[tuple[str, int]]
) -> None:
    """Whoever comes, goes, waits, is preempted or takes a finished request's name.

    Some requests have initial tokens and windows of their own.
    """
    machine = Machine(policy, lag, choices)
    for number in range(3):
        machine.arrive(f"r{number}", number, 5 + 20 * number)
    for step, (action, which) in enumerate(actions):
        name = f"r{which}"
        if action in ("finish", "again") and name in machine.requests:
            machine.finish(name)
        if action == "again" or not machine.requests:
            machine.arrive(name, 100 + step, 7)
        if action == "preempt" and name in machine.requests:
            machine.requests[name].num_computed_tokens = 0
        sizes = {}
        for other, request in machine.requests.items():
            left = request.num_prompt_tokens - request.num_computed_tokens
            size = max(1, min(left, 9))
            if action == "chunk" and other == name and left > 1:
                size = 2
            if not (action == "skip" and other == name):
                sizes[other] = size
        if sizes:
            machine.step(sizes)
