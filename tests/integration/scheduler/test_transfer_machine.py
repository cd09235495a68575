"""A prefill and a decode instance, driven at random, with a step of each in flight.

Workers have labels instead of KV (tests/support/instances.py): every read is compared with the
rule, and all that could be read (findable.py), every answer with the text that the model makes of
its prompt.
"""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.instances import Instance, Read, answer_to
from tests.support.leftovers import mentioned
from tests.support.schedulers import Setting, random_tokens, write_model

# ends a protected prefix; no separator, and in no answer
PROTECT = 101
POLICY = (
    *(("initial_tokens", 3), ("window", 50), ("max_separators", 60), ("checkpoint_interval", 96)),
    *(("protect", PROTECT), ("max_protected", 60)),
)
RENUMBERED = (
    *(("initial_tokens", 3), ("window", 33), ("max_separators", 20), ("checkpoint_interval", 96)),
    *(("positions", "renumbered"), ("max_position", 120)),
)
LAYERS: dict[str, dict[str, Any]] = {
    "alone": {"policy": POLICY},
    "full": {"policy": POLICY, "with_full": True},
    "sliding": {"policy": POLICY, "with_sliding": True},
    "renumbered": {"policy": RENUMBERED},
}
OWN: list[dict[str, Any]] = [
    *[{}, {}, {}, {"sepllm_window": 16}, {"sepllm_window": 28}],
    *[{"sepllm_initial_tokens": 40}, {"sepllm": False}],
]
TEXTS = [random_tokens(random.Random(seed), 200) for seed in range(2)]


class TransferMachine(RuleBasedStateMachine):
    """Requests come, are prefilled and decoded, lose their state, their client or an instance."""

    model: Path

    @initialize(
        layers=st.sampled_from(sorted(LAYERS)),
        kind=st.sampled_from(["async", "async", "async", "sync"]),
        num_blocks=st.sampled_from([10, 16, 40]),
        failures=st.sampled_from(["recompute", "recompute", "fail"]),
    )
    def start(self, layers: str, kind: str, num_blocks: int, failures: Any) -> None:
        num_blocks *= 1 + (layers in ("full", "sliding"))
        self.setting = Setting(
            self.model, kind, num_blocks, load_failures=failures, **LAYERS[layers]
        )
        self.layers, self.failures = layers, failures
        self.prefiller, self.decoder = Instance(self.setting), Instance(self.setting)
        self.counter = 0
        self.asked: dict[str, tuple[list[int], int, dict[str, Any]]] = {}
        self.holders: dict[str, Instance] = {}
        # requests of which an answer has come, or none will come, and those that may fail
        self.answered: set[str] = set()
        self.given_up: set[str] = set()
        self.may_fail: set[str] = set()
        self.num_deaths = 0

    @rule(
        text=st.integers(0, 1),
        num_shared=st.integers(0, 180),
        num_own=st.integers(1, 20),
        is_protected=st.booleans(),
        own=st.sampled_from(OWN),
        salt=st.sampled_from([None, None, "tenant"]),
        max_tokens=st.sampled_from([1, 6, 40]),
        is_prefilled=st.sampled_from([True, True, True, False]),
        follows=st.none() | st.integers(0, 9),
    )
    def ask(
        self,
        text: int,
        num_shared: int,
        num_own: int,
        is_protected: bool,
        own: dict[str, Any],
        salt: str | None,
        max_tokens: int,
        is_prefilled: bool,
        follows: int | None,
    ) -> None:
        """A client asks the proxy, which asks the prefill instance first, or does not.

        It goes on from a prompt of before, or begins like others.
        """
        self.counter += 1
        name = f"request-{self.counter}"
        news = random_tokens(random.Random(self.counter), num_own)
        if follows is not None and self.asked:
            before, _, extra = [*self.asked.values()][-1 - follows % len(self.asked)]
            prompt = before[:180] + news  # full attention needs no more than the smallest pool
        else:
            prompt = TEXTS[text][:num_shared] + news
            if self.layers == "renumbered":
                own = {}
            elif is_protected:
                prompt[25:26] = [PROTECT]
            extra = {**own, "salt": salt}
        self.asked[name] = prompt, max_tokens, extra
        if is_prefilled:
            params = {"do_remote_decode": True, "do_remote_prefill": False}
            self.prefiller.arrive(name, prompt, 1, kv_transfer_params=params, **extra)
        else:
            self.decoder.arrive(name, prompt, max_tokens, **extra)

    @rule(turns=st.text("PDpd", min_size=1, max_size=8))
    def turn(self, turns: str) -> None:
        """Instances go on: capitals launch or answer a step, the others run one."""
        for who in turns:
            instance = self.prefiller if who in "Pp" else self.decoder
            if who in "pd":
                instance.run()
            elif instance.may_launch:
                instance.launch()
            else:
                instance.answer()
                self.hand_on()

    def hand_on(self) -> None:
        """What the proxy does with the answers of the prefill instance."""
        for name, params in self.prefiller.params.items():
            prompt, max_tokens, extra = self.asked[name]
            self.holders[name] = self.prefiller
            self.decoder.arrive(name, prompt, max_tokens, kv_transfer_params=params, **extra)
        self.prefiller.params.clear()
        while self.decoder.unread:
            self.was_read(self.decoder.unread.pop())

    def was_read(self, name: str) -> None:
        self.holders.pop(name).was_read(name)

    @precondition(lambda self: self.decoder.reads)
    @rule(which=st.integers(0, 9), num_blocks=st.integers(1, 4))
    def receive(self, which: int, num_blocks: int) -> None:
        """A part of a state arrives."""
        read = self.decoder.reads[which % len(self.decoder.reads)]
        holder = self.holders[read.source]
        if holder is self.prefiller:
            self.decoder.receive(read, holder, num_blocks)

    @precondition(lambda self: self.decoder.reads)
    @rule(which=st.integers(0, 9), is_lost=st.booleans(), by_block=st.booleans())
    def end_read(self, which: int, is_lost: bool, by_block: bool) -> None:
        """The rest of a state arrives, or never will."""
        read = self.decoder.reads.pop(which % len(self.decoder.reads))
        self.end(read, is_lost=is_lost, by_block=by_block)

    def end(self, read: Read, *, is_lost: bool, by_block: bool = False) -> None:
        holder = self.holders[read.source]
        if is_lost or holder is not self.prefiller:
            self.may_fail.add(read.name)
            # with several kinds of layers vLLM takes requests only
            self.decoder.is_lost(read, by_block=by_block and self.layers in ("alone", "renumbered"))
        else:
            self.decoder.arrives(read, holder)
        self.was_read(read.source)

    @precondition(lambda self: self.prefiller.scheduler.requests | self.decoder.scheduler.requests)
    @rule(which=st.integers(0, 99), knows_both=st.booleans(), reads=st.booleans())
    def abort(self, which: int, knows_both: bool, reads: bool) -> None:
        """A client goes, of a request whose state is on its way if there is one and ``reads``; the
        proxy may tell the instance it is waiting for, or both.
        """
        requests = self.prefiller.scheduler.requests | self.decoder.scheduler.requests
        names = [read.name for read in self.decoder.reads if reads] or list(requests)
        name = names[which % len(names)]
        if name in self.decoder.scheduler.requests:
            self.decoder.abort(name)
            self.given_up.add(name)
        if name in self.prefiller.scheduler.requests and (knows_both or name not in self.holders):
            self.prefiller.abort(name)
            self.given_up.add(name)

    @rule(of_both=st.booleans())
    def reset(self, of_both: bool) -> None:
        """Of the prefix cache, if no block is in use."""
        for instance in (self.decoder, self.prefiller)[: 1 + of_both]:
            instance.scheduler.reset_prefix_cache()

    @precondition(lambda self: self.num_deaths < 2 and len(self.asked) > 2)
    @rule(is_prefiller=st.booleans())
    def die(self, is_prefiller: bool) -> None:
        """An instance ends at once, with all that it was doing, and a new one takes its place."""
        self.num_deaths += 1
        if is_prefiller:
            # the proxy asks the decode instance instead; states that are being read are lost
            orphans = self.prefiller.tokens.keys() - self.prefiller.ended - self.given_up
            self.prefiller = Instance(self.setting)
            for name in sorted(orphans):
                prompt, max_tokens, extra = self.asked[name]
                self.decoder.arrive(name, prompt, max_tokens, **extra)
            return
        self.check_answers()
        self.given_up |= self.decoder.tokens.keys()
        self.decoder = Instance(self.setting)
        for name in list(self.holders):  # the prefill instance waits, and then no longer
            self.was_read(name)

    def check_answers(self) -> None:
        """Of the decode instance: one of a single instance, or an error where that may be."""
        for name in self.decoder.ended:
            prompt, max_tokens, _ = self.asked[name]
            assert self.decoder.tokens[name] == answer_to(prompt, max_tokens)
        assert self.decoder.errors <= (self.may_fail if self.failures == "fail" else set())
        self.answered |= self.decoder.ended | self.decoder.errors

    @invariant()
    def blocks_are_counted_right(self) -> None:
        if hasattr(self, "decoder"):
            self.prefiller.check_blocks()
            self.decoder.check_blocks()

    def teardown(self) -> None:
        """All arrives in the end, and nothing stays."""
        if not hasattr(self, "decoder"):
            return
        num_steps = 0
        while not (self.decoder.is_empty and self.prefiller.is_empty):
            for instance in (self.prefiller, self.decoder):
                if instance.may_launch and instance.scheduler.has_requests():
                    instance.launch()
                if instance.in_flight:
                    instance.answer()
            self.hand_on()
            for read in self.decoder.reads:
                self.end(read, is_lost=False)
            self.decoder.reads.clear()
            num_steps += 1
            assert num_steps < 500, "blocks are held, or requests wait for ever"
        self.check_answers()
        assert self.asked.keys() <= self.answered | self.given_up
        for instance in (self.prefiller, self.decoder):
            for _ in range(2):  # what has ended is told to the workers once
                instance.step()
            assert not mentioned(instance.scheduler, self.asked.keys())


def run_long(seed: int) -> int:
    """Far denser traffic than hypothesis makes, in pools that are always full.

    Returns how many states have arrived.
    """
    pick = random.Random(seed)
    machine = TransferMachine()
    layers = pick.choice(["alone", "alone", *sorted(LAYERS)])
    failures = pick.choice(["recompute", "recompute", "fail"])
    machine.start(layers, "async", pick.choice([8, 8, 10, 12]), failures)
    num_arrived = 0
    for _ in range(300):
        chance, which = pick.random(), pick.randrange(100)
        num_alive = sum(len(i.scheduler.requests) for i in (machine.prefiller, machine.decoder))
        if num_alive < 6 and chance < 0.3:
            machine.ask(
                text=pick.randrange(2),
                num_shared=pick.choice([0, 20, 40, 60, 100, 130, 180]),
                num_own=pick.randrange(1, 20),
                is_protected=pick.random() < 0.2,
                own=pick.choice(OWN),
                salt=pick.choice([None, None, None, "tenant"]),
                max_tokens=pick.choice([1, 6, 20]),
                is_prefilled=pick.random() < 0.7,
                follows=pick.choice([None, None, 0, 1, 4]),
            )
        elif machine.decoder.reads and chance < 0.5:
            if chance < 0.35:
                machine.receive(which, pick.randrange(1, 5))
            else:
                is_lost = pick.random() < 0.3
                machine.end_read(which, is_lost, by_block=pick.random() < 0.5)
                num_arrived += not is_lost
        elif chance < 0.54 and num_alive:
            machine.abort(which, knows_both=pick.random() < 0.5, reads=pick.random() < 0.7)
        elif chance < 0.545 and machine.num_deaths < 2:
            machine.die(is_prefiller=pick.random() < 0.5)
        elif chance < 0.55:
            machine.reset(of_both=True)
        else:
            machine.turn("".join(pick.choices("PPDDDDpd", k=pick.randrange(1, 12))))
        machine.blocks_are_counted_right()
    machine.teardown()
    return num_arrived


def test_long_runs() -> None:
    assert sum(map(run_long, range(4))) > 25, "states have arrived"


@pytest.fixture(scope="module", autouse=True)
def _model(tmp_path_factory: pytest.TempPathFactory) -> None:
    TransferMachine.model = write_model(tmp_path_factory.mktemp("model"))


TestTransfers = TransferMachine.TestCase
# pytest --hypothesis-profile=long makes it many
TestTransfers.settings = settings(
    max_examples=settings.default.max_examples // 20, stateful_step_count=40, deadline=None
)
