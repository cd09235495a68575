"""Stages that need a GPU, their engine in Triton's interpreter on a CPU and judged as on one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.interpreted_engine import Engines
from vllm_sepllm.bench.gpu_check.model import SEPARATORS, write_model
from vllm_sepllm.bench.gpu_check.oracle import Oracle
from vllm_sepllm.bench.gpu_check.stage import Answers, arguments_of, path_faults, rounds_of
from vllm_sepllm.bench.gpu_check.stages import ACCEPTED, POLICY, STAGES, Asked, Machine
from vllm_sepllm.bench.gpu_check.verdict import Errors, errors_of, faults_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

H100 = Machine("cuda", (9, 0), num_gpus=1)
# stock vLLM's in float32: none to speak of
EXACT = Errors(0.0, 0.0, 0.0, 0, 1)
# so much of an engine as the interpreter gets through
SMALL = {"max_model_len": 256, "max_num_batched_tokens": 96, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    made = Engines()
    yield made
    made.close()


def test_drafts_are_proved_and_judged(engines: Engines, tmp_path: Path) -> None:
    """Proves the stage's arguments and verdict, and that the random model lets drafts come true."""
    model = write_model(tmp_path)
    (stage,) = [stage for stage in STAGES if stage.name == "speculative"]
    given = arguments_of(stage, "sepllm", "float32", H100) | SMALL
    del given["gpu_memory_utilization"]  # there is none
    asked = Asked((57,), max_tokens=40, is_repetitive=True)
    rounds = rounds_of(asked)
    llm = given | {"model": str(model), "attention_backend": "sepllm"}
    report = engines.run(rounds, asked.max_tokens, llm=llm)
    (prompt,), (tokens,) = rounds[0], report.rounds[0].tokens
    (logprobs,) = report.rounds[0].logprobs
    counters = {ACCEPTED: report.num_accepted}
    answers = Answers([tokens], [logprobs], counters, {"graphs": "NONE"})
    assert path_faults(stage, answers, H100) == []
    oracle = Oracle(model, SEPARATORS)
    sepllm, control = (
        errors_of([(logprobs, oracle.scores(prompt, tokens, policy))]) for policy in (POLICY, None)
    )
    assert faults_of(EXACT, sepllm, control) == []
