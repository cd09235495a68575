"""Counts the blocks of a request by its compact length instead of its tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_sepllm.policy import layout

if TYPE_CHECKING:
    from vllm_sepllm.integration.request_separators import RequestSeparators


class SepLLMManager(SingleTypeKVCacheManager):
    """vLLM's accounting with one translation: tokens -> compact entries.

    The block table stays vLLM's own, append-only and shorter. Nothing is freed in mid-request.
    """

    _separators: "RequestSeparators"

    def __init__(self, kv_cache_spec: KVCacheSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self.policy = kv_cache_spec.policy  # type: ignore[attr-defined]  # a SepLLMSpec

    def bind(self, separators: "RequestSeparators") -> None:
        """Give the manager the requests' tokens; the scheduler does so before any request."""
        self._separators = separators

    def num_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks the request holds once ``num_tokens`` of its tokens are computed."""
        left = layout.num_left_window(self.policy, num_tokens)
        num_spilled = self._separators.count_below(request_id, left)
        entries = layout.compact_length(self.policy, num_tokens, num_spilled)
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
        """See the base class. There are no computed blocks: prefix caching is off."""
        assert not new_computed_blocks, "prefix caching is off with sepllm"
        held = len(self.req_to_blocks.get(request_id, ()))
        return max(0, self.num_blocks(request_id, num_tokens) - held)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """See the base class; ``num_tokens`` are the request's, not compact entries."""
        slots = self.num_blocks(request_id, num_tokens) * self.block_size
        return super().allocate_new_blocks(request_id, slots, slots)

    @classmethod
    def find_longest_cache_hit(
        cls,
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
        """No hit: prefix caching is off with sepllm."""
        return tuple([] for _ in kv_cache_group_ids), 0
