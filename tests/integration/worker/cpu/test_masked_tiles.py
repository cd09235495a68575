"""Tile attention against float64, with everything models add to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.integration.worker.cpu.masked_tiles import TileAttention


def oracle(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    attend: TileAttention,
) -> torch.Tensor:
    """Head by head, query by query, in float64."""
    num_queries, num_heads, _ = query.shape
    group = num_heads // key.shape[0]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for h in range(num_heads):
        for i in range(num_queries):
            seen = ~hidden[i]
            scores = key[h // group, seen].double() @ query[i, h].double() * attend.scale
            if attend.softcap:
                scores = attend.softcap * torch.tanh(scores / attend.softcap)
            if attend.sinks is not None:
                scores = torch.cat([scores, attend.sinks[h].double()[None]])
            weights = scores.softmax(dim=0)[: int(seen.sum())]
            out[i, h] = weights @ value[h // group, seen].double()
    return out


@settings(max_examples=30, deadline=None)
@given(
    num_queries=st.sampled_from([1, 5, 63]),
    num_keys=st.sampled_from([1, 33, 100]),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    softcap=st.sampled_from([0.0, 5.0]),
    has_sinks=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_matches_float64(
    num_queries: int,
    num_keys: int,
    num_kv_heads: int,
    group: int,
    softcap: float,
    has_sinks: bool,
    masked: bool,
    seed: int,
) -> None:
    gen = torch.Generator().manual_seed(seed)
    num_heads = num_kv_heads * group
    query = torch.randn(num_queries, num_heads, 32, generator=gen)
    key, value = (torch.randn(num_kv_heads, num_keys, 32, generator=gen) for _ in range(2))
    hidden = torch.rand(num_queries, num_keys, generator=gen) < (0.5 if masked else 0.0)
    hidden[:, 0] = False  # every query reads something: itself, at least
    bias = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf")) if masked else None
    sinks = torch.randn(num_heads, generator=gen) if has_sinks else None
    attend = TileAttention(0.3, softcap, sinks)
    got = attend(query, key, value, bias)
    assert got.shape == query.shape
    torch.testing.assert_close(
        got.double(), oracle(query, key, value, hidden, attend), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_hidden_keys_may_be_anything_but_nan(softcap: float) -> None:
    """A key that no query may read has weight zero, however large it is."""
    query, key, value = torch.randn(4, 2, 32), torch.randn(1, 9, 32), torch.randn(1, 9, 32)
    bias = torch.zeros(4, 9)
    bias[:, 5] = float("-inf")
    attend = TileAttention(1.0, softcap, None)
    want = attend(query, key, value, bias)
    key[:, 5], value[:, 5] = 1e4, 1e4
    assert torch.equal(attend(query, key, value, bias), want)
