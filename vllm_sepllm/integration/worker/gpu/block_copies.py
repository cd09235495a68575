"""Copy-on-write copies of blocks, in slices: vLLM makes those of a step through one temporary."""

from collections.abc import Callable, Iterable, Sequence

import torch
import vllm.v1.worker.gpu.model_runner as runner_v2
import vllm.v1.worker.gpu_model_runner as runner_v1
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

from vllm_sepllm.integration.patch import wrap_once

# a prefix hit copies its ring, and hundreds may come at once: as much as activations take anyway
MAX_BYTES = 64 << 20


def install() -> None:
    """Bound the temporary in both model runners; once per process.

    vLLM: ``copy_kv_cache_blocks_inplace`` was made for a block or two a request. To be dropped when
    it copies without a temporary, or in parts.
    """
    for runner in (runner_v1, runner_v2):
        wrap_once(runner, "copy_kv_cache_blocks_inplace", _in_slices)


def _in_slices(
    original: Callable[..., None],
    kv_caches: Iterable[torch.Tensor],
    num_blocks: int,
    kv_cache_block_copies: Sequence[KVCacheBlockCopy],
) -> None:
    # sources are held and targets new: no copy of a step reads what another has written
    caches, copies = list(kv_caches), kv_cache_block_copies
    size = max((_block_bytes(cache, num_blocks) for cache in caches), default=1)
    most = max(1, MAX_BYTES // size)
    for first in range(0, len(copies), most):
        original(caches, num_blocks, copies[first : first + most])


def _block_bytes(cache: torch.Tensor, num_blocks: int) -> int:
    """Bytes that vLLM copies at once for a block: one layer's, or all if layers share blocks."""
    between = cache.stride(0) * cache.element_size() * (cache.shape[0] // num_blocks)
    return max(between, cache.nbytes // num_blocks)
