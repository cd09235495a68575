"""vLLM's schedulers end each step with an epoch, and send the positions of the rule."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("vllm")

from tests.support.rule import read_positions
from tests.support.schedulers import SEPARATOR, Run, Setting, random_tokens, write_model
from vllm_sepllm.integration.wire.config import read_config

POLICY = (
    ("window", 28),
    ("max_separators", 16),
    ("positions", "renumbered"),
    ("max_position", 120),
    ("checkpoint_interval", 64),
)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_steps_stay_inside_an_epoch_and_have_its_shift(tmp_path: Path, kind: str) -> None:
    """Proves it for prompts and answers, for hits of cached prefixes and in a pool for few."""
    run = Run(Setting(write_model(tmp_path), kind, num_blocks=24, policy=POLICY))
    scheduler, plan_step = run.scheduler, run.scheduler.plan_step
    requests: dict[str, Any] = {}
    steps: list[tuple[str, int, int, int, bool]] = []

    def planned(output: Any) -> Any:
        plan = plan_step(output)
        assert plan.positions is not None
        for name, row in plan.rows.items():
            requests[name] = scheduler.requests[name]
            turns = row in plan.positions.renumber
            size = output.num_scheduled_tokens[name]
            steps.append((name, int(plan.start[row]), size, int(plan.positions.shift[row]), turns))
        return plan

    shared = random_tokens(run.pick, 400)
    with patch.object(scheduler, "plan_step", planned):
        for number in range(9):
            run.arrive(shared[: 100 + 37 * number] + random_tokens(run.pick, 9), 180)
            for _ in range(20):
                run.step()
        run.finish()
    policy = read_config(scheduler.vllm_config).policy
    assert sum(run.num_reused.values()) > 500
    num_turns = 0
    for name, request in requests.items():
        tokens = list(request.all_token_ids)
        reads = read_positions(policy, [int(t == SEPARATOR) for t in tokens], len(tokens))
        own = [read[query] for query, read in enumerate(reads)]
        for _, start, size, shift, turns in (step for step in steps if step[0] == name):
            # an asynchronous step may compute a token that is thrown away
            last = min(start + size, len(own))
            assert [start - shift + i for i in range(last - start)] == own[start:last]
            assert turns == (0 < start < len(own) and own[start] != own[start - 1] + 1)
            num_turns += turns
    assert num_turns > 20
