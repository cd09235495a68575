"""Where the elements of one token's KV lie in vLLM's CPU cache.

vLLM's CPU kernels store K and V in an order that depends on the instruction set (``isa``): K in
columns for "vec", interleaved pairs for "amx". The order is theirs to change, so it is asked of
their own write kernel instead of being repeated here.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from vllm import _custom_ops as vllm_ops


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as vLLM's CPU kernels take them.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], contiguous.

    Returns:
        Two views [num_blocks, num_kv_heads, block_size, head_size] (CPUAttentionBackendImpl).
    """
    num_blocks, num_heads, block_size, _ = kv_cache.shape
    cells = kv_cache.view(num_blocks, num_heads, block_size * 2, -1)
    key_cache, value_cache = cells.chunk(2, dim=2)
    return key_cache, value_cache


def _factors(size: int) -> list[int]:
    """The odd factor, then twos."""
    num_twos = (size & -size).bit_length() - 1
    return [size >> num_twos, *[2] * num_twos]


@dataclass(frozen=True, slots=True)
class StridedPart:
    """Where the K or the V elements of a cell lie, as a strided view of the cell.

    Attributes:
        shape: factors of the block size, then of the head size.
        strides: of ``shape``.
        first: the first element.
    """

    shape: list[int]
    strides: list[int]
    first: int

    @classmethod
    def of(cls, elements: torch.Tensor) -> "StridedPart | None":
        """Of [block_size, head_size] places in the cell; None if no such view has them.

        Kernels cut tokens and elements into groups of powers of two, so the factors have strides.
        """
        shape = [factor for size in elements.shape for factor in _factors(size)]
        grid = elements.reshape(shape)
        first = int(elements[0, 0])
        strides = [
            int(grid.movedim(dim, 0).reshape(size, -1)[-1, 0] - first) // max(1, size - 1)
            for dim, size in enumerate(shape)
        ]
        steps = [torch.arange(size) * step for size, step in zip(shape, strides, strict=True)]
        places = torch.stack(torch.meshgrid(steps, indexing="ij")).sum(0) + first
        return cls(shape, strides, first) if torch.equal(places, grid) else None


@dataclass(frozen=True)
class CPUCacheLayout:
    """Element order of one (block, head) cell of ``2 * block_size * head_size`` elements.

    Attributes:
        elements: [block_size, 2 * head_size] int64: where in the cell the K, then the V elements
            of each token lie.
        parts: the same as views, K and V.
        num_kv_heads: heads per block.
    """

    elements: torch.Tensor
    parts: tuple[StridedPart, StridedPart]
    num_kv_heads: int

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.elements.shape[0]

    @cached_property
    def _offset_elements(self) -> npt.NDArray[np.int64]:
        """[block_size, num_kv_heads * 2 * head_size]: of each offset, counted from its block."""
        head = torch.arange(self.num_kv_heads)[:, None] * self.elements.numel()
        elements: npt.NDArray[np.int64] = (self.elements[:, None] + head).flatten(1).numpy()
        return elements

    def slot_elements(self, slots: torch.Tensor) -> torch.Tensor:
        """Flat element indices of whole slots in a contiguous cache.

        Args:
            slots: [num_slots] int64, block_id * block_size + offset.

        Returns:
            [num_slots * num_kv_heads * 2 * head_size] int64.
        """
        # numpy: half of torch's time on arrays of this size
        block, offset = np.divmod(slots.numpy(), self.block_size)
        found = self._offset_elements.take(offset, 0)
        found += (block * found.shape[1] * self.block_size)[:, None]
        return torch.from_numpy(found).view(-1)

    def gather(self, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        """The KV of whole blocks in token order.

        Args:
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            block_ids: [num_ids] int64.

        Returns:
            [num_kv_heads, num_ids * block_size, 2 * head_size]: K, then V of each token. Slots
            that were never written come along as they are.
        """
        blocks = kv_cache.index_select(0, block_ids)
        num_blocks, num_heads, block_size, size = blocks.shape
        tokens = blocks.new_empty(num_heads, num_blocks, block_size, 2, size // 2)
        block, cell = blocks.stride()[:2]
        for number, part in enumerate(self.parts):
            shape = (num_heads, num_blocks, *part.shape)
            elements = blocks.as_strided(shape, (cell, block, *part.strides), part.first)
            tokens[:, :, :, number].view(shape).copy_(elements)
        return tokens.view(num_heads, num_blocks * block_size, size)


def copy_elements(kv_cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy flat elements inside a contiguous cache. All are read before any is written."""
    flat = kv_cache.view(-1)
    flat.index_copy_(0, target, flat.index_select(0, source))


@lru_cache
def probe_layout(
    num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, isa: str
) -> CPUCacheLayout:
    """Find the element order by writing numbered elements, one binary digit at a time.

    Digits, not numbers: 0 and 1 are exact in every dtype.

    Raises:
        RuntimeError: if vLLM's kernel does not put every element in a place of its own, or not in
            an order that a strided view has.
    """
    num_elements = block_size * head_size
    # K elements are numbered 0 .. N-1, V elements N .. 2N-1, token by token
    number = torch.arange(2 * num_elements).view(2, block_size, 1, head_size)
    found = torch.zeros(2 * num_elements, dtype=torch.int64)
    for digit in range((2 * num_elements - 1).bit_length()):
        key, value = ((number >> digit) & 1).to(dtype)
        kv_cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
        slots = torch.arange(block_size)
        vllm_ops.cpu_attn_reshape_and_cache(
            key.contiguous(), value.contiguous(), *split_cache(kv_cache), slots, isa
        )
        found += kv_cache.view(-1).to(torch.int64) << digit
    is_known = torch.equal(found.sort().values, torch.arange(2 * num_elements))
    place = found.argsort()
    of_key, of_value = place.view(2, block_size, head_size)
    key_part, value_part = StridedPart.of(of_key), StridedPart.of(of_value)
    if not is_known or key_part is None or value_part is None:
        raise RuntimeError(
            f"sepllm does not understand how vLLM's CPU kernel {isa!r} stores KV for head size "
            f"{head_size}, block size {block_size}, {dtype}; try --block-size 32 or another dtype"
        )
    elements = torch.cat([of_key, of_value], dim=1)
    return CPUCacheLayout(elements, (key_part, value_part), num_kv_heads)
