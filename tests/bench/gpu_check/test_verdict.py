"""The verdict by hand, and the package's oracle against the tests' own."""

from pathlib import Path

import pytest
import torch

from tests.support import oracle as independent
from tests.support.tiny_models import tiny_text, write
from vllm_sepllm.bench.gpu_check.oracle import Oracle, Scores
from vllm_sepllm.bench.gpu_check.verdict import ATOL, Errors, errors_of, faults_of
from vllm_sepllm.policy.visibility import Policy


def scores(own: list[float], best: list[float]) -> Scores:
    return Scores(torch.tensor(own), torch.tensor(best))


def test_errors_by_hand() -> None:
    found = errors_of(
        [
            ([-1.0, -2.0], scores([-1.5, -2.0], [-1.5, -1.25])),
            ([-3.0], scores([-4.0], [-4.0])),
        ]
    )
    assert found == Errors(mean=0.5, largest=1.0, gap=0.75, num_other=1, num_tokens=3)


def errors(mean: float, largest: float, gap: float = 0.0) -> Errors:
    return Errors(mean, largest, gap, 0, 100)


STOCK, CONTROL = errors(0.01, 0.05), errors(1.0, 9.0)


def test_as_far_as_stock_is_well() -> None:
    assert faults_of(STOCK, errors(0.019, 0.19, 0.3), CONTROL) == []
    assert faults_of(errors(0.0, 0.0), errors(ATOL / 2, ATOL / 2, ATOL), CONTROL) == []


@pytest.mark.parametrize(
    ("sepllm", "said"),
    [
        (errors(0.022, 0.05), "mean error"),
        (errors(0.01, 0.21), "largest error"),
        (errors(0.01, 0.05, 0.41), "lead of another token"),
        (errors(float("inf"), 0.05), "mean error"),
    ],
)
def test_farther_than_stock_is_a_fault(sepllm: Errors, said: str) -> None:
    (fault,) = faults_of(STOCK, sepllm, CONTROL)
    assert fault.startswith(said)


def test_no_number_is_infinitely_wrong() -> None:
    found = errors_of([([float("nan")], scores([-1.0], [-1.0]))])
    assert faults_of(STOCK, found, CONTROL)[0].startswith("mean error inf")


def test_a_check_that_could_not_tell_full_attention_is_blind() -> None:
    """Also one whose stock vLLM is itself far from the oracle: everything would pass."""
    assert "blind" in faults_of(STOCK, errors(0.01, 0.05), errors(0.02, 0.05))[0]
    assert "blind" in faults_of(errors(1.0, 9.0), errors(1.0, 9.0), CONTROL)[0]


@pytest.mark.parametrize("max_position", [None, 101])
def test_both_oracles_think_alike(tiny_llama_path: Path, max_position: int | None) -> None:
    """They share no code: the tests spell the mask out again and hand it to each layer, and rotate
    each epoch's keys anew from what was projected."""
    policy, separators = Policy(3, 29, 5, max_position), (7, 11, 13)
    rule = independent.Rule(3, 29, frozenset(separators), 5, max_position=max_position)
    ours = Oracle(tiny_llama_path, separators)
    token_ids = tiny_text(0, 300)
    prompt, answer = token_ids[:280], token_ids[280:]
    for ours_of, own_rule in ((policy, rule), (None, None)):
        found = ours.scores(prompt, answer, ours_of)
        every = independent.log_probabilities(tiny_llama_path, token_ids[:-1], own_rule, 279)
        chosen = every[torch.arange(20), torch.tensor(answer)]
        torch.testing.assert_close(found.own, chosen, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.best, every.max(-1).values, atol=1e-4, rtol=0)
    others = [None] if max_position is None else [None, Policy(3, 29, 5)]
    sparse, *told_apart = (ours.scores(prompt, answer, each).own for each in (policy, *others))
    assert all(float((sparse - other).abs().max()) > 0.1 for other in told_apart)


def test_a_model_with_sliding_windows_is_refused(tmp_path: Path) -> None:
    from vllm_sepllm.bench.gpu_check.model import check_model

    with pytest.raises(ValueError, match="layers with a sliding window"):
        check_model(write("gemma3", tmp_path))
    check_model(write("llama", tmp_path))
