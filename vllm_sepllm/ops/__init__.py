"""Public operations: check the arguments, then call one implementation."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from vllm_sepllm.kernels.arguments import Logits, PagedCache, SpillTable
from vllm_sepllm.ops import checks
from vllm_sepllm.policy.keys.tiles import PrefillTiles, rank_bound
from vllm_sepllm.policy.visibility import BatchPolicy, IntArray

if TYPE_CHECKING:
    from vllm_sepllm.kernels.tuning import Tuning

__all__ = [
    "Impl",
    "Logits",
    "PagedCache",
    "PrefillMetadata",
    "SpillTable",
    "entry_slots",
    "list_keys",
    "prefill",
    "prefill_tile_tokens",
    "spill",
]

Impl = Literal["triton", "reference"]


@dataclass(frozen=True, slots=True)
class PrefillMetadata:
    """:class:`vllm_sepllm.policy.keys.tiles.PrefillTiles` on the device; int32, same columns.

    Attributes:
        tiles: [num_tiles, 8]; rows of zeros are skipped, so a persistent buffer may be padded.
        requests: [num_requests, 13].
        separators: [num_separators].
        until: [num_positions].
        num_keys: [num_requests] int64 on the CPU.
        tile_tokens: tokens of a full tile.
        policy: that the tables were made for; the window of each request is in its row.
        keys: [2, >= sum of num_keys] int32 from :func:`list_keys`, which the kernel needs: for each
            key its slot, or its row in the chunk, and then its until.
    """

    tiles: torch.Tensor
    requests: torch.Tensor
    separators: torch.Tensor
    until: torch.Tensor
    num_keys: IntArray
    tile_tokens: int
    policy: BatchPolicy
    keys: torch.Tensor | None = None

    @classmethod
    def from_packed(
        cls, tables: PrefillTiles, policy: BatchPolicy, packed: torch.Tensor
    ) -> "PrefillMetadata":
        """Name the parts of ``packed``, the caller's device copy of ``tables.packed`` (or longer).

        Raises:
            ValueError: if ``packed`` is not int32 or too short.
        """
        if packed.dtype != torch.int32 or packed.dim() != 1 or packed.numel() < tables.packed.size:
            raise ValueError(
                f"packed must be int32 [{tables.packed.size}] or longer, got {packed.dtype} "
                f"{tuple(packed.shape)}"
            )
        tiles, requests, separators, until = (
            packed[first : first + table.size].view(table.shape)
            for first, table in zip(tables.offsets, tables.tables, strict=True)
        )
        return cls(tiles, requests, separators, until, tables.num_keys, tables.tile_tokens, policy)

    @classmethod
    def on(
        cls, device: torch.device | str, tables: PrefillTiles, policy: BatchPolicy
    ) -> "PrefillMetadata":
        """Copy the tables to a device; for callers without a persistent buffer."""
        return cls.from_packed(tables, policy, torch.from_numpy(tables.packed).to(device))


def prefill_tile_tokens(
    num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype
) -> int:
    """Query tokens a tile for :func:`vllm_sepllm.policy.keys.tiles.plan_tiles`.

    A tile holds all query heads of one KV head: they share the loaded keys, and the fewer tokens a
    tile spans, the fewer keys outside each query's own window it touches.
    """
    from vllm_sepllm.kernels.tuning import tuning_for

    group = num_heads // num_kv_heads
    return tuning_for(head_size, dtype.itemsize, group).block_rows // group


def spill(
    table: SpillTable, src: torch.Tensor, dst: torch.Tensor, *, impl: Impl = "triton"
) -> None:
    """Copy KV rows of slots ``src[i]`` to ``dst[i]`` in all caches of a table, in place.

    Args:
        table: the caches.
        src: [num_moves] int64 slots; slot = block_id * block_size + offset.
        dst: [num_moves] int64 slots; a negative one skips that move.
        impl: which implementation runs; there is no silent fallback.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Bytes are copied as they are. Moves run in any order, so no slot may be in both ``src`` and
    ``dst`` or twice in ``dst``. Slots are not range-checked: reading them would stall the device.
    """
    device = table.addresses.device
    for name, slots in (("src", src), ("dst", dst)):
        if slots.dim() != 1 or slots.shape != src.shape or slots.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 [{src.numel()}], got {slots.dtype} {tuple(slots.shape)}"
            )
        if slots.device != device or not slots.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous on {device} like the caches, got {slots.device}, "
                f"strides {slots.stride()}"
            )
    if impl == "reference":
        from vllm_sepllm.ops import reference

        return reference.spill(table.caches, src, dst)
    from vllm_sepllm.kernels import spill as kernel

    return kernel.launch(table, src, dst)


def entry_slots(
    entries: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
    *,
    impl: Impl = "triton",
) -> None:
    """Where compact entries lie in the paged cache: slot = block_id * block_size + offset.

    Args:
        entries: [2, num_entries] int64: row of the block table, then compact index; a negative
            index stands for no entry.
        block_table: [num_rows, max_blocks] int32, rows contiguous.
        block_size: tokens a block.
        out: [num_entries] int64; -1 where there is no entry.
        impl: which implementation runs; there is no silent fallback.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Rows and indices are not range-checked: reading them would stall the device.
    """
    if entries.dim() != 2 or entries.shape[0] != 2 or entries.dtype != torch.int64:
        raise ValueError(
            f"entries must be int64 [2, num_entries], got {entries.dtype} {tuple(entries.shape)}"
        )
    if out.shape != entries.shape[1:] or out.dtype != torch.int64:
        raise ValueError(
            f"out must be int64 [{entries.shape[1]}], got {out.dtype} {tuple(out.shape)}"
        )
    if not (entries.is_contiguous() and out.is_contiguous()):
        raise ValueError("entries and out must be contiguous")
    checks.check_block_table("block_table", block_table)
    for name, tensor in (("block_table", block_table), ("out", out)):
        if tensor.device != entries.device:
            raise ValueError(f"{name} is on {tensor.device}, entries on {entries.device}")
    if impl == "reference":
        from vllm_sepllm.ops import reference

        return reference.entry_slots(entries, block_table, block_size, out)
    from vllm_sepllm.kernels import slots as kernel

    return kernel.launch(entries, block_table, block_size, out)


def list_keys(
    metadata: PrefillMetadata,
    block_table: torch.Tensor,
    block_size: int,
    *,
    impl: Impl = "triton",
) -> PrefillMetadata:
    """Find the keys that each prefill chunk reads, once for all layers of a step.

    Args:
        metadata: tiles of the step.
        block_table: [num_rows, max_blocks] int32, rows contiguous.
        block_size: tokens a block.
        impl: which implementation runs; there is no silent fallback.

    Returns:
        ``metadata`` with ``keys``.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    The tables are not range-checked: reading them would stall the device.
    """
    checks.check_block_table("block_table", block_table)
    if block_table.device != metadata.requests.device:
        raise ValueError(
            f"block_table is on {block_table.device}, metadata on {metadata.requests.device}"
        )
    # an even number of 16 bytes: Triton specialises on the alignment of pointers
    length = -(-int(metadata.num_keys.sum()) // 8) * 8
    out = torch.empty(2, length, dtype=torch.int32, device=block_table.device)
    tables = (metadata.requests, metadata.separators, metadata.until)
    if impl == "reference":
        from vllm_sepllm.ops import reference

        reference.list_keys(*tables, block_table, block_size, out, policy=metadata.policy)
    else:
        from vllm_sepllm.kernels import keys as kernel

        most = int(metadata.num_keys.max(initial=0))
        numbers = (metadata.policy.initial_tokens, rank_bound(metadata.policy))
        kernel.launch(tables, block_table, block_size, most, numbers, out)
    return replace(metadata, keys=out)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    metadata: PrefillMetadata,
    logits: Logits,
    out: torch.Tensor,
    *,
    impl: Impl = "triton",
    tuning: "Tuning | None" = None,
) -> None:
    """Attention of prefill chunks to the compact cache and to the chunks' own keys.

    Reads the cache as it was before the step; the caller writes the survivors afterwards.

    Args:
        query: [num_tokens, num_heads, head_size], bf16, fp16 or fp32.
        key: [num_tokens, num_kv_heads, head_size], of the query's dtype.
        value: like ``key``.
        cache: the layer's KV.
        metadata: tiles of the step.
        logits: the layer's scale, soft cap and sinks.
        out: like ``query``, of any float dtype; rows outside the chunks are left alone.
        impl: which implementation runs; there is no silent fallback.
        tuning: the kernel's launch instead of the table's; for timing.

    Raises:
        ValueError: on a wrong shape, dtype, stride or device.

    The tables are not range-checked: reading them would stall the device.
    """
    checks.check_activations(query, key, value, out)
    checks.check_cache(query, key, cache)
    checks.check_logits_and_tables(query, cache, metadata.tiles, logits)
    if impl == "reference":
        from vllm_sepllm.ops import reference

        reference.prefill(
            query, key, value, cache.key, cache.value, cache.block_table,
            metadata.requests, metadata.separators, out, policy=metadata.policy,
            scale=logits.scale, soft_cap=logits.soft_cap, sinks=logits.sinks, scales=cache.scales,
        )  # fmt: skip
    else:
        _prefill_triton(query, key, value, cache, metadata, logits, out, tuning)


def _prefill_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    metadata: PrefillMetadata,
    logits: Logits,
    out: torch.Tensor,
    tuning: "Tuning | None",
) -> None:
    from vllm_sepllm.kernels import prefill as kernel
    from vllm_sepllm.kernels.tuning import tuning_for

    group = query.shape[1] // key.shape[1]
    tuning = tuning or tuning_for(query.shape[2], query.element_size(), group)
    if metadata.tile_tokens * group > tuning.block_rows:
        raise ValueError(
            f"metadata.tile_tokens must be <= {tuning.block_rows // group} here, got "
            f"{metadata.tile_tokens}: ask ops.prefill_tile_tokens"
        )
    if metadata.keys is None:
        raise ValueError("metadata.keys must be listed before the first layer: ops.list_keys")
    tables = (metadata.tiles, metadata.requests, metadata.keys)
    policy = (metadata.policy.initial_tokens, rank_bound(metadata.policy))
    kernel.launch(query, key, value, cache, tables, policy, logits, out, tuning)
