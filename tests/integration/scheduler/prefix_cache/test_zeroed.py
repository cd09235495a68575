"""Blocks of checkpoints are zeroed where vLLM zeroes those that it hands out."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from tests.support import schedulers
from tests.support.schedulers import SLIDING, Run, Setting, random_tokens, write_model
from vllm_sepllm.integration.wire.plan import attached_plan

# of the same bytes a block, as groups that share a pool must be
HALF = replace(SLIDING, dtype=torch.bfloat16, head_size=128, head_size_v=128)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_blocks_of_checkpoints_are_zeroed_beside_caches_of_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mixed: bool
) -> None:
    """A step fills the last block of a tail in part, and the rest may be another group's bytes."""
    monkeypatch.setattr(schedulers, "SLIDING", HALF if is_mixed else SLIDING)
    run = Run(Setting(write_model(tmp_path), with_sliding=True))
    run.arrive(random_tokens(random.Random(0), 900), 4)
    own, zeroed = [], []
    while run.scheduler.requests:
        output = run.scheduler.schedule()
        plan = attached_plan(output)
        assert plan is not None
        checkpoints = [each for row in plan.listed.values() for each in row.checkpoints]
        groups = [group for each in checkpoints for group in each.blocks.values()]
        own.append({block_id for group in groups for block_id in group.values()})
        zeroed.append({*(output.new_block_ids_to_zero or ())})
        run._answer(output)
    assert any(own)
    assert any(zeroed) == is_mixed
    assert all(ids <= known for ids, known in zip(own, zeroed, strict=True)) == is_mixed
