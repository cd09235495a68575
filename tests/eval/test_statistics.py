"""Intervals cover what they should, and neighbours are not taken for independent."""

import numpy as np
import pytest

from vllm_sepllm.eval.statistics import Estimate, block_bootstrap, exponential, wilson


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(5)
    found = [block_bootstrap([random.normal(1.0, 2.0, 400)], 4) for _ in range(200)]
    covered = sum(e.low <= 1.0 <= e.high for e in found)
    assert 178 <= covered <= 199


def test_repeated_values_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(5).normal(size=60)
    alone = block_bootstrap([values], 1)
    repeated = block_bootstrap([np.repeat(values, 10)], 10)
    assert repeated.mean == pytest.approx(alone.mean)
    assert repeated.high - repeated.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_one_block_alone_has_no_interval() -> None:
    found = block_bootstrap([[1.0, 3.0]], 2)
    assert found == Estimate(2.0, None, None)
    assert exponential(found) == Estimate(pytest.approx(7.38906, abs=1e-5), None, None)
    assert block_bootstrap([[1.0, 3.0]], 1).low is not None


def test_texts_count_by_their_tokens() -> None:
    assert block_bootstrap([[1.0] * 3, [5.0]], 2).mean == 2.0


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    assert exponential(Estimate(0.0, -1.0, 1.0)) == Estimate(
        1.0, pytest.approx(0.36788, abs=1e-5), pytest.approx(2.71828, abs=1e-5)
    )


def test_a_share_of_few_trials_stays_uncertain() -> None:
    """Wilson's interval for 0 of 10 and 5 of 10, from the formula worked by hand."""
    none = wilson(0, 10)
    assert (none.low, none.high) == (0.0, pytest.approx(0.2775, abs=1e-4))
    half = wilson(5, 10)
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
