"""The comparison of reading a prompt's KV with computing it, with instances that answer at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_sepllm.bench import __main__ as command
from vllm_sepllm.bench.disaggregation import Pair, read_and_compute
from vllm_sepllm.bench.results import Results
from vllm_sepllm.bench.suites import Work

WORK = Work(text=list(range(500)), lengths=[100, 200], batches=[1], max_tokens=1, rounds=3)
BYTES = 10


@dataclass
class Instance:
    """Reading a prompt costs a CPU second, computing it one a token.

    Attributes:
        reads: whether it reads what it is told to.
        knows_states: whether it answers right to what it has read.
        num_bytes: that it has read.
        cpu_seconds: that it has used.
        is_awake: whether it may be asked.
    """

    reads: bool = True
    knows_states: bool = True
    num_bytes: int = 0
    cpu_seconds: float = 0.0
    is_awake: bool = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.is_awake = True
        yield
        self.is_awake = False

    def do(self, command: str, **arguments: Any) -> Any:
        assert self.is_awake
        if command != "generate":
            return {"received_bytes": self.num_bytes, "cpu_seconds": self.cpu_seconds}[command]
        (prompt,), transfers = arguments["prompts"], arguments["transfers"]
        is_read = transfers is not None and "state" in transfers[0]
        token, cost = 7, float(len(prompt))
        if is_read and self.reads:
            self.num_bytes += BYTES * len(prompt)
            token, cost = (7 if self.knows_states else 8), 1.0
        self.cpu_seconds += 3 * cost
        return {
            "token_ids": [[token] * arguments["max_tokens"]],
            "seconds": 2 * cost,
            "cpu_seconds": cost,
            "transfers": [{"state": len(prompt)}],
        }


def compared(decode: Instance) -> Results:
    results = Results("disaggregation", {})
    found = {"stock": Pair(Instance(), decode)}  # type: ignore[arg-type]
    read_and_compute(found, WORK, results)
    return results


def test_each_sample_has_bytes_and_both_ways_of_a_first_token() -> None:
    samples = compared(Instance()).samples
    for length in WORK.lengths:
        measured = {m: v for (case, _, m), v in samples.items() if case == f"{length} tokens"}
        assert measured == {
            "received_bytes": [BYTES * length] * 3,
            "read_cpu_s": [1.0] * 3,
            "read_all_cpu_s": [3.0] * 3,
            "compute_cpu_s": [float(length)] * 3,
            "read_s": [2.0] * 3,
            "compute_s": [2.0 * length] * 3,
        }


@pytest.mark.parametrize(
    ("decode", "reason"),
    [
        (Instance(knows_states=False), "stock answers"),
        (Instance(reads=False), "stock has read nothing"),
    ],
)
def test_an_instance_that_reads_wrong_or_nothing_stops_the_run(
    decode: Instance, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=reason):
        compared(decode)


def test_without_nixl_no_engine_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    given = ["disaggregation", "--model", "m", "--text", str(tmp_path)]
    done = CliRunner().invoke(command.app, given, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "pip install nixl" in done.output
