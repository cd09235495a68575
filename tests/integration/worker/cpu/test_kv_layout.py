"""Where vLLM's CPU kernels put KV, asked of the kernels themselves."""

import pytest
import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_sepllm.integration.worker.cpu.kv_layout import (
    StridedPart,
    copy_elements,
    probe_layout,
    split_cache,
)

NUM_BLOCKS, NUM_HEADS = 5, 3


def filled_cache(
    head_size: int, block_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """A cache whose every slot but the last block's was written; K, V and the instruction set."""
    isa = _get_attn_isa(dtype, block_size, head_size)
    num_slots = (NUM_BLOCKS - 1) * block_size
    gen = torch.Generator().manual_seed(0)
    key, value = (
        torch.randn(num_slots, NUM_HEADS, head_size, generator=gen).to(dtype) for _ in range(2)
    )
    kv_cache = torch.full((NUM_BLOCKS, NUM_HEADS, block_size, 2 * head_size), float("nan"))
    kv_cache = kv_cache.to(dtype)
    vllm_ops.cpu_attn_reshape_and_cache(
        key, value, *split_cache(kv_cache), torch.arange(num_slots), isa
    )
    return kv_cache, key, value, isa


@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gathered_blocks_are_what_was_written(
    head_size: int, block_size: int, dtype: torch.dtype
) -> None:
    kv_cache, key, value, isa = filled_cache(head_size, block_size, dtype)
    layout = probe_layout(NUM_HEADS, head_size, block_size, dtype, isa)
    blocks = torch.tensor([2, 0, 3])
    got = layout.gather(kv_cache, blocks)
    rows = torch.cat([torch.arange(b * block_size, (b + 1) * block_size) for b in blocks.tolist()])
    assert torch.equal(got[..., :head_size], key[rows].transpose(0, 1))
    assert torch.equal(got[..., head_size:], value[rows].transpose(0, 1))


@pytest.mark.parametrize("head_size", [64, 80])
def test_copied_slots_carry_every_bit_and_nothing_else_moves(head_size: int) -> None:
    block_size = 32
    kv_cache, _, _, isa = filled_cache(head_size, block_size, torch.bfloat16)
    layout = probe_layout(NUM_HEADS, head_size, block_size, torch.bfloat16, isa)
    before = layout.gather(kv_cache, torch.arange(NUM_BLOCKS))
    source, target = torch.tensor([5, 70, 33]), torch.tensor([129, 4, 100])
    copy_elements(kv_cache, layout.slot_elements(source), layout.slot_elements(target))
    after = layout.gather(kv_cache, torch.arange(NUM_BLOCKS))
    want = before.clone()
    want[:, target] = before[:, source]
    assert torch.equal(after.view(torch.int16), want.view(torch.int16))


def test_an_order_without_strides_is_seen() -> None:
    """Pairs of elements, as "amx" has them, are a view; two exchanged elements are none."""
    token, element = torch.arange(32)[:, None], torch.arange(64)
    pairs = element // 2 * 64 + token * 2 + element % 2
    part = StridedPart.of(pairs)
    assert part is not None
    places = torch.arange(pairs.numel()).as_strided(part.shape, part.strides, part.first)
    assert torch.equal(places.reshape(pairs.shape), pairs)
    pairs[3, [1, 2]] = pairs[3, [2, 1]]
    assert StridedPart.of(pairs) is None


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        probe_layout(1, 64, 32, torch.float32, "no such isa")
