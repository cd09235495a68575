"""Views of a model's KV caches, which the operations act on. Imports torch only."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# elements of the widest head that the prefill kernel has a launch for (tuning.py)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True, slots=True)
class CacheTable:
    """Caches that one launch acts on together, built once.

    Attributes:
        caches: [num_blocks, num_kv_heads, block_size, row] each, alike in shape, strides and dtype.
        addresses: [num_caches] int64 on the caches' device, their data pointers.
        unit_bytes: bytes that a spill copies as one integer.
    """

    caches: tuple[torch.Tensor, ...]
    addresses: torch.Tensor
    unit_bytes: int

    @classmethod
    def build(cls, caches: Sequence[torch.Tensor]) -> "CacheTable":
        """Take views of the caches of all layers; K and V apart are two caches.

        Raises:
            ValueError: if there is none, or they differ in shape, strides, dtype or device.

        The table keeps the caches alive and must be rebuilt when they are reallocated.
        """
        if not caches or any(cache.dim() != 4 for cache in caches):
            raise ValueError(
                "caches must be one or more [num_blocks, num_kv_heads, block_size, row], got "
                f"{[tuple(cache.shape) for cache in caches]}"
            )
        first = caches[0]
        wanted = (first.shape, first.stride(), first.dtype, first.device)
        for index, cache in enumerate(caches):
            got = (cache.shape, cache.stride(), cache.dtype, cache.device)
            if got != wanted:
                raise ValueError(
                    "caches must agree in shape, strides, dtype and device; caches[0] has "
                    f"{wanted}, caches[{index}] {got}: build one table a kind of layer"
                )
        pointers = [cache.data_ptr() for cache in caches]
        unit = unit_bytes(pointers, first.element_size(), first.stride(), first.shape[3])
        addresses = torch.tensor(pointers, dtype=torch.int64, device=first.device)
        return cls(tuple(caches), addresses, unit)


def unit_bytes(addresses: list[int], element_bytes: int, strides: tuple[int, ...], row: int) -> int:
    """Widest integer, in bytes, that divides every address, stride and row of the caches.

    Args:
        addresses: data pointers of the caches.
        element_bytes: bytes of a cache element.
        strides: (block, head, token, row element), in elements.
        row: elements a row.
    """
    if strides[-1] != 1:  # elements of a row lie apart: no two can be copied as one
        return element_bytes
    sizes = [row * element_bytes, *(stride * element_bytes for stride in strides[:-1]), *addresses]
    return max(unit for unit in (8, 4, 2, 1) if all(size % unit == 0 for size in sizes))


@dataclass(frozen=True, slots=True)
class PagedCache:
    """One layer's KV as views of whatever the backend's layout is.

    Attributes:
        key: [num_blocks, num_kv_heads, block_size, head_size], of the query's dtype or fp8.
        value: like ``key``, with the same strides.
        scales: float32 scalars (key, value) on the device that an fp8 cache is multiplied with.
    """

    key: torch.Tensor
    value: torch.Tensor
    scales: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class KeyLists:
    """The keys that the chunks of a step read, request after request.

    Attributes:
        place: [num_keys] int32, slot of a cached key; of a key of the chunk its row in the chunk.
        until: [num_keys] int32, first position that no longer sees the key.
    """

    place: torch.Tensor
    until: torch.Tensor


@dataclass(frozen=True, slots=True)
class Logits:
    """What a layer does to its logits.

    Attributes:
        scale: factor of query times key.
        soft_cap: c of c * tanh(logits / c); 0: none.
        sinks: [num_heads] logits of a key without value, or None.
    """

    scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
