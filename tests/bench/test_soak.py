"""The soak run tells a right answer from a wrong one, and a level memory from a rising one."""

import os
import subprocess
import sys

import pytest

from vllm_sepllm.bench.soak import Report, descendants_rss_mib, growth
from vllm_sepllm.bench.soak_load import Answer, verdict

FIRST = Answer(["a", "b", "c"], [{"a": -0.1}, {"b": -0.5, "x": -0.5001}, {"c": -0.1, "y": -3.0}])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("abc", "same"),
        ("ab", "wrong"),
        ("axy", "near tie"),  # what follows a near tie is another text
        ("aby", "wrong"),
        ("azc", "wrong"),
    ],
)
def test_answers_are_compared_up_to_float_noise(tokens: str, expected: str) -> None:
    best = [
        FIRST.best[i] | {token: FIRST.best[i].get(token, -9.0)} for i, token in enumerate(tokens)
    ]
    assert verdict(FIRST, Answer(list(tokens), best)) == expected


def test_the_same_tokens_of_another_model_are_wrong() -> None:
    other = [FIRST.best[0], {"b": -0.502}, FIRST.best[2]]
    assert verdict(FIRST, Answer(["a", "b", "c"], other)) == "wrong"


def test_growth_is_told_from_warming_up() -> None:
    assert growth([1.0] * 7) is None
    assert growth([50, 90, 100, 100, 100, 100, 100, 100]) == 0
    rising = growth([100 + i for i in range(16)])
    assert rising is not None
    assert rising > 0.05


def test_a_run_is_good_only_without_any_loss() -> None:
    good = {"model": "m", "versions": {}}
    assert Report(**good).is_good
    assert Report(**good, near_ties=1).is_good
    for bad in ({"wrong": 1}, {"faults": ["x"]}, {"kv_cache_usage": 0.1}, {"growth": 0.06}):
        assert not Report(**(good | bad)).is_good, bad


def test_memory_of_grandchildren_counts() -> None:
    held = "x = bytearray(b'1') * (64 << 20); print(1, flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    before = descendants_rss_mib(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert descendants_rss_mib(os.getpid()) > before + 64
    child.communicate(b"\n")
