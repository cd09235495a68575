"""A tile's mask covers its partial keys, and tiles attend like the dense mask."""

import numpy as np
import pytest
import torch

from vllm_sepllm.integration.worker.cpu.masked_tiles import TileAttention, TileTensors
from vllm_sepllm.policy.keys.masked_tiles import query_tiles
from vllm_sepllm.policy.step import prefill
from vllm_sepllm.policy.visibility import Policy, visible_mask


def test_only_the_last_keys_are_hidden() -> None:
    wide = TileTensors(0, 4, torch.arange(10), torch.full((4, 6), float("-inf")))
    narrow = TileTensors(4, 7, torch.arange(7), torch.full((3, 2), float("-inf")))
    for tile in (wide, narrow):
        mask = tile.mask()
        assert mask is not None
        assert mask.shape == (tile.last - tile.first, len(tile.keys))
        num_full = len(tile.keys) - tile.bias.shape[1]
        assert (mask[:, :num_full] == 0).all()
        assert (mask[:, num_full:] == float("-inf")).all()


def test_no_mask_where_every_query_reads_every_key() -> None:
    tile = TileTensors(0, 1, torch.arange(5), torch.zeros(1, 0))
    assert tile.mask() is None


@pytest.mark.parametrize("max_separators", [None, 11])
@pytest.mark.parametrize("tile_size", [7, 64])
def test_tiles_attend_like_the_dense_mask(max_separators: int | None, tile_size: int) -> None:
    """From the policy's tiles to the output, against float64 over all keys."""
    policy, num_tokens = Policy(3, 40, max_separators), 301
    is_separator = np.random.default_rng(0).random(num_tokens) < 0.2
    separators = np.flatnonzero(is_separator)
    chunk = prefill.Chunk(policy, 0, num_tokens, 0, separators[separators >= 3])
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(num_tokens, 4, 16, generator=gen)
    key, value = (torch.randn(2, num_tokens, 16, generator=gen) for _ in range(2))
    attend = TileAttention(0.25, 0.0, None)
    got = torch.full(query.shape, float("nan"))
    for found in query_tiles(chunk, tile_size):
        tile = TileTensors.of(found, torch.float32)
        keys, values = key[:, tile.keys], value[:, tile.keys]
        rows = slice(tile.first, tile.last)
        got[rows] = attend(query[rows], keys, values, tile.mask())
    scores = torch.einsum("qhd,hkd->hqk", query.double(), key.double().repeat_interleave(2, 0))
    hidden = torch.from_numpy(~visible_mask(policy, is_separator))
    weights = (scores * 0.25).masked_fill(hidden, float("-inf")).softmax(-1)
    want = torch.einsum("hqk,hkd->qhd", weights, value.double().repeat_interleave(2, 0))
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
