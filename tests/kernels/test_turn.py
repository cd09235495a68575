"""Runs on a GPU if there is one, else in Triton's interpreter (see conftest.py)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm import ops
from vllm_sepllm.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_POSITIONS = 50
# from one value of a dtype to the next: the interpreter cuts bfloat16 off instead of rounding it,
# and of a product and a sum a GPU may make one operation
STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}
IN_INTERPRETER = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter cuts bfloat16 off")


def rotation(rotary_dim: int, *, is_neox_style: bool) -> ops.KeyRotation:
    frequency = 1e4 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(NUM_POSITIONS)[:, None] * frequency
    return ops.KeyRotation(angles.cos().to(DEVICE), angles.sin().to(DEVICE), is_neox_style)


def make_caches(num_layers, num_heads, block_size, size, dtype, layout, num_blocks):
    """NaN everywhere; views of K as vLLM lays them out, in front of V, and the whole memory."""
    sizes = {"l": num_layers, "b": num_blocks, "h": num_heads, "t": block_size, "d": 2 * size}
    memory = torch.full([sizes[dim] for dim in layout], math.nan, dtype=dtype, device=DEVICE)
    views = memory.permute([layout.index(dim) for dim in "lbhtd"])
    return memory, [view[..., :size] for view in views]


@settings(deadline=None, max_examples=40)
@given(
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([1, 3, 8]),
    block_size=st.sampled_from([1, 16]),
    sizes=st.sampled_from([(64, 64), (128, 128), (80, 20), (96, 96), (64, 16), (63, 2)]),
    dtype=st.sampled_from(list(STEP)),
    layout=st.sampled_from(["lbhtd", "lbthd", "blthd", "lbhdt", "bhltd"]),
    num_entries=st.sampled_from([0, 1, 2, 7]),
    is_neox_style=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_keys_are_those_of_the_reference(
    num_layers, num_heads, block_size, sizes, dtype, layout, num_entries, is_neox_style, seed
) -> None:
    """Proves it for heads that turn in part, both orders of pairs, moves in both directions and
    cache layouts; neither V, nor other slots, nor those of skipped entries are touched."""
    size, rotary_dim = sizes
    gen = torch.Generator().manual_seed(seed)
    num_blocks = num_entries + 1
    shape = (num_layers, num_heads, block_size, size, dtype, layout, num_blocks)
    memory, caches = make_caches(*shape)
    wanted, copies = make_caches(*shape)
    slots = torch.randperm(num_blocks * block_size, generator=gen)[:num_entries]
    delta = torch.randint(1 - NUM_POSITIONS, NUM_POSITIONS, (num_entries,), generator=gen)
    for cache, copy in zip(caches, copies, strict=True):
        for slot in slots.tolist():
            row = torch.randn(num_heads, size, generator=gen).to(dtype)
            for view in (cache, copy):
                view[slot // block_size, :, slot % block_size] = row.to(DEVICE)
    before = memory.clone()
    slots[2::3] = -1
    slots, delta = slots.to(DEVICE), delta.to(DEVICE)
    turns = rotation(rotary_dim, is_neox_style=is_neox_style)
    reference.turn(copies, turns, slots, delta)
    ops.turn(ops.CacheTable.build(caches), turns, slots, delta)
    tolerance = {"rtol": STEP[dtype], "atol": 2**-20}
    torch.testing.assert_close(memory, wanted, **tolerance, equal_nan=True)
    if delta.count_nonzero() == num_entries and (slots >= 0).any():
        assert not torch.equal(memory.nan_to_num(), before.nan_to_num()), "keys have turned"


def test_more_heads_than_a_program_turns() -> None:
    """Heads of 256 elements: a program turns 16 of them, so 40 take three."""
    cache = torch.randn(2, 40, 1, 256, device=DEVICE)
    turns = rotation(256, is_neox_style=True)
    slots, delta = (torch.tensor([number], device=DEVICE) for number in (1, -3))
    wanted = cache.clone()
    wanted[1, :, 0] = turns.turned(cache[1:2, :, 0], delta)[0]
    ops.turn(ops.CacheTable.build([cache]), turns, slots, delta)
    torch.testing.assert_close(cache, wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=IN_INTERPRETER)]
)
def test_half_precision_is_rounded_once_to_the_nearest(dtype: torch.dtype) -> None:
    """Proves it by a key that turns to and fro: it comes back, but for two roundings."""
    cache = torch.randn(64, 1, 1, 64, device=DEVICE).to(dtype)
    before = cache.clone()
    turns, table = rotation(64, is_neox_style=False), ops.CacheTable.build([cache])
    slots = torch.arange(64, device=DEVICE)
    delta = torch.randint(1, NUM_POSITIONS, (64,), device=DEVICE)
    ops.turn(table, turns, slots, delta)
    ops.turn(table, turns, slots, -delta)
    error = (cache.float() - before.float()).norm() / before.float().norm()
    # one rounding to the nearest is off by less than a fifth of a step on average, a cut by half
    assert 0 < error < 0.4 * STEP[dtype]


def test_error_names_the_argument_and_the_value() -> None:
    cache = torch.zeros(1, 1, 4, 8, device=DEVICE)
    turns, table = rotation(8, is_neox_style=True), ops.CacheTable.build([cache])
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"slots must be int64 \[2\], got torch.int32"):
        ops.turn(table, turns, ids.int(), ids)
    with pytest.raises(ValueError, match=r"delta must be int64 \[2\], got torch.int64 \(1,\)"):
        ops.turn(table, turns, ids, ids[:1])
    with pytest.raises(ValueError, match="rotation turns 16 elements of a head, keys have 8"):
        ops.turn(table, rotation(16, is_neox_style=True), ids, ids)
    with pytest.raises(ValueError, match=r"keys must be bfloat16, float16 or float32, got .*uint8"):
        ops.turn(ops.CacheTable.build([cache.to(torch.uint8)]), turns, ids, ids)
    doubles = ops.KeyRotation(turns.cos.double(), turns.sin.double(), True)
    with pytest.raises(ValueError, match=r"rotation\.cos must be float32"):
        ops.turn(table, doubles, ids, ids)
    apart = ops.KeyRotation(turns.cos, turns.sin.T.contiguous().T, True)
    with pytest.raises(ValueError, match="sin must be contiguous"):
        ops.turn(table, apart, ids, ids)
