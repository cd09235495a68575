"""Blocks of checkpoints are zeroed where vLLM zeroes those that it hands out."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.core.sched.output import SchedulerOutput

from tests.support import schedulers
from tests.support.schedulers import SLIDING, Run, Setting, random_tokens, write_model
from vllm_sepllm.integration.wire.plan import attached_plan

# of the same bytes a block, as groups that share a pool must be
HALF = replace(SLIDING, dtype=torch.bfloat16, head_size=128, head_size_v=128)


def blocks_of_checkpoints(output: SchedulerOutput) -> set[int]:
    """Those that the step fills."""
    plan = attached_plan(output)
    assert plan is not None
    checkpoints = [each for row in plan.listed.values() for each in row.checkpoints]
    groups = [group for each in checkpoints for group in each.blocks.values()]
    return {block_id for group in groups for block_id in group.values()}


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
        own.append(blocks_of_checkpoints(output))
        zeroed.append({*(output.new_block_ids_to_zero or ())})
        run._answer(output)
    assert any(own)
    assert any(zeroed) == is_mixed
    assert all(ids <= known for ids, known in zip(own, zeroed, strict=True)) == is_mixed


def test_what_a_copy_reads_is_not_zeroed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker zeroes before it copies, and in a full pool a checkpoint may get what is copied."""
    monkeypatch.setattr(schedulers, "SLIDING", HALF)
    policy = (("window", 60), ("checkpoint_interval", 64))
    model, num_reused = write_model(tmp_path), 0
    for seed in (1, 3):
        run = Run(Setting(model, num_blocks=24, with_sliding=True, policy=policy), seed=seed)
        schedule, pick = run.scheduler.schedule, random.Random(seed)

        def checked(schedule: Callable[[], SchedulerOutput] = schedule) -> SchedulerOutput:
            nonlocal num_reused
            output = schedule()
            read = {copy.src_block_id for copy in output.kv_cache_block_copies or ()}
            assert read.isdisjoint(output.new_block_ids_to_zero or ())
            num_reused += not read.isdisjoint(blocks_of_checkpoints(output))
            return output

        monkeypatch.setattr(run.scheduler, "schedule", checked)
        texts = [random_tokens(pick, 400) for _ in range(3)]
        for _ in range(12):
            beginning = pick.choice(texts)[: pick.choice([130, 200, 300, 330])]
            run.arrive(
                beginning + random_tokens(pick, pick.randrange(1, 150)), pick.randrange(1, 20)
            )
            for _ in range(pick.randrange(1, 6)):
                run.step()
        while run.scheduler.requests:
            run.step()
    assert num_reused
