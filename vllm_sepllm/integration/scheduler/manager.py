"""The blocks of one KV cache group of SepLLM layers, counted by compact length."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.live_requests import (
    GroupState,
    LiveRequest,
    LiveRequests,
    RequestHashes,
)
from vllm_sepllm.integration.scheduler.shared_sources import SharedSources
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step import checkpoint
from vllm_sepllm.policy.visibility import Policy


class RequestEvents(Protocol):
    """Events and questions of the managers of all groups, which coordinator.py answers.

    Every manager sends each event of a request; all but the first change nothing.
    """

    requests: LiveRequests
    num_staging: int

    def find(
        self, live: LiveRequest, max_length: int, group_ids: Sequence[int]
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Blocks of the longest cached prefix, by group, and its tokens."""

    def starts(self, live: LiveRequest, num_tokens: int) -> None:
        """The request starts from a cached prefix of ``num_tokens`` tokens."""

    def takes_part(self, live: LiveRequest) -> None:
        """The request has its blocks for the step that is being scheduled."""

    def all_take_part(self) -> None:
        """All requests of the step have their blocks, and no block has changed yet."""

    def leaves(self, live: LiveRequest) -> None:
        """The request is about to lose its blocks."""

    def may_wrap(self, live: LiveRequest) -> bool:
        """Whether its tail may become a ring while it runs."""


class SepLLMManager(SingleTypeKVCacheManager):
    """vLLM's accounting with one translation: tokens -> compact entries.

    The block table of a running request stays vLLM's own, append-only and shorter. Nothing is
    freed in mid-request, and no block that others may find is ever written: what is kept for them
    is copied first (copy-on-write), and a request that starts from it has copies of the blocks
    that it will write.
    """

    # set by the coordinator before any request: vLLM makes a manager of a spec alone
    events: RequestEvents

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.sources = SharedSources(self.block_pool)
        # requests of the step that is being scheduled that overwrite blocks others may find
        self._overwriting: list[LiveRequest] = []

    def group_state(self, live: LiveRequest) -> GroupState:
        """What the request holds in this group."""
        return live.holding.groups[self.kv_cache_group_id]

    # ------------------------------------------------------------------ block accounting

    def num_blocks(self, live: LiveRequest, num_tokens: int) -> int:
        """Blocks of the request once ``num_tokens`` of its tokens are computed."""
        known = self.group_state(live)
        if known.first_tokens <= num_tokens <= known.last_tokens:
            return known.num_blocks
        entries = live.compact_length(num_tokens)
        known.num_blocks = cdiv(entries, self.block_size)
        # a token adds one entry at most, and never takes one away
        room = known.num_blocks * self.block_size - entries
        known.first_tokens, known.last_tokens = num_tokens, num_tokens + room
        return known.num_blocks

    def num_blocks_to_hold(self, live: LiveRequest, num_tokens: int) -> int:
        """The same, and room for drafts beside its entries."""
        if not self.events.num_staging:
            return self.num_blocks(live, num_tokens)
        return cdiv(live.compact_length(num_tokens) + self.events.num_staging, self.block_size)

    def most_blocks(self, policy: Policy, num_tokens: int) -> int:
        """The most that a request of ``num_tokens`` tokens can hold, whatever its tokens are."""
        entries = layout.max_compact_length(policy, num_tokens) + self.events.num_staging
        return cdiv(entries, self.block_size)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """See the base class; a hit also costs copies of the blocks that will be written."""
        live = self.events.requests[request_id]
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        num_new = max(0, self.num_blocks_to_hold(live, num_tokens) - held)
        if new_computed_blocks:
            num_new += len(self.to_own(live, num_local_computed_tokens, new_computed_blocks))
            num_new += self._get_num_evictable_blocks(new_computed_blocks)
        return num_new

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; ``num_tokens`` are the request's, not compact entries."""
        live = self.events.requests[request_id]
        copies = self._copy_hit_blocks(live) if self.group_state(live).to_copy else []
        if self.enable_caching:
            self._note_overwritten(live, num_tokens)
        self.events.takes_part(live)
        slots = self.num_blocks_to_hold(live, num_tokens) * self.block_size
        return copies + super().allocate_new_blocks(request_id, slots, slots)

    # ------------------------------------------------------------------ starting from a prefix

    def find_longest_cache_hit(  # type: ignore[override]  # asked on the instance: coordinator.py
        self,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of the request, beyond a + n tokens the longest checkpoint."""
        assert isinstance(block_hashes, RequestHashes), "LiveRequests.add replaces the hashes"
        return self.events.find(block_hashes.live, max_length, kv_cache_group_ids)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """See the base class; remembers which of the blocks the request must own."""
        if not new_computed_blocks:
            return
        blocks = self.req_to_blocks[request_id]
        assert not blocks, "a hit comes before any block of one's own"
        live = self.events.requests[request_id]
        to_copy = self.to_own(live, num_local_computed_tokens, new_computed_blocks)
        self.group_state(live).to_copy = to_copy
        self.block_pool.touch(new_computed_blocks)
        blocks.extend(new_computed_blocks)
        # vLLM's mark of a request that is past its lookup
        self.num_cached_block[request_id] = len(blocks)
        self.events.starts(live, num_local_computed_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """See the base class; the blocks of a state that another instance has computed.

        The request reads all of it or nothing: its blocks have no order by which the first of them
        could come from a prefix that is cached here.
        """
        assert not num_local_computed_tokens, "a state is read from its beginning"
        live = self.events.requests[request_id]
        slots = self.num_blocks(live, num_external_computed_tokens) * self.block_size
        super().allocate_external_computed_blocks(request_id, 0, slots, record_for_zeroing)
        live.holding.is_loading = True
        self.events.starts(live, num_external_computed_tokens)

    def _copy_hit_blocks(self, live: LiveRequest) -> list[KVCacheBlock]:
        """Replace the blocks that the request must own by copies, made before the forward."""
        request_id, state = live.request.request_id, self.group_state(live)
        indices, state.to_copy = state.to_copy, []
        sources = [self.req_to_blocks[request_id][index] for index in indices]
        copies = self.block_pool.get_new_blocks(len(indices))
        for index, source, copy in zip(indices, sources, copies, strict=True):
            self._apply_cow(request_id, index, source, copy)
        state.sources = self.sources.copied(sources)
        return copies

    def to_own(
        self, live: LiveRequest, num_tokens: int, hit: Sequence[KVCacheBlock] = ()
    ) -> list[int]:
        """Block indices of a state that the request may not share (copy-on-write), ascending.

        A block may be shared until a running request writes into it again. These will be written:
        the ring's blocks, unless the request ends before its ring goes round; the tail's last
        block, unless it is full; all blocks of the tail, if it may become a ring; and for a
        request that would share its ring's blocks, those that another running request will
        overwrite. Full blocks of initial tokens are never written again.

        Args:
            live: whoever goes on from the state.
            num_tokens: tokens of the state.
            hit: its blocks, if the request starts from them; empty: they are its own already.
        """
        written = checkpoint.written_blocks(
            live.policy,
            self.block_size,
            num_tokens,
            live.num_spilled(num_tokens),
            may_wrap=not live.stays_dense and self.events.may_wrap(live),
            stays_dense=live.stays_dense,
        )
        # a block of a prefix has the same place in every request that holds it
        used = [i for i, block in enumerate(hit) if block.ref_cnt > 0]
        if not used or not live.stays_dense:
            return written
        requests = self.events.requests
        rings = [b for name, b in self.req_to_blocks.items() if not requests[name].stays_dense]
        # whoever finds a prefix has the policy of whoever left it (wire/choices.py)
        num_initial = live.policy.initial_tokens // self.block_size
        in_ring = [i for i in used if i >= num_initial]
        overwritten = {i for b in rings for i in in_ring if i < len(b) and b[i] is hit[i]}
        return sorted({*written, *overwritten})

    # ------------------------------------------------------------------ leaving prefixes

    def state(
        self, live: LiveRequest, num_tokens: int, own: Mapping[int, KVCacheBlock] | None = None
    ) -> list[KVCacheBlock]:
        """Blocks of the request after ``num_tokens`` tokens, ``own`` in place of its own."""
        blocks = self.req_to_blocks[live.request.request_id][: self.num_blocks(live, num_tokens)]
        return [(own or {}).get(i, block) for i, block in enumerate(blocks)]

    def _note_overwritten(self, live: LiveRequest, num_tokens: int) -> None:
        start, policy = live.request.num_computed_tokens, live.policy
        # the ring goes round once over blocks that others may find
        if num_tokens <= policy.num_dense or start >= policy.num_dense + policy.window:
            return
        blocks = self.req_to_blocks[live.request.request_id]
        state = self.group_state(live)
        if live.begins_epoch(start):  # its keys are turned in all blocks behind the initial tokens
            overwritten = list(range(policy.initial_tokens // self.block_size, len(blocks)))
        else:
            overwritten = checkpoint.overwritten_blocks(policy, self.block_size, start, num_tokens)
        for i in overwritten:
            if i < len(blocks) and (key := blocks[i].block_hash) is not None:
                state.overwritten.append((blocks[i], key))
        if state.overwritten:
            self._overwriting.append(live)

    def take_overwritten(self) -> list[KVCacheBlock]:
        """Blocks that others may find and that this step overwrites; once per step."""
        blocks = []
        for live in self._overwriting:
            # empty if the request was preempted in the same step
            for block, key in self.group_state(live).overwritten:
                if block.block_hash == key:
                    self.sources.release(key)
                    blocks.append(block)
            self.group_state(live).overwritten.clear()
        self._overwriting.clear()
        return blocks

    def copy_block(self, block: KVCacheBlock, copy: KVCacheBlock) -> None:
        """Copy a block before the step's forward; vLLM keeps both until the worker has done so."""
        block.ref_cnt += 1
        self._pending_cow_copies.append((block, copy))

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """See the base class; vLLM asks once all requests of a step are scheduled."""
        self.events.all_take_part()
        return super().take_pending_cow_copies()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; the state of a request that ends is kept."""
        self.events.leaves(self.events.requests[request_id])
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Nothing: PrefixCache gives blocks their keys once the step is scheduled.

        vLLM would do it here, and a request of the same step would copy what is not computed yet.
        """
