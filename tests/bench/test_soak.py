"""The soak run tells a right answer from a wrong one, and a level memory from a rising one."""

import subprocess
import sys

import pytest

from vllm_sepllm.bench.soak.__main__ import Report
from vllm_sepllm.bench.soak.client import Answer, verdict
from vllm_sepllm.bench.soak.memory import Sample, Trend, descendants_rss_mib, trend

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


def samples(*mib: float) -> list[Sample]:
    """One every half minute."""
    return [Sample(i / 2, m) for i, m in enumerate(mib)]


def test_growth_is_told_from_warming_up() -> None:
    assert trend(samples(*[1.0] * 7)) is None
    assert trend(samples(50, 90, 100, 100, 100, 100, 100, 100)) == Trend(0, 0)
    assert trend(samples(*(100 + i for i in range(16)))) == Trend(2.0, round(11 / 104, 4))


def test_noise_and_less_memory_are_level() -> None:
    wavering = trend(samples(50, 90, *[100, 102] * 12))
    assert wavering is not None
    assert wavering.is_level
    falling = trend(samples(*range(200, 150, -1)))
    assert falling is not None
    assert falling.is_level
    assert not Trend(2.0, 0.06).is_level


def test_a_run_is_good_only_without_any_loss() -> None:
    good = {"model": "m", "versions": {}, "num_blocks": 47, "free_blocks": 47}
    assert Report(**good).is_good
    assert Report(**good, near_ties=1, trend=Trend(1.0, 0.04)).is_good
    bad = [{"wrong": 1}, {"faults": ["x"]}, {"lost": 1}, {"kv_cache_usage": 0.1}]
    bad += [{"free_blocks": 46}, {"trend": Trend(1.0, 0.06)}]
    for one in bad:
        assert not Report(**(good | one)).is_good, one


def test_memory_of_grandchildren_counts() -> None:
    held = "x = bytearray(b'1') * (64 << 20); print(1, flush=True); input()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    before = descendants_rss_mib()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    assert descendants_rss_mib() > before + 64
    child.communicate(b"\n")
