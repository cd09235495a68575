"""Checkpoints under vLLM's real KVCacheManager and BlockPool, driven at random.

The machine plays the scheduler and a worker whose memory holds labels instead of KV: what request
prefix a slot was computed from. Every read of every step is compared with the rule, so a write
into a shared block, a stale checkpoint or a wrong copy shows as a wrong label.
"""

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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_sepllm.integration.manager import SepLLMManager
from vllm_sepllm.integration.request_separators import RequestSeparators
from vllm_sepllm.integration.spec import SepLLMSpec
from vllm_sepllm.policy import checkpoint, decode, layout, prefill
from vllm_sepllm.policy.plan import StepPlanBuilder
from vllm_sepllm.policy.visibility import Policy, visible_mask

BLOCK = 4
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
FLAGS = np.array([False, True, False])
# whose KV it is: what keeps it apart from equal tokens, then the tokens up to and including it
Label = tuple[int, ...]


class PrefixCacheMachine(RuleBasedStateMachine):
    """Requests come, step, are preempted, finish; texts share prefixes of every length."""

    @initialize(
        policy=st.builds(
            Policy,
            initial_tokens=st.integers(0, 3),
            window=st.sampled_from([5, 8, 9]),
            max_separators=st.sampled_from([7, 9, 1000]),
        ),
        num_blocks=st.sampled_from([16, 30, 80]),
        interval=st.sampled_from([4, 16, 64]),
    )
    def start(self, policy: Policy, num_blocks: int, interval: int) -> None:
        init_none_hash(sha256)
        self.policy = policy
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.requests: dict[str, Request] = {}
        self.apart: dict[str, int] = {}
        self.memory: dict[int, Label] = {}
        self.counter = 0
        spec = SepLLMSpec.from_full_attention(FULL, policy)
        self.kv = KVCacheManager(
            KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=512,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            enable_caching=True,
        )
        self.pool = self.kv.block_pool
        (single,) = self.kv.coordinator.single_type_managers
        assert isinstance(single, SepLLMManager)
        self.manager = single
        self.separators = RequestSeparators(policy, FLAGS, self.requests)
        single.bind(self.separators, interval)

    @rule(
        num_shared=st.integers(0, 70),
        own=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        apart=st.integers(0, 3),
    )
    def arrive(self, num_shared: int, own: list[int], apart: int) -> None:
        # a fixed text of zeros and ones that many requests begin with
        shared = [(i * i // 3 + i // 7) % 2 for i in range(num_shared)]
        self.counter += 1
        name = f"r{self.counter}"
        self.apart[name] = max(1, apart)
        self.requests[name] = Request(
            name,
            [*shared, *own],
            SamplingParams(max_tokens=30),
            None,
            block_hasher=self.hasher,
            cache_salt="salt" if apart == 2 else None,
            lora_request=LoRARequest("adapter", 1, "path") if apart == 3 else None,
        )

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99), size=st.sampled_from([1, 1, 2, 5, 16, 40]))
    def step(self, which: int, size: int) -> None:
        request = self.pick(which)
        hit = 0
        blocks = None
        if request.num_computed_tokens == 0:
            with self.manager.looking_up(request):
                blocks, hit, _ = self.kv.get_computed_blocks(request)
        size = min(size, request.num_tokens - request.num_computed_tokens - hit)
        free = self.pool.get_num_free_blocks()
        allocated = self.kv.allocate_slots(
            request, size, num_new_computed_tokens=hit, new_computed_blocks=blocks
        )
        end = request.num_computed_tokens + hit + size
        if allocated is None:
            held = len(self.kv.get_block_ids(request.request_id)[0])
            needed = self.manager.num_blocks(request.request_id, end) - held
            assert needed > free, "a request was kept out that fits without the cache"
            return
        request.num_computed_tokens += hit
        self.execute(request, size)
        request.num_computed_tokens += size
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(request.num_tokens % 3 % 2)

    def execute(self, request: Request, size: int) -> None:
        """What scheduler and worker do with the step, in their order."""
        start, name = request.num_computed_tokens, request.request_id
        copies, retained = self.kv.take_kv_cache_block_copies()
        self.pool.free_blocks(retained)
        # blocks that this step's checkpoints will share are filled by this very step
        self.sealed = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
        snapshots = self.manager.take_snapshots(request, start, start + size)
        taken = [block_id for planned in snapshots for block_id in planned.blocks.values()]
        assert len(set(taken)) == len(taken), "two checkpoints of a step got the same block"
        self.manager.release_snapshots()
        builder = StepPlanBuilder(self.policy)
        tokens = list(request.all_token_ids)
        builder.add(name, self.separators.index(name), tokens, start, size, snapshots)
        plan = builder.build()
        for copy in copies:
            for offset in range(BLOCK):
                self.move(copy.src_block_id * BLOCK + offset, copy.dst_block_id * BLOCK + offset)
        own = self.kv.get_block_ids(name)[0]
        labels = [(self.apart[name], *tokens[: i + 1]) for i in range(start, start + size)]
        separators = plan.separators.get(0, np.array([], dtype=np.int64))
        chunk = prefill.Chunk(
            self.policy, start, start + size, int(plan.num_spilled[0]), separators
        )
        for planned in snapshots:
            self.fill(chunk, planned.position, planned.blocks, own, labels)
        if size == 1:
            self.decode(own, labels[0], plan.num_spilled, plan.spills)
        else:
            self.prefill(chunk, own, labels)

    def fill(
        self,
        chunk: prefill.Chunk,
        position: int,
        blocks: dict[int, int],
        own: list[int],
        labels: list[Label],
    ) -> None:
        part = checkpoint.snapshot(chunk, position, BLOCK, list(blocks))
        for source, target in zip(part.copy_source, part.copy_target, strict=True):
            self.move(self.slot(own, source), self.slot(blocks, target))
        for token, target in zip(part.tokens, part.target, strict=True):
            self.memory[self.slot(blocks, target)] = labels[token]

    def decode(
        self, own: list[int], label: Label, num_spilled: np.ndarray, spills: np.ndarray
    ) -> None:
        start = np.array([len(label) - 2])
        spilled = decode.spill_copies(self.policy, start, num_spilled, spills)
        for source, target in zip(spilled.source, spilled.target, strict=True):
            self.move(self.slot(own, source), self.slot(own, target))
        self.write(own, int(layout.ring_index(self.policy, start)[0]), label)
        length = decode.compact_lengths(self.policy, start + 1, num_spilled, spills)[0]
        self.check_reads(label, [self.memory[self.slot(own, i)] for i in range(length)])

    def prefill(self, chunk: prefill.Chunk, own: list[int], labels: list[Label]) -> None:
        keys = [self.memory[self.slot(own, i)] for i in range(chunk.num_cached)] + labels
        for tile in prefill.query_tiles(chunk, 7):
            for row in range(tile.last - tile.first):
                num_full = len(tile.keys) - tile.hidden.shape[1]
                seen = np.delete(tile.keys, num_full + np.flatnonzero(tile.hidden[row]))
                self.check_reads(labels[tile.first + row], [keys[k] for k in seen])
        kept = prefill.survivors(chunk)
        old = [self.memory[self.slot(own, s)] for s in kept.copy_source]
        for label, target in zip(old, kept.copy_target, strict=True):
            self.write(own, int(target), label)
        for token, target in zip(kept.tokens, kept.target, strict=True):
            self.write(own, int(target), labels[token])

    def check_reads(self, query: Label, read: list[Label]) -> None:
        mask = visible_mask(self.policy, np.array(query[1:]) == 1)[-1]
        want = [query[: j + 2] for j in np.flatnonzero(mask)]
        assert sorted(read, key=len) == want

    @staticmethod
    def slot(blocks: "list[int] | dict[int, int]", compact: int) -> int:
        return blocks[int(compact) // BLOCK] * BLOCK + int(compact) % BLOCK

    def move(self, source: int, target: int) -> None:
        # a block's slots past its entries were never written
        if source in self.memory:
            self.memory[target] = self.memory[source]

    def write(self, own: list[int], compact: int, label: Label) -> None:
        block = self.pool.blocks[own[compact // BLOCK]]
        assert block.ref_cnt == 1, "a shared block is written"
        assert block.block_id not in self.sealed, "a block of a checkpoint is written"
        self.memory[self.slot(own, compact)] = label

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
        self.separators.forget(request.request_id)

    @rule()
    def reset(self) -> None:
        for request in list(self.requests.values()):
            self.kv.free(request)
            request.num_computed_tokens = 0
        assert self.kv.reset_prefix_cache()

    def pick(self, which: int) -> Request:
        return list(self.requests.values())[which % len(self.requests)]

    @invariant()
    def blocks_are_counted_right(self) -> None:
        if not hasattr(self, "kv"):
            return
        held: dict[int, int] = {}
        for name in self.requests:
            for block_id in self.kv.get_block_ids(name)[0]:
                held[block_id] = held.get(block_id, 0) + 1
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held.get(block.block_id, 0), "leak or double free"
        num_free = self.pool.get_num_free_blocks()
        assert num_free == len(self.pool.blocks) - 1 - len(held)


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
