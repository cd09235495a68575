"""Runs on a GPU if there is one, else in Triton's interpreter (see conftest.py)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm import ops
from vllm_sepllm.kernels.arguments import unit_bytes
from vllm_sepllm.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.float8_e4m3fn]


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, gen: torch.Generator) -> torch.Tensor:
    """Any bit pattern, NaN included."""
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=gen).view(dtype)


def make_caches(num_layers, num_heads, block_size, row, dtype, layout, num_blocks, gen):
    """Views [block, head, token, element] of caches that lie in memory in the order of layout."""
    sizes = {"l": num_layers, "b": num_blocks, "h": num_heads, "t": block_size, "d": row}
    memory = random_bytes(tuple(sizes[dim] for dim in layout), dtype, gen).to(DEVICE)
    return memory, list(memory.permute([layout.index(dim) for dim in "lbhtd"]).unbind())


@settings(deadline=None, max_examples=30)
@given(
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([1, 3, 8]),
    block_size=st.sampled_from([1, 16]),
    row=st.sampled_from([1, 63, 96, 128]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["lbhtd", "lbthd", "blthd", "lbhdt", "bhltd"]),
    num_moves=st.integers(0, 6),
    seed=st.integers(0, 2**16),
)
def test_moves_bytes_in_every_cache(
    num_layers, num_heads, block_size, row, dtype, layout, num_moves, seed
) -> None:
    gen = torch.Generator().manual_seed(seed)
    num_blocks = 2 * num_moves + 1
    sizes = (num_layers, num_heads, block_size, row, dtype, layout, num_blocks)
    memory, caches = make_caches(*sizes, gen)
    wanted, copies = make_caches(*sizes, gen.manual_seed(seed))
    slots = torch.randperm(num_blocks * block_size, generator=gen).to(DEVICE)
    src, dst = slots[:num_moves].clone(), slots[num_moves : 2 * num_moves].clone()
    dst[::3] = -1
    reference.spill(copies, src, dst)
    ops.spill(ops.CacheTable.build(caches), src, dst)
    assert torch.equal(memory.view(torch.uint8), wanted.view(torch.uint8))


def test_key_and_value_halves_are_two_caches() -> None:
    """vLLM's [2, num_blocks, block_size, heads, size] and [num_blocks, heads, tokens, 2 * size]."""
    apart = torch.randn(2, 5, 4, 3, 8, device=DEVICE)
    joined = torch.randn(5, 3, 4, 16, device=DEVICE)
    src, dst = (torch.tensor([slot], device=DEVICE) for slot in (6, 17))
    ops.spill(ops.CacheTable.build(list(apart.transpose(2, 3))), src, dst)
    ops.spill(ops.CacheTable.build([joined]), src, dst)
    assert torch.equal(apart[:, 4, 1], apart[:, 1, 2])
    assert torch.equal(joined[4, :, 1], joined[1, :, 2])


def test_more_heads_than_a_program_moves() -> None:
    """Rows of 255 bytes: a program moves 16 heads, so 40 take three."""
    cache = torch.randint(0, 256, (3, 40, 2, 255), dtype=torch.uint8).to(DEVICE)
    src, dst = (torch.tensor([slot], device=DEVICE) for slot in (1, 4))
    wanted = cache.clone()
    wanted[2, :, 0] = cache[0, :, 1]
    ops.spill(ops.CacheTable.build([cache]), src, dst)
    assert torch.equal(cache, wanted)


def test_copies_the_widest_integers_that_fit() -> None:
    assert unit_bytes([64, 128], 2, (1024, 512, 64, 1), 64) == 8
    assert unit_bytes([64, 130], 2, (1024, 512, 64, 1), 64) == 2
    assert unit_bytes([64], 1, (63 * 16, 63 * 16, 63, 1), 63) == 1
    assert unit_bytes([64], 2, (1024, 1024, 1, 16), 64) == 2
    assert unit_bytes([64], 2, (4096, 2048, 128, 2), 64) == 2


def test_error_names_the_argument_and_the_value() -> None:
    cache = torch.zeros(1, 1, 4, 8, device=DEVICE)
    ids = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"src must be int64 \[2\], got torch.int32"):
        ops.spill(ops.CacheTable.build([cache]), ids, ids)
    with pytest.raises(ValueError, match=r"caches must agree in .*caches\[1\]"):
        ops.CacheTable.build([cache, torch.zeros(1, 1, 8, 4, device=DEVICE).transpose(2, 3)])
    with pytest.raises(ValueError, match="one or more"):
        ops.CacheTable.build([])
