"""A chunk that is not a prompt's last draws nothing from its request's generator."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_sepllm.integration.worker.cpu.seeds import keep_seeds_of_chunks


class Runner:
    """Samples and rewinds as vLLM's GPUModelRunner does, for four rows, three of them seeded."""

    def __init__(self, discarded: list[bool]) -> None:
        self.discard_request_mask = SimpleNamespace(np=np.array([*discarded, True, True]))
        seeded = {row: torch.Generator().manual_seed(row) for row in (0, 1, 3)}
        self.input_batch = SimpleNamespace(num_reqs=4, generators=seeded)
        self.fails = False

    def sample_tokens(self, grammar_output: None) -> list[float]:
        if self.fails:
            raise MemoryError
        generators = self.input_batch.generators
        drawn = [float(torch.rand(1, generator=generators.get(row))) for row in range(4)]
        for row in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]:
            if (generator := generators.get(int(row))) is not None:
                generator.set_offset(generator.get_offset() - 4)
        return drawn


def test_a_cpu_generator_cannot_be_rewound() -> None:
    """What this is for; if it is no longer so, ``seeds.py`` can go."""
    with pytest.raises(RuntimeError, match="does not use offset"):
        Runner([False, True, False, False]).sample_tokens(None)


def test_rows_that_sample_draw_as_if_there_were_no_chunks() -> None:
    runner: Any = Runner([False, True, True, False])
    keep_seeds_of_chunks(runner)
    first = runner.sample_tokens(None)
    assert sorted(runner.input_batch.generators) == [0, 1, 3]
    runner.discard_request_mask.np[:] = False
    second = runner.sample_tokens(None)
    own = {row: torch.rand(2, generator=torch.Generator().manual_seed(row)) for row in (0, 1, 3)}
    assert [first[0], first[3]] == [own[0][0], own[3][0]]
    assert [second[0], second[1], second[3]] == [own[0][1], own[1][0], own[3][1]]


def test_generators_come_back_after_an_error() -> None:
    runner: Any = Runner([True] * 4)
    keep_seeds_of_chunks(runner)
    runner.fails = True
    with pytest.raises(MemoryError):
        runner.sample_tokens(None)
    assert sorted(runner.input_batch.generators) == [0, 1, 3]
