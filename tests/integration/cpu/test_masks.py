"""A tile's mask covers its partial keys, and nothing of it is left for the next tile."""

import torch

from vllm_sepllm.integration.cpu.metadata import TileTensors


def test_masks_share_memory_and_leave_nothing_behind() -> None:
    zeros = torch.zeros(4, 10)
    wide = TileTensors(0, 4, torch.arange(10), torch.full((4, 6), float("-inf")))
    narrow = TileTensors(4, 7, torch.arange(7), torch.full((3, 2), float("-inf")))
    for tile in (wide, narrow, wide):
        mask = tile.mask(zeros)
        assert mask is not None
        assert mask.shape == (tile.last - tile.first, len(tile.keys))
        num_full = len(tile.keys) - tile.bias.shape[1]
        assert (mask[:, :num_full] == 0).all()
        assert (mask[:, num_full:] == float("-inf")).all()
        tile.clear(zeros)
        assert (zeros == 0).all()


def test_no_mask_where_every_query_reads_every_key() -> None:
    tile = TileTensors(0, 1, torch.arange(5), torch.zeros(1, 0))
    assert tile.mask(torch.zeros(1, 5)) is None
