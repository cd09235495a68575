"""Checkpoints under vLLM's real KVCacheManager and BlockPool, driven at random.

The machine plays the scheduler; the worker's memory holds labels instead of KV, and every read is
compared with the rule (labelled_worker.py).
"""

import random
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from tests.support.labelled_worker import BLOCK, LabelledWorker, Scheduled
from tests.support.router import Router
from vllm_sepllm.integration.scheduler.coordinator import SepLLMCoordinator
from vllm_sepllm.integration.scheduler.live_requests import LiveRequests
from vllm_sepllm.integration.scheduler.manager import SepLLMManager
from vllm_sepllm.integration.wire.choices import salted
from vllm_sepllm.integration.wire.spec import SepLLMSpec
from vllm_sepllm.policy.choice import RequestLimits
from vllm_sepllm.policy.epochs import Epochs
from vllm_sepllm.policy.initial import Initial
from vllm_sepllm.policy.separators.definition import TokenSeparators
from vllm_sepllm.policy.step.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy

SIZES: dict[str, Any] = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.float32}
FULL = FullAttentionSpec(block_size=BLOCK, **SIZES)
SLIDING = SlidingWindowSpec(block_size=BLOCK, sliding_window=6, **SIZES)
# blocks twice as large: hits end where both kinds of layers have a boundary
WIDE = FullAttentionSpec(block_size=2 * BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
OTHERS: dict[str, list[KVCacheSpec]] = {
    "alone": [],
    "full": [FULL],
    "sliding": [SLIDING],
    "full and sliding": [FULL, SLIDING],
    "wide": [WIDE],
}
# ends a protected prefix; no separator
END = 2
PROTECTED = Initial(1, END, 12)
SEPARATORS = TokenSeparators((1,))


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests come, step, are preempted, finish; texts share prefixes of every length.

    Some choose initial tokens or a window of their own, one of them full attention, or protect the
    prefix up to a token; labels say whose KV it is.
    """

    @initialize(
        policy=st.builds(
            Policy,
            initial_tokens=st.integers(0, 3),
            window=st.sampled_from([5, 8, 9, 17]),
            max_separators=st.sampled_from([7, 9, 1000]),
        ),
        num_blocks=st.sampled_from([16, 30, 80]),
        interval=st.sampled_from([4, 16, 64]),
        num_groups=st.integers(1, 2),
        others=st.sampled_from(sorted(OTHERS)),
        room=st.none() | st.integers(1, 30),
        announces=st.booleans(),
        host_slots=st.sampled_from([0, 12, 60]),
    )
    def start(
        self,
        policy: Policy,
        num_blocks: int,
        interval: int,
        num_groups: int,
        others: str,
        room: int | None = None,
        announces: bool = False,
        host_slots: int = 0,
    ) -> None:
        """``room``: fewest tokens of an epoch; None: positions are those of the text.

        ``host_slots``: blocks of host memory; layers of other kinds have none.
        """
        init_none_hash(sha256)
        if room is not None:  # which layers of other kinds cannot follow
            others, most = "alone", min(policy.max_separators or 0, 7)
            length = policy.num_dense + most + room
            policy = replace(policy, max_separators=most, max_position=length)
        self.policy = policy
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.requests: dict[str, Request] = {}
        self.apart: dict[str, int] = {}
        self.policies: dict[str, Policy] = {}
        self.limits = RequestLimits(
            policy, Initial(policy.initial_tokens), max_model_len=512, min_window=5
        )
        self.counter = 0
        specs = OTHERS[others] + [SepLLMSpec.from_full_attention(FULL, policy)] * num_groups
        num_blocks *= len(specs)
        groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks, [], groups),
            max_model_len=512,
            scheduler_block_size=max(spec.block_size for spec in specs),
            hash_block_size=BLOCK,
            enable_caching=True,
            enable_kv_cache_events=announces,
        )
        self.pool = self.kv.block_pool
        self.live = LiveRequests(SEPARATORS, policy)
        coordinator = SepLLMCoordinator(self.kv.coordinator, self.live, interval)
        self.cache = coordinator.prefix_cache
        every = self.kv.coordinator.single_type_managers
        self.ours = [m.kv_cache_group_id for m in every if isinstance(m, SepLLMManager)]
        assert len(self.ours) == num_groups
        # a router beside them, which sees nothing but the events
        self.router = Router(BLOCK, self.ours, len(groups)) if announces else None
        if announces:
            self.cache.announce(self.kv, sha256)
        self.are_alone = others == "alone"
        if host_slots and self.are_alone:
            self.cache.offload(host_slots)
        self.worker = LabelledWorker(self.policies, self.kv, self.ours, self.apart)

    @rule(
        num_shared=st.one_of(st.integers(4, 16), st.integers(0, 70)),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        apart=st.integers(0, 3),
        window=st.sampled_from([None, None, None, 6, 12, 30, 512]),
        initial=st.sampled_from([None, None, None, None, 0, 7, 25, "protect", "protect"]),
        max_tokens=st.sampled_from([1, 3, 30]),
    )
    def arrive(
        self,
        num_shared: int,
        own: list[int],
        apart: int,
        window: int | None,
        max_tokens: int,
        initial: int | str | None = None,
    ) -> None:
        # a fixed text of zeros and ones that many requests begin with
        shared = [(i * i // 3 + i // 7) % 2 for i in range(num_shared)]
        self.counter += 1
        name = f"r{self.counter}"
        policy, prompt = self.policy, [*shared, *own]
        if window is not None:
            policy = replace(policy, window=window)
        if initial == "protect":  # a token that occurs once, anywhere in the shared text
            prompt[9:10] = [END]
            initial = PROTECTED.of(prompt)
        if initial is not None:
            policy = replace(policy, initial_tokens=int(initial))
        kept = policy.num_dense + (policy.max_separators or 0)
        if policy.max_position is not None and kept >= policy.max_position:
            policy = self.policy
        self.policies[name] = policy
        self.apart[name] = max(1, apart) + 10 * policy.window + 10_000 * policy.initial_tokens
        self.requests[name] = Request(
            name,
            prompt,
            SamplingParams(max_tokens=max_tokens),
            None,
            block_hasher=self.hasher,
            cache_salt=salted(self.limits, policy, "salt" if apart == 2 else None),
            lora_request=LoRARequest("adapter", 1, "path") if apart == 3 else None,
        )
        self.live.add(self.requests[name], policy)

    @precondition(lambda self: self.requests)
    @rule(
        which=st.lists(st.integers(0, 99), min_size=1, max_size=3),
        sizes=st.lists(st.sampled_from([1, 1, 2, 5, 16, 40]), min_size=3, max_size=3),
        preempts=st.booleans(),
    )
    def step(self, which: list[int], sizes: list[int], preempts: bool) -> None:
        """One step of the engine with up to three requests; who does not fit may push one out."""
        chosen = {
            r.request_id: r for r in map(self.pick, which) if r.num_output_tokens < r.max_tokens
        }
        scheduled: list[Scheduled] = []
        for request, size in zip(chosen.values(), sizes, strict=False):
            part = self.schedule(request, size)
            if part is not None:
                scheduled.append(part)
            elif preempts and scheduled:
                last = scheduled.pop().request
                self.kv.free(last)
                last.num_computed_tokens = 0
        self.execute(scheduled)
        for part in scheduled:
            part.request.num_computed_tokens += part.size
            if part.request.num_computed_tokens == part.request.num_tokens:
                part.request.append_output_token_ids(part.request.num_tokens % 3 % 2)

    def schedule(self, request: Request, size: int) -> Scheduled | None:
        """What vLLM's scheduler does with a request, waiting or running."""
        hit = 0
        blocks = None
        if request.num_computed_tokens == 0:
            if self.cache.must_wait(self.live[request.request_id]):
                return None
            self.cache.restore(self.live[request.request_id], self.kv.watermark_blocks)
            blocks, hit, _ = self.kv.get_computed_blocks(request)
            if hit and not self.cache.fits(self.kv, request, blocks, hit):
                blocks, hit = self.kv.empty_kv_cache_blocks, 0
        size = min(size, request.num_tokens - request.num_computed_tokens - hit)
        start = request.num_computed_tokens + hit
        if (epochs := self.live[request.request_id].epochs) is not None:
            size = min(size, epochs.at(start, list(request.all_token_ids)).end - start)
        needed = self.kv.coordinator.get_num_blocks_to_allocate(
            request.request_id, start + size, self.kv.empty_kv_cache_blocks.blocks, 0, 0, 0, 0
        )
        free = self.pool.get_num_free_blocks()
        allocated = self.kv.allocate_slots(
            request, size, num_new_computed_tokens=hit, new_computed_blocks=blocks
        )
        if allocated is None:
            assert needed > free, "a request was kept out that fits without the cache"
            return None
        request.num_computed_tokens = start
        return Scheduled(request, list(request.all_token_ids), start, size)

    def epochs_of(self, name: str) -> tuple[Epochs, list[int]]:
        """The epochs of a request, and its tokens."""
        live = self.live[name]
        assert live.epochs is not None
        return live.epochs, list(live.request.all_token_ids)

    def execute(self, scheduled: list[Scheduled]) -> None:
        """What scheduler and worker do with the step, in their order."""
        copies, retained = self.kv.take_kv_cache_block_copies()
        self.pool.free_blocks(retained)
        # blocks that this step's checkpoints will share are filled by this very step
        sealed = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        builder = StepPlanBuilder(self.policy)
        for part in scheduled:
            end = part.start + part.size
            live = self.live[part.name]
            part.checkpoints = self.cache.plan_checkpoints(live, part.start, end)
            builder.add(part.name, live.index, part.tokens, part.start, part.size, part.checkpoints)
        taken = [
            block_id
            for part in scheduled
            for planned in part.checkpoints
            for blocks in planned.blocks.values()
            for block_id in blocks.values()
        ]
        assert len(set(taken)) == len(taken), "two checkpoints of a step got the same block"
        self.pool.free_blocks(self.cache.take_fresh())
        plan = replace(builder.build(), host=self.cache.take_transfers())
        if self.policy.max_position is not None:
            positions = self.live.epochs.step(
                np.array([self.live[part.name].slot for part in scheduled], dtype=np.int64),
                np.array([part.start for part in scheduled], dtype=np.int64),
                lambda row: self.epochs_of(scheduled[row].name),
            )
            plan = replace(plan, positions=positions)
        assert len({c.dst_block_id for c in copies}) == len(copies)
        sources = {c.src_block_id for c in copies}
        assert sources.isdisjoint(c.dst_block_id for c in copies), "a copy of a copy"
        self.worker.run(self.worker.launch(scheduled, plan, copies, sealed))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def preempt(self, which: int) -> None:
        request = self.pick(which)
        self.kv.free(request)
        request.num_computed_tokens = 0

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def finish(self, which: int) -> None:
        request = self.pick(which)
        self.kv.free(request)
        del self.requests[request.request_id]
        self.live.forget(request.request_id)

    @rule()
    def reset(self) -> None:
        for request in list(self.requests.values()):
            self.kv.free(request)
            request.num_computed_tokens = 0
        assert self.kv.reset_prefix_cache()

    def pick(self, which: int) -> Request:
        return list(self.requests.values())[which % len(self.requests)]

    @invariant()
    def a_router_knows_every_hit(self) -> None:
        """Of all that requests are now, waiting or running, at every moment."""
        if (router := getattr(self, "router", None)) is None:
            return
        router.take(self.kv.take_events())
        for live in self.live.values():
            request = live.request
            longest = request.num_tokens - 1
            _, found = self.cache.find(live, longest, ())
            tokens, hashes = list(request.all_token_ids), request.block_hashes
            assert router.num_found(tokens, hashes, longest) == found
            # sliding windows take hashes back that other layers still have, in stock vLLM too
            if self.are_alone:
                assert router.most_found(hashes) >= found // BLOCK * BLOCK
        if not len(self.pool.cached_block_hash_to_block):
            assert not any(router.stored.values()), "blocks of an empty cache"

    @invariant()
    def blocks_are_counted_right(self) -> None:
        if not hasattr(self, "kv"):
            return
        held: dict[int, int] = {}
        for name in self.requests:
            for block_id in chain.from_iterable(self.kv.get_block_ids(name)):
                if block_id != self.pool.null_block.block_id:
                    held[block_id] = held.get(block_id, 0) + 1
        for manager in self.kv.coordinator.single_type_managers:
            sources = manager.sources.held if isinstance(manager, SepLLMManager) else {}
            for block in sources.values():
                held[block.block_id] = held.get(block.block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held.get(block.block_id, 0), "leak or double free"
        num_free = self.pool.get_num_free_blocks()
        assert num_free == len(self.pool.blocks) - 1 - len(held)


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_long_runs() -> None:
    """Far more steps than hypothesis takes: prompts come back when the pool has forgotten them."""
    assert sum(map(run_long, range(12))) > 100, "blocks came back from host memory"


def run_long(seed: int) -> int:
    """Random traffic in a small pool over host memory; returns how many blocks came back."""
    pick = random.Random(seed)
    machine = PrefixCacheMachine()
    machine.start(
        Policy(pick.randrange(4), pick.choice([5, 8, 17]), pick.choice([9, 1000])),
        num_blocks=pick.choice([24, 30, 40]),
        interval=16,
        num_groups=pick.choice([1, 1, 2]),
        others="alone",
        room=pick.choice([None, None, 20]),
        announces=pick.random() < 0.5,
        host_slots=pick.choice([20, 60, 200]),
    )
    host = machine.cache.host
    assert host is not None
    for _ in range(250):
        chance = pick.random()
        if len(machine.requests) < 3 or (chance < 0.1 and len(machine.requests) < 6):
            machine.arrive(
                num_shared=pick.choice([0, 20, 40, 60, 70]),
                own=pick.choices([0, 1], k=pick.randrange(1, 12)),
                apart=pick.choice([1, 1, 1, 2]),
                window=pick.choice([None, None, None, 12]),
                max_tokens=pick.choice([1, 3, 30]),
            )
        elif chance < 0.2:
            machine.finish(pick.randrange(6))
        elif chance < 0.22:
            machine.preempt(pick.randrange(6))
        elif chance < 0.222:
            machine.reset()
        else:
            which = pick.sample(range(6), 3)
            machine.step(which, pick.choices([1, 5, 16, 40], k=3), preempts=pick.random() < 0.5)
        machine.a_router_knows_every_hit()
        machine.blocks_are_counted_right()
        slots = {slot for saved in host._saved.values() for slot in saved.all_slots}
        assert sorted([*slots, *host._free]) == list(range(host._num_slots)), "a slot is lost"
    for _ in list(machine.requests):
        machine.finish(0)
    assert machine.pool.get_num_free_blocks() == len(machine.pool.blocks) - 1
    return machine.worker.num_loaded


# what the machine hardly comes upon, step by step
def test_a_request_that_ends_in_its_window_keeps_what_a_longer_one_overwrites() -> None:
    """It shares full blocks, but not those of a running request whose ring will go round."""
    machine = PrefixCacheMachine()
    machine.start(Policy(3, 17, 1000), num_blocks=80, interval=64, num_groups=1, others="alone")
    long, short = 0, 1
    machine.arrive(num_shared=12, own=[0, 1], apart=1, window=None, max_tokens=30)
    machine.step([long], [40], preempts=False)
    machine.arrive(num_shared=12, own=[1], apart=1, window=None, max_tokens=7)
    machine.step([short], [40], preempts=False)
    assert machine.requests["r2"].num_computed_tokens == 13
    # a + n = 20: tokens 20 to 22 go over the long request's first block
    for _ in range(9):
        machine.step([long], [1], preempts=False)
    for _ in range(6):
        machine.step([short], [1], preempts=False)
    machine.blocks_are_counted_right()
    # what was moved away from the long one nobody overwrites: short ones share it
    for number in (2, 3):
        machine.arrive(num_shared=12, own=[0], apart=1, window=None, max_tokens=7)
        machine.step([number], [40], preempts=False)
    own, other = (machine.kv.get_block_ids(name)[0] for name in ("r3", "r4"))
    assert own[:2] == other[:2]


def test_a_request_that_is_preempted_in_its_step_overwrites_nothing() -> None:
    """Two started from its first blocks, which are pinned; then it enters a step and leaves it."""
    machine = PrefixCacheMachine()
    machine.start(Policy(3, 17, 1000), num_blocks=80, interval=64, num_groups=1, others="alone")
    machine.arrive(num_shared=18, own=[0, 1], apart=1, window=None, max_tokens=30)
    machine.step([0], [40], preempts=False)
    for number in (1, 2):
        machine.arrive(num_shared=12, own=[number % 2, 1], apart=1, window=None, max_tokens=30)
        machine.step([number], [40], preempts=False)
    request = machine.requests["r1"]
    part = machine.schedule(request, 1)
    assert part is not None
    assert part.start == machine.policy.num_dense
    machine.kv.free(request)
    request.num_computed_tokens = 0
    machine.execute([])
    machine.blocks_are_counted_right()
    for _ in range(3):
        machine.step([0, 1, 2], [40, 1, 1], preempts=False)
        machine.blocks_are_counted_right()
