"""Counts the blocks of a request by its compact length instead of its tokens, and reuses them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_sepllm.integration.checkpoints import CheckpointRegistry
from vllm_sepllm.policy import checkpoint, layout
from vllm_sepllm.policy.plan import PlannedSnapshot

if TYPE_CHECKING:
    from vllm_sepllm.integration.request_separators import RequestSeparators


class SepLLMManager(SingleTypeKVCacheManager):
    """vLLM's accounting with one translation: tokens -> compact entries.

    The block table of a running request stays vLLM's own, append-only and shorter. Nothing is
    freed in mid-request, and no block that a checkpoint shares is ever written: a checkpoint has
    copies of the blocks that its request goes on to write, and so has a request that starts
    from one.
    """

    _separators: "RequestSeparators"
    _interval: int

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.policy = kv_cache_spec.policy  # type: ignore[attr-defined]  # a SepLLMSpec
        self._checkpoints = CheckpointRegistry(
            self.block_pool, self.kv_cache_group_id, self.block_size
        )
        self._looked_up: Request | None = None
        # request -> positions at which its prefill leaves a checkpoint
        self._wanted: dict[str, tuple[int, ...]] = {}
        # request -> block indices of its hit that must become its own
        self._to_copy: dict[str, list[int]] = {}
        # request -> range of its token counts, ends included, that take the same number of blocks
        self._same_blocks: dict[str, tuple[int, int, int]] = {}
        # blocks of this step's checkpoints, held so that two of them do not get the same block
        self._fresh: list[KVCacheBlock] = []

    def bind(self, separators: "RequestSeparators", checkpoint_interval: int) -> None:
        """Give the manager the requests' tokens; the scheduler does so before any request."""
        self._separators = separators
        self._interval = checkpoint_interval

    # ------------------------------------------------------------------ block accounting

    def _num_spilled(self, request_id: str, num_tokens: int) -> int:
        left = layout.num_left_window(self.policy, num_tokens)
        return self._separators.count_below(request_id, left)

    def num_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks the request holds once ``num_tokens`` of its tokens are computed."""
        first, last, known = self._same_blocks.get(request_id, (0, -1, 0))
        if first <= num_tokens <= last:
            return known
        num_spilled = self._num_spilled(request_id, num_tokens)
        entries = layout.compact_length(self.policy, num_tokens, num_spilled)
        num_blocks = cdiv(entries, self.block_size)
        # a token adds one entry at most, and never takes one away
        room = num_blocks * self.block_size - entries
        self._same_blocks[request_id] = (num_tokens, num_tokens + room, num_blocks)
        return num_blocks

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
        num_new = max(0, self.num_blocks(request_id, num_tokens) - held)
        if new_computed_blocks:
            num_new += len(self._written_blocks(request_id, num_local_computed_tokens))
            num_new += self._get_num_evictable_blocks(new_computed_blocks)
        return num_new

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; ``num_tokens`` are the request's, not compact entries."""
        copies = self._copy_hit_blocks(request_id)
        slots = self.num_blocks(request_id, num_tokens) * self.block_size
        return copies + super().allocate_new_blocks(request_id, slots, slots)

    # ------------------------------------------------------------------ starting from a checkpoint

    @contextmanager
    def looking_up(self, request: Request) -> Iterator[None]:
        """Say whose prefix vLLM is about to look for: it passes hashes of whole blocks only."""
        self._looked_up = request
        try:
            yield
        finally:
            self._looked_up = None

    def find_longest_cache_hit(  # type: ignore[override]  # vLLM calls it on the instance
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
        """The longest checkpoint of the request, unless taking it would keep the request out."""
        request = self._looked_up
        assert request is not None, "the scheduler says whose prefix is looked up"
        self._want_checkpoints(request)
        found = self._checkpoints.find(request.block_hashes, request._all_token_ids, max_length)
        if found is None:
            return ([],), 0
        blocks = [block for block, _ in found.blocks]
        needed = self.get_num_blocks_to_allocate(
            request.request_id, request.num_tokens, blocks, 0, found.position, 0
        )
        # the copies make a hit dearer than a miss: in a full pool it must not keep anyone out
        if needed > self.block_pool.get_num_free_blocks():
            return ([],), 0
        return (blocks,), found.position

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
        self.block_pool.touch(new_computed_blocks)
        blocks.extend(new_computed_blocks)
        # vLLM's mark of a request that is past its lookup
        self.num_cached_block[request_id] = len(blocks)
        self._to_copy[request_id] = self._written_blocks(request_id, num_local_computed_tokens)

    def _copy_hit_blocks(self, request_id: str) -> list[KVCacheBlock]:
        """Replace the blocks the request will write by copies, made before the step's forward."""
        copies = []
        for index in self._to_copy.pop(request_id, ()):
            (copy,) = self.block_pool.get_new_blocks(1)
            self._apply_cow(request_id, index, self.req_to_blocks[request_id][index], copy)
            copies.append(copy)
        return copies

    def _written_blocks(self, request_id: str, num_tokens: int) -> list[int]:
        return checkpoint.written_blocks(
            self.policy,
            self.block_size,
            num_tokens,
            self._num_spilled(request_id, num_tokens),
            may_wrap=self._may_wrap(self._separators.request(request_id)),
        )

    def _may_wrap(self, request: Request) -> bool:
        """Whether the request could spill more than max_separators before it ends.

        Never turns true once it was false: unknown tokens count as separators.
        """
        limit = self.policy.max_separators
        if limit is None:
            return False
        known = request.num_tokens
        unknown = max(0, request.num_prompt_tokens + request.max_tokens - known)
        num_separators = self._separators.count_below(request.request_id, known)
        return request.resumable or num_separators + unknown > limit

    # ------------------------------------------------------------------ leaving checkpoints

    def _want_checkpoints(self, request: Request) -> None:
        """Where requests like this one begin alike, and the last block of its prompt.

        A request that has to wait is looked up again and again, but compared with others once.
        """
        if request.request_id in self._wanted:
            return
        common = self._checkpoints.common_prefix(request.block_hashes)
        last = (request.num_prompt_tokens - 1) // self.block_size * self.block_size
        self._wanted[request.request_id] = (common, last)

    def take_snapshots(self, request: Request, start: int, end: int) -> tuple[PlannedSnapshot, ...]:
        """Blocks for the checkpoints that the step [start, end) passes; the step fills them."""
        if not self.enable_caching:
            return ()
        wanted = self._wanted.get(request.request_id, ())
        positions = checkpoint.checkpoint_positions(
            start, end, interval=self._interval, wanted=wanted
        )
        planned = []
        for position in positions:
            blocks = self._snapshot_blocks(request, position)
            if blocks:
                planned.append(PlannedSnapshot(position, blocks))
        return tuple(planned)

    def release_snapshots(self) -> None:
        """The step is planned: its checkpoints belong to nobody, so no admission waits for them."""
        self.block_pool.free_blocks(self._fresh)
        self._fresh = []

    def _snapshot_blocks(self, request: Request, position: int) -> dict[int, int]:
        """Compact block index -> block of the pool; empty: no checkpoint there."""
        num_hashes = position // self.block_size
        if not 0 < num_hashes <= len(request.block_hashes):
            return {}
        block_hash = request.block_hashes[num_hashes - 1]
        if self._checkpoints.has(block_hash, ()):
            return {}
        own = self._written_blocks(request.request_id, position)
        if len(own) > self.block_pool.get_num_free_blocks():
            return {}
        fresh = dict(zip(own, self.block_pool.get_new_blocks(len(own)), strict=True))
        blocks = self.req_to_blocks[request.request_id]
        num_blocks = self.num_blocks(request.request_id, position)
        state = [fresh.get(i, blocks[i]) for i in range(num_blocks)]
        self._checkpoints.add(block_hash, position, (), state)
        self._fresh.extend(fresh.values())
        return {i: block.block_id for i, block in fresh.items()}

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """See the base class; the blocks of a request that ends are a checkpoint as they are."""
        if self.enable_caching and request_id in self.req_to_blocks:
            self._keep_final_state(self._separators.request(request_id))
        self._to_copy.pop(request_id, None)
        self._wanted.pop(request_id, None)
        self._same_blocks.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _keep_final_state(self, request: Request) -> None:
        position = request.num_computed_tokens
        num_hashes = position // self.block_size
        token_ids = request._all_token_ids
        is_known = 0 < num_hashes <= len(request.block_hashes) and position <= len(token_ids)
        # vLLM's hashes say what is behind a placeholder token, the token itself does not
        if not is_known or request.mm_features or request.request_id in self._to_copy:
            return
        rest = tuple(token_ids[num_hashes * self.block_size : position])
        block_hash = request.block_hashes[num_hashes - 1]
        if self._checkpoints.has(block_hash, rest):
            return
        num_blocks = self.num_blocks(request.request_id, position)
        blocks = self.req_to_blocks[request.request_id][:num_blocks]
        self._checkpoints.add(block_hash, position, rest, blocks)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Nothing: blocks are cached as parts of checkpoints, not by token position."""
