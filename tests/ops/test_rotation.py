"""Turned keys against RoPE in complex numbers, for both orders of its pairs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.ops.rotation import KeyRotation

NUM_POSITIONS = 500


def angles(rotary_dim: int) -> torch.Tensor:
    """[NUM_POSITIONS, rotary_dim / 2] in float64."""
    frequency = 1e4 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(NUM_POSITIONS)[:, None] * frequency


def rotation(rotary_dim: int, *, is_neox_style: bool) -> KeyRotation:
    found = angles(rotary_dim)
    return KeyRotation(found.cos().float(), found.sin().float(), is_neox_style)


def at_positions(
    keys: torch.Tensor, positions: list[int], rotary_dim: int, *, is_neox_style: bool
) -> torch.Tensor:
    """RoPE from the formula: pairs are complex numbers, turned by position times frequency."""
    pairs = list(zip(range(rotary_dim // 2), range(rotary_dim // 2, rotary_dim), strict=True))
    if not is_neox_style:
        pairs = [(i, i + 1) for i in range(0, rotary_dim, 2)]
    turned = keys.clone().double()
    for number, (real, imaginary) in enumerate(pairs):
        for row, position in enumerate(positions):
            angle = position / 1e4 ** (2 * number / rotary_dim)
            factor = complex(math.cos(angle), math.sin(angle))
            pair = torch.complex(keys[row, :, real].double(), keys[row, :, imaginary].double())
            turned[row, :, real] = (pair * factor).real
            turned[row, :, imaginary] = (pair * factor).imag
    return turned


@settings(deadline=None, max_examples=50)
@given(
    moves=st.lists(
        st.tuples(st.integers(0, NUM_POSITIONS - 1), st.integers(0, NUM_POSITIONS - 1)),
        min_size=1,
        max_size=5,
    ),
    sizes=st.sampled_from([(64, 64), (64, 16), (80, 20)]),
    is_neox_style=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_turned_key_is_the_key_at_its_new_position(
    moves: list[tuple[int, int]], sizes: tuple[int, int], is_neox_style: bool, seed: int
) -> None:
    """Proves it for heads that turn in part, and for moves in both directions."""
    head_size, rotary_dim = sizes
    keys = torch.randn(len(moves), 3, head_size, generator=torch.Generator().manual_seed(seed))
    before, after = (
        at_positions(keys, list(at), rotary_dim, is_neox_style=is_neox_style)
        for at in zip(*moves, strict=True)
    )
    delta = torch.tensor([new - old for old, new in moves])
    made = rotation(rotary_dim, is_neox_style=is_neox_style).turned(before.float(), delta)
    torch.testing.assert_close(made, after.float(), atol=1e-5, rtol=0)
    assert torch.equal(made[..., rotary_dim:], keys[..., rotary_dim:])


@pytest.mark.parametrize("far", [True, False])
def test_errors_of_fifty_turns_in_half_precision(far: bool) -> None:
    """Proves how they add up (docs/streaming.md): like a random walk if keys move far to and fro;
    if all moves are by one position, pairs that turn by less than a rounding fall behind. Keys keep
    their length."""
    gen = torch.Generator().manual_seed(0)
    keys = torch.randn(500, 2, 64, generator=gen).bfloat16()
    made, turned, errors = rotation(64, is_neox_style=True), keys, {}
    position = torch.zeros(500, dtype=torch.int64)
    for number in range(1, 51):
        new = torch.randint(NUM_POSITIONS, (500,), generator=gen) if far else position - 1
        turned, position = made.turned(turned, new - position), new
        wanted = made.turned(keys.float(), position)
        errors[number] = float((turned.float() - wanted).norm() / wanted.norm())
        assert abs(float(turned.float().norm() / wanted.norm()) - 1) < 1e-3
    assert errors[1] < 2**-9
    assert errors[50] < (0.013 if far else 0.035)
    if far:
        for number in (2, 10, 50):
            assert 0.8 < errors[number] / errors[1] / number**0.5 < 1.2


@pytest.mark.parametrize("is_neox_style", [True, False])
def test_half_precision_is_rounded_once(is_neox_style: bool) -> None:
    """Proves that arithmetic is in float32, and that a key that stays is not touched."""
    made = rotation(64, is_neox_style=is_neox_style)
    keys = torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    delta = torch.arange(-20, 20)
    turned = made.turned(keys, delta)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, made.turned(keys.float(), delta).bfloat16())
    still = delta == 0
    assert torch.equal(turned[still], keys[still])
