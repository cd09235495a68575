"""Public operations on a paged KV cache: check the arguments, then launch a Triton kernel.

A step on a GPU: :func:`entry_slots` finds where entries lie, :func:`turn` gives keys another
position, :func:`spill` moves entries, :func:`list_keys` lists once for all layers what the prefill
chunks read, and :func:`prefill` attends, layer by layer. The kernels are in
``vllm_sepllm.kernels``; each has an oracle in torch of the same name in
:mod:`vllm_sepllm.ops.reference`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_sepllm.kernels.arguments import (
    MAX_HEAD_SIZE,
    CacheTable,
    KeyLists,
    Logits,
    PagedCache,
)
from vllm_sepllm.ops import checks
from vllm_sepllm.ops.rotation import KeyRotation
from vllm_sepllm.ops.tables import PrefillMetadata

if TYPE_CHECKING:
    from vllm_sepllm.kernels.tuning import Tuning

__all__ = [
    "MAX_HEAD_SIZE",
    "CacheTable",
    "KeyLists",
    "KeyRotation",
    "Logits",
    "PagedCache",
    "PrefillMetadata",
    "entry_slots",
    "list_keys",
    "prefill",
    "prefill_tile_tokens",
    "spill",
    "turn",
]


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


def spill(table: CacheTable, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy KV rows of slots ``src[i]`` to ``dst[i]`` in all caches of a table, in place.

    Args:
        table: the caches.
        src: [num_moves] int64 slots; slot = block_id * block_size + offset.
        dst: [num_moves] int64 slots; a negative one skips that move.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Bytes are copied as they are. Moves run in any order, so no slot may be in both ``src`` and
    ``dst`` or twice in ``dst``. Slots are not range-checked: reading them would stall the device.
    """
    checks.check_moves(src, dst, table.addresses.device)
    from vllm_sepllm.kernels import spill as kernel

    return kernel.launch(table, src, dst)


def turn(
    table: CacheTable,
    rotation: KeyRotation,
    slots: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Give the keys of some slots another position in all caches of a table, in place.

    Args:
        table: views of the layers' keys, [num_blocks, num_kv_heads, block_size, head_size].
        rotation: how their keys turn.
        slots: [num_entries] int64 slots, each at most once; a negative one is skipped.
        delta: [num_entries] int64, new position less old one; below the table's length either way.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Computed in float32 and rounded once. Slots and distances are not range-checked: reading them
    would stall the device.
    """
    checks.check_turn(table, rotation, slots, delta)
    from vllm_sepllm.kernels import turn as kernel

    cos, sin, is_neox_style = rotation.cos, rotation.sin, rotation.is_neox_style
    return kernel.launch(table, cos, sin, slots, delta, is_neox_style=is_neox_style)


def entry_slots(
    entries: torch.Tensor,
    block_table: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
) -> None:
    """Where compact entries lie in the paged cache: slot = block_id * block_size + offset.

    Args:
        entries: [2, num_entries] int64: row of the block table, then compact index; a negative
            index stands for no entry.
        block_table: [num_rows, max_blocks] int32, rows contiguous.
        block_size: tokens a block.
        out: [num_entries] int64; -1 where there is no entry.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Rows and indices are not range-checked: reading them would stall the device.
    """
    checks.check_entries(entries, block_table, out)
    from vllm_sepllm.kernels import slots as kernel

    return kernel.launch(entries, block_table, block_size, out)


def list_keys(
    metadata: PrefillMetadata,
    block_table: torch.Tensor,
    block_size: int,
) -> PrefillMetadata:
    """Find the keys that each prefill chunk reads, once for all layers of a step.

    Args:
        metadata: tiles of the step.
        block_table: [num_rows, max_blocks] int32, rows contiguous.
        block_size: tokens a block.

    Returns:
        ``metadata`` with ``keys``.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    The tables are not range-checked: reading them would stall the device.
    """
    checks.check_block_table(block_table)
    if block_table.device != metadata.requests.device:
        raise ValueError(
            f"block_table is on {block_table.device}, metadata on {metadata.requests.device}"
        )
    # an even number of 16 bytes: Triton specialises on the alignment of pointers
    length = -(-metadata.num_keys // 8) * 8
    place, until = torch.empty(2, length, dtype=torch.int32, device=block_table.device)
    keys = KeyLists(place, until)
    from vllm_sepllm.kernels import keys as kernel

    kernel.launch(
        metadata.requests,
        metadata.separators,
        metadata.until,
        block_table,
        block_size,
        metadata.bound,
        metadata.longest_list,
        keys,
    )
    return replace(metadata, keys=keys)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    metadata: PrefillMetadata,
    logits: Logits,
    out: torch.Tensor,
    *,
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
        tuning: the kernel's launch instead of the table's; for timing.

    Raises:
        ValueError: on a wrong shape, dtype, stride or device.

    The tables are not range-checked: reading them would stall the device.
    """
    checks.check_activations(query, key, value, out)
    checks.check_cache(query, key, cache)
    checks.check_logits_and_tables(query, cache, metadata.tiles, logits)
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
    return kernel.launch(
        query, key, value, cache, metadata.tiles, metadata.keys, logits, out, tuning
    )
