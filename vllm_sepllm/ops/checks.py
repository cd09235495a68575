"""Checks of the operations' arguments; each raises ValueError with what it wanted and got."""

import torch

from vllm_sepllm.kernels.arguments import CacheTable, Logits, PagedCache
from vllm_sepllm.ops.rotation import KeyRotation

FP8_DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_block_table(table: torch.Tensor) -> None:
    if table.dim() != 2 or table.dtype != torch.int32 or table.stride(1) != 1:
        raise ValueError(
            "block_table must be int32 [num_rows, max_blocks] with contiguous rows, got "
            f"{table.dtype} {tuple(table.shape)}"
        )


def check_moves(src: torch.Tensor, dst: torch.Tensor, device: torch.device) -> None:
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


def check_turn(
    table: CacheTable, rotation: KeyRotation, slots: torch.Tensor, delta: torch.Tensor
) -> None:
    cache, device = table.caches[0], table.addresses.device
    for name, numbers in (("slots", slots), ("delta", delta)):
        if numbers.dim() != 1 or numbers.shape != slots.shape or numbers.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 [{slots.numel()}], got {numbers.dtype} "
                f"{tuple(numbers.shape)}"
            )
    if cache.dtype not in QUERY_DTYPES:
        raise ValueError(f"keys must be bfloat16, float16 or float32, got {cache.dtype}")
    for name, angles in (("cos", rotation.cos), ("sin", rotation.sin)):
        if angles.dim() != 2 or angles.shape != rotation.cos.shape or angles.dtype != torch.float32:
            raise ValueError(
                f"rotation.{name} must be float32 [num_positions, rotary_dim / 2], got "
                f"{angles.dtype} {tuple(angles.shape)}"
            )
    if 2 * rotation.cos.shape[1] > cache.shape[3]:
        raise ValueError(
            f"rotation turns {2 * rotation.cos.shape[1]} elements of a head, keys have "
            f"{cache.shape[3]}"
        )
    tensors = {"slots": slots, "delta": delta, "cos": rotation.cos, "sin": rotation.sin}
    for name, tensor in tensors.items():
        if tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous on {device} like the keys, got {tensor.device}, "
                f"strides {tensor.stride()}"
            )


def check_entries(entries: torch.Tensor, block_table: torch.Tensor, out: torch.Tensor) -> None:
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
    check_block_table(block_table)
    for name, tensor in (("block_table", block_table), ("out", out)):
        if tensor.device != entries.device:
            raise ValueError(f"{name} is on {tensor.device}, entries on {entries.device}")


def check_activations(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out)):
        if tensor.dim() != 3 or tensor.stride()[1:] != (tensor.shape[2], 1):
            raise ValueError(
                f"{name} must be [num_tokens, heads, head_size] with contiguous heads, got shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
    dtypes = [query.dtype, key.dtype, value.dtype]
    if query.dtype not in QUERY_DTYPES or dtypes != [query.dtype] * 3:
        raise ValueError(
            f"query, key and value must share bfloat16, float16 or float32, got {dtypes}"
        )
    shapes = [tuple(tensor.shape) for tensor in (query, key, value, out)]
    if shapes[1] != shapes[2] or key.shape[2] != query.shape[2] or shapes[3] != shapes[0]:
        raise ValueError(
            "key and value must be alike and share head_size with query, out be like query, got "
            f"{shapes}"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of KV heads, got {query.shape[1]} and {key.shape[1]}"
        )


def check_cache(query: torch.Tensor, key: torch.Tensor, cache: PagedCache) -> None:
    wanted = tuple(key.shape[1:])
    for name, part in (("key", cache.key), ("value", cache.value)):
        if part.dim() != 4 or (part.shape[1], part.shape[3]) != wanted:
            raise ValueError(
                f"cache.{name} must be [num_blocks, {wanted[0]}, block_size, {wanted[1]}], got "
                f"{tuple(part.shape)}"
            )
    if cache.key.shape[0] * cache.key.shape[2] >= 2**31:
        raise ValueError(f"cache.key must have < 2**31 slots, got {tuple(cache.key.shape)}")
    layouts = [(part.stride(), part.dtype) for part in (cache.key, cache.value)]
    if layouts[0] != layouts[1]:
        raise ValueError(f"cache.key and cache.value must share strides and dtype, got {layouts}")
    is_fp8 = cache.key.dtype in FP8_DTYPES
    if not is_fp8 and cache.key.dtype != query.dtype:
        raise ValueError(
            f"cache.key must be {query.dtype} or fp8, got {cache.key.dtype}: view uint8 storage "
            "as the platform's fp8 dtype"
        )
    if is_fp8 != (cache.scales is not None):
        raise ValueError(
            f"cache.scales must be given for an fp8 cache and no other, got {cache.key.dtype} "
            f"{'without' if cache.scales is None else 'with'} scales"
        )
    for scale in cache.scales or ():
        if (scale.numel(), scale.dtype, scale.device) != (1, torch.float32, query.device):
            raise ValueError(
                f"cache.scales must be float32 scalars on {query.device}, got {scale.dtype} "
                f"{tuple(scale.shape)} on {scale.device}"
            )


def check_logits_and_tables(
    query: torch.Tensor, cache: PagedCache, tables: torch.Tensor, logits: Logits
) -> None:
    sinks = logits.sinks
    if sinks is not None and (sinks.shape != (query.shape[1],) or not sinks.is_contiguous()):
        raise ValueError(f"logits.sinks must be [{query.shape[1]}], got {tuple(sinks.shape)}")
    if logits.scale <= 0:  # the kernel takes the largest score before it scales
        raise ValueError(f"logits.scale must be > 0, got {logits.scale}")
    if logits.soft_cap < 0:
        raise ValueError(f"logits.soft_cap must be >= 0 (0: none), got {logits.soft_cap}")
    for name, tensor in {"cache": cache.key, "metadata": tables}.items():
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")
