"""Host memory under an instance with a step in flight, driven at random.

The worker has labels instead of KV (tests/support/instances.py): every read is compared with the
rule, and all that could be read (findable.py), every answer with the text that the model makes of
its prompt. test_machine.py has KV events and several groups of layers, and answers its steps at
once.
"""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.instances import Instance, answer_to
from tests.support.leftovers import mentioned
from tests.support.schedulers import Setting, random_tokens, write_model

POLICY = (
    *(("initial_tokens", 3), ("window", 50), ("max_separators", 60), ("checkpoint_interval", 96)),
)
RENUMBERED = (
    *(("initial_tokens", 3), ("window", 33), ("max_separators", 20), ("checkpoint_interval", 96)),
    *(("positions", "renumbered"), ("max_position", 120)),
)
OWN: list[dict[str, Any]] = [{}, {}, {}, {"sepllm_window": 28}, {"sepllm_initial_tokens": 40}]
TEXTS = [random_tokens(random.Random(seed), 200) for seed in range(4)]


class HostMachine(RuleBasedStateMachine):
    """Few texts, and a pool that has forgotten one when it comes again."""

    model: Path

    @initialize(
        is_renumbered=st.booleans(),
        kind=st.sampled_from(["async", "async", "sync"]),
        num_blocks=st.sampled_from([14, 20, 40]),
        host_blocks=st.sampled_from([3, 12, 100]),
        watermark=st.sampled_from([0, 0, 0.3]),
    )
    def start(
        self, is_renumbered: bool, kind: str, num_blocks: int, host_blocks: int, watermark: float
    ) -> None:
        policy = RENUMBERED if is_renumbered else POLICY
        self.own = [{}] if is_renumbered else OWN
        self.instance = Instance(
            Setting(
                *(self.model, kind, num_blocks),
                policy=policy,
                host_blocks=host_blocks,
                watermark=watermark,
            )
        )
        host = self.instance.scheduler._prefix_cache.host
        assert host is not None
        self.host = host
        self.asked: dict[str, tuple[list[int], int]] = {}
        self.aborted: set[str] = set()

    @rule(
        text=st.integers(0, 3),
        num_shared=st.integers(0, 180),
        num_own=st.integers(1, 20),
        own=st.integers(0, 9),
        max_tokens=st.sampled_from([1, 6, 40]),
        num_turns=st.integers(0, 12),
    )
    def ask(
        self, text: int, num_shared: int, num_own: int, own: int, max_tokens: int, num_turns: int
    ) -> None:
        name = f"request-{len(self.asked)}"
        prompt = TEXTS[text][:num_shared] + random_tokens(random.Random(num_own), num_own)
        self.asked[name] = prompt, max_tokens
        self.instance.arrive(name, prompt, max_tokens, **self.own[own % len(self.own)])
        self.turn(num_turns, runs_early=False)

    @rule(num_turns=st.integers(1, 20), runs_early=st.booleans())
    def turn(self, num_turns: int, runs_early: bool) -> None:
        """The instance launches or answers a step; one that is launched may run before."""
        for _ in range(num_turns):
            if self.instance.may_launch:
                self.instance.launch()
            else:
                self.instance.answer()
            if runs_early:
                self.instance.run()

    @precondition(lambda self: self.instance.scheduler.requests)
    @rule(which=st.integers(0, 9))
    def abort(self, which: int) -> None:
        names = list(self.instance.scheduler.requests)
        self.aborted.add(names[which % len(names)])
        self.instance.abort(names[which % len(names)])

    @precondition(lambda self: len(self.asked) % 5 == 4)
    @rule(is_forced=st.booleans())
    def reset(self, is_forced: bool) -> None:
        """Of the prefix cache: if no block is in use, or all requests begin anew."""
        self.instance.scheduler.reset_prefix_cache(reset_running_requests=is_forced)

    @invariant()
    def blocks_and_slots_are_counted_right(self) -> None:
        if not hasattr(self, "instance"):
            return
        self.instance.check_blocks()
        saved = {slot for each in self.host._saved.values() for slot in each.all_slots}
        assert sorted([*saved, *self.host._free]) == list(range(self.host._num_slots))
        usage = sum(self.host.usage().values())
        assert usage == pytest.approx(len(saved) / self.host._num_slots), "of the metrics"

    def teardown(self) -> None:
        """All requests end, and nothing stays of them but what the cache may find."""
        if not hasattr(self, "instance"):
            return
        num_steps = 0
        while not self.instance.is_empty:
            if self.instance.may_launch and self.instance.scheduler.has_requests():
                self.instance.launch()
            self.instance.answer()
            num_steps += 1
            assert num_steps < 1000, "blocks are held, or requests wait for ever"
        for name, (prompt, max_tokens) in self.asked.items():
            if name not in self.aborted:
                assert self.instance.tokens[name] == answer_to(prompt, max_tokens)
        self.instance.step()  # what has ended is told to the workers once
        self.blocks_and_slots_are_counted_right()
        assert not mentioned(self.instance.scheduler, self.asked.keys())


def run_long(seed: int) -> int:
    """Far denser traffic than hypothesis makes; returns how many blocks came back."""
    pick = random.Random(seed)
    machine = HostMachine()
    machine.start(
        is_renumbered=pick.random() < 0.3,
        kind="async",
        num_blocks=pick.choice([8, 10, 14]),
        host_blocks=pick.choice([6, 20, 20, 100]),
        watermark=pick.choice([0, 0, 0.3]),
    )
    for _ in range(300):
        chance = pick.random()
        num_alive = len(machine.instance.scheduler.requests)
        if num_alive < 3 and chance < 0.5:
            machine.ask(
                text=pick.randrange(4),
                num_shared=pick.choice([0, 20, 40, 60, 100, 130, 180]),
                num_own=pick.randrange(1, 20),
                own=pick.randrange(10),
                max_tokens=pick.choice([1, 6, 40]),
                num_turns=0,
            )
        elif chance < 0.52 and num_alive:
            machine.abort(pick.randrange(9))
        elif chance < 0.525:
            machine.reset(is_forced=pick.random() < 0.5)
        else:
            machine.turn(pick.randrange(1, 4), runs_early=pick.random() < 0.3)
        machine.blocks_and_slots_are_counted_right()
    machine.teardown()
    return machine.instance.worker.num_loaded


def test_long_runs() -> None:
    assert sum(map(run_long, range(2))) > 10, "blocks came back from host memory"


@pytest.fixture(scope="module", autouse=True)
def _model(tmp_path_factory: pytest.TempPathFactory) -> None:
    HostMachine.model = write_model(tmp_path_factory.mktemp("model"))


TestHostMemory = HostMachine.TestCase
# pytest --hypothesis-profile=long makes it many
TestHostMemory.settings = settings(
    max_examples=settings.default.max_examples // 20, stateful_step_count=40, deadline=None
)
