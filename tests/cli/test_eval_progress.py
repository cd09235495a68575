"""What an evaluation says of how far it is, in a log."""

from typing import Any, cast

import pytest

from vllm_sepllm.cli import eval_progress
from vllm_sepllm.cli.eval_progress import Progress


class Row:
    key = "gsm8k/sepllm"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(eval_progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Without the time of day."""
    return [line.split(" ", 2)[2] for line in capsys.readouterr().out.splitlines()]


def test_a_log_has_a_line_a_minute_and_one_an_engine(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    row, rounds = cast(Any, Row()), []
    with Progress(1000, 400, lambda: rounds.append(clock[0])) as progress:
        progress.starting("sepllm")
        for _ in range(30):
            clock[0] += 4
            progress.answered(row)
        progress.finished_round()
        progress.starting("full")
    assert lines(capsys) == [
        "starting sepllm: 400 of 1,000",
        "gsm8k/sepllm: 416 of 1,000, 4.00 s an answer, 0:38:56 left",
        "starting full: 430 of 1,000, 4.00 s an answer, 0:38:00 left",
    ]
    assert rounds == [1120.0]


def test_the_last_answer_is_always_told(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(2, 0, lambda: None) as progress:
        for _ in range(2):
            clock[0] += 1
            progress.answered(cast(Any, Row()))
    assert lines(capsys) == ["gsm8k/sepllm: 2 of 2, 1.00 s an answer, 0:00:00 left"]
