"""Counts the blocks of a request by its compact length instead of its tokens, and reuses them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, BlockHashWithGroupId, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_sepllm.integration.scheduler.prefix_cache.shared_sources import SourcePins
from vllm_sepllm.policy import layout
from vllm_sepllm.policy.step import checkpoint
from vllm_sepllm.policy.visibility import Policy

if TYPE_CHECKING:
    from vllm_sepllm.integration.scheduler.live_requests import RequestSeparators
    from vllm_sepllm.integration.scheduler.prefix_cache.cache import PrefixCache
    from vllm_sepllm.integration.scheduler.shared_tails import SharedTails
    from vllm_sepllm.integration.scheduler.usage import KvUsage


class SepLLMManager(SingleTypeKVCacheManager):
    """vLLM's accounting with one translation: tokens -> compact entries.

    The block table of a running request stays vLLM's own, append-only and shorter. Nothing is
    freed in mid-request, and no block that others may find is ever written: what is kept for them
    is copied first, and a request that starts from it has copies of the blocks it will write.
    """

    _separators: "RequestSeparators"
    _cache: "PrefixCache"
    _tails: "SharedTails"
    _num_staging: int

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        # the engine's; requests may have a window of their own
        self.policy = kv_cache_spec.policy  # type: ignore[attr-defined]  # a SepLLMSpec
        # of several groups, the one that speaks for all
        self._is_first = True
        # whom that one tells who starts from a prefix and who leaves; None: nobody asked
        self.usage: KvUsage | None = None
        # request -> block indices of its hit that must become its own
        self._to_copy: dict[str, list[int]] = {}
        self._pins = SourcePins(self.block_pool)
        # request -> blocks that others may find and that it overwrites in this step, their keys
        self._overwritten: defaultdict[str, list[tuple[KVCacheBlock, BlockHashWithGroupId]]]
        self._overwritten = defaultdict(list)
        # request -> range of its token counts, ends included, that take the same number of blocks
        self._same_blocks: dict[str, tuple[int, int, int]] = {}

    def bind(
        self,
        separators: "RequestSeparators",
        cache: "PrefixCache",
        tails: "SharedTails",
        num_staging: int,
        *,
        is_first: bool,
    ) -> None:
        """Give the manager the requests' tokens; the scheduler does so before any request.

        Args:
            separators: of the scheduler's requests.
            cache: shared by the managers of all SepLLM groups.
            tails: shared as well.
            num_staging: entries of each request beyond its compact length.
            is_first: of those managers; it speaks for all.
        """
        self._separators = separators
        self._cache = cache
        self._tails = tails
        self._num_staging = num_staging
        self._is_first = is_first

    # ------------------------------------------------------------------ block accounting

    def _num_spilled(self, request_id: str, num_tokens: int) -> int:
        left = layout.num_left_window(self._separators.policy_of(request_id), num_tokens)
        return self._separators.count_below(request_id, left)

    def _num_entries(self, request_id: str, num_tokens: int) -> int:
        """Compact length of the request after ``num_tokens`` tokens."""
        num_spilled = self._num_spilled(request_id, num_tokens)
        policy = self._separators.policy_of(request_id)
        return layout.compact_length(policy, num_tokens, num_spilled)

    def num_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks the request holds once ``num_tokens`` of its tokens are computed."""
        first, last, known = self._same_blocks.get(request_id, (0, -1, 0))
        if first <= num_tokens <= last:
            return known
        entries = self._num_entries(request_id, num_tokens)
        num_blocks = cdiv(entries, self.block_size)
        # a token adds one entry at most, and never takes one away
        room = num_blocks * self.block_size - entries
        self._same_blocks[request_id] = (num_tokens, num_tokens + room, num_blocks)
        return num_blocks

    def _num_blocks_to_hold(self, request_id: str, num_tokens: int) -> int:
        if not self._num_staging:
            return self.num_blocks(request_id, num_tokens)
        entries = self._num_entries(request_id, num_tokens) + self._num_staging
        return cdiv(entries, self.block_size)

    def most_blocks(self, policy: Policy, num_tokens: int) -> int:
        """The most that a request of ``num_tokens`` tokens can hold, whatever its tokens are."""
        entries = layout.max_compact_length(policy, num_tokens) + self._num_staging
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
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        num_new = max(0, self._num_blocks_to_hold(request_id, num_tokens) - held)
        if new_computed_blocks:
            hit = new_computed_blocks, num_local_computed_tokens
            num_new += len(self._unshared(request_id, *hit))
            num_new += self._get_num_evictable_blocks(new_computed_blocks)
        return num_new

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; ``num_tokens`` are the request's, not compact entries."""
        request = self._separators.request(request_id)
        # asked for every request of every step
        copies = self._copy_hit_blocks(request_id) if request_id in self._to_copy else []
        if self.enable_caching:
            self._note_overwritten(request, num_tokens)
            if self._is_first:
                self._cache.note_step(request)
                self._tails.takes_part(request)
        slots = self._num_blocks_to_hold(request_id, num_tokens) * self.block_size
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
        return self._cache.find(max_length, kv_cache_group_ids)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """See the base class; remembers which of the blocks the request must not share."""
        if not new_computed_blocks:
            return
        blocks = self.req_to_blocks[request_id]
        assert not blocks, "a hit comes before any block of one's own"
        hit = new_computed_blocks, num_local_computed_tokens
        self._to_copy[request_id] = self._unshared(request_id, *hit)
        self.block_pool.touch(new_computed_blocks)
        blocks.extend(new_computed_blocks)
        # vLLM's mark of a request that is past its lookup
        self.num_cached_block[request_id] = len(blocks)
        if self.usage is not None:
            self.usage.request_starts(request_id, num_local_computed_tokens)

    def _copy_hit_blocks(self, request_id: str) -> list[KVCacheBlock]:
        """Replace the blocks the request will write by copies, made before the step's forward."""
        indices = self._to_copy.pop(request_id)
        sources = [self.req_to_blocks[request_id][index] for index in indices]
        copies = self.block_pool.get_new_blocks(len(indices))
        for index, source, copy in zip(indices, sources, copies, strict=True):
            self._apply_cow(request_id, index, source, copy)
        if sources:
            self._pins.copied(request_id, sources)
        return copies

    def _unshared(self, request_id: str, hit: Sequence[KVCacheBlock], num_tokens: int) -> list[int]:
        """Blocks of a hit of ``num_tokens`` tokens that the request or another one will write."""
        written = self.written_blocks(request_id, num_tokens)
        if not self._stays_dense(request_id):
            return written
        # a block of a prefix has the same place in every request that holds it
        used = [i for i, block in enumerate(hit) if block.ref_cnt > 0]
        if not used:
            return written
        rings = [b for name, b in self.req_to_blocks.items() if not self._stays_dense(name)]
        overwritten = {i for b in rings for i in used if i < len(b) and b[i] is hit[i]}
        return sorted({*written, *overwritten})

    def _stays_dense(self, request_id: str) -> bool:
        """Whether the request ends within a + n tokens, so that its ring never goes round."""
        request = self._separators.request(request_id)
        longest = request.num_prompt_tokens + request.max_tokens
        policy = self._separators.policy_of(request_id)
        return longest <= policy.num_dense and not request.resumable

    def written_blocks(self, request_id: str, num_tokens: int) -> list[int]:
        """Blocks of the request's state after ``num_tokens`` tokens that it would write later."""
        stays_dense = self._stays_dense(request_id)
        request = self._separators.request(request_id)
        return checkpoint.written_blocks(
            self._separators.policy_of(request_id),
            self.block_size,
            num_tokens,
            self._num_spilled(request_id, num_tokens),
            may_wrap=not stays_dense and self._tails.may_wrap(request),
            stays_dense=stays_dense,
        )

    # ------------------------------------------------------------------ leaving prefixes

    def state(
        self, request_id: str, num_tokens: int, own: Mapping[int, KVCacheBlock] | None = None
    ) -> list[KVCacheBlock]:
        """Blocks of the request after ``num_tokens`` tokens, ``own`` in place of its own."""
        blocks = self.req_to_blocks[request_id][: self.num_blocks(request_id, num_tokens)]
        return [(own or {}).get(i, block) for i, block in enumerate(blocks)]

    def _note_overwritten(self, request: Request, num_tokens: int) -> None:
        start = request.num_computed_tokens
        policy = self._separators.policy_of(request.request_id)
        # the ring goes round once over blocks that others may find
        if num_tokens <= policy.num_dense or start >= policy.num_dense + policy.window:
            return
        blocks = self.req_to_blocks[request.request_id]
        for i in checkpoint.overwritten_blocks(policy, self.block_size, start, num_tokens):
            if i < len(blocks) and (key := blocks[i].block_hash) is not None:
                self._overwritten[request.request_id].append((blocks[i], key))

    def take_overwritten(self) -> list[KVCacheBlock]:
        """Blocks that others may find and that this step overwrites; asked once per step."""
        noted = list(chain.from_iterable(self._overwritten.values()))
        self._overwritten.clear()
        blocks = []
        for block, key in noted:
            if block.block_hash == key:
                self._pins.release(key)
                blocks.append(block)
        return blocks

    def copy_block(self, block: KVCacheBlock, copy: KVCacheBlock) -> None:
        """Copy a block before the step's forward; vLLM keeps both until the worker has done so."""
        block.ref_cnt += 1
        self._pending_cow_copies.append((block, copy))

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """See the base class; vLLM asks once all requests of a step are scheduled."""
        if self.enable_caching and self._is_first:
            self._cache.plan_copies()
        return super().take_pending_cow_copies()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; the state of a request that ends is kept."""
        if self._is_first:
            self._cache.request_leaves(request_id)
            self._tails.leaves(request_id)
        if self.usage is not None:
            self.usage.request_leaves(request_id)
        self._to_copy.pop(request_id, None)
        self._pins.leaves(request_id)
        # preempted in the step that it would have overwritten them in
        self._overwritten.pop(request_id, None)
        self._separators.staged.pop(request_id, None)
        self._same_blocks.pop(request_id, None)
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
