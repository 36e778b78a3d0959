"""Intervals that are said to cover 95% do."""

import numpy as np
import pytest

from measures.statistics import mean_interval, share_interval, t_975


def test_quantiles_of_student_t_are_those_of_the_tables():
    for freedom, value in {1: 12.706, 2: 4.303, 10: 2.228, 11: 2.201, 15: 2.131, 30: 2.042, 99: 1.984, 10**6: 1.960}.items():
        assert t_975(freedom) == pytest.approx(value, abs=6e-4)


def test_the_interval_of_a_mean_is_that_of_student():
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 4.3027 / 3**0.5), pytest.approx(2 + 4.3027 / 3**0.5))
    assert mean_interval([2.0]) is None and mean_interval([1.0, 1.0]) == [1.0, 1.0]


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_of_means_cover_95_percent(n):
    """Of 4,000 simulations, three standard errors are 0.010. A bootstrap over 3 values covers 0.74."""
    values = np.random.default_rng(n).normal(1, 2, (4000, n))
    hits = [low <= 1 <= high for low, high in map(mean_interval, values)]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.0105)


@pytest.mark.parametrize("samples", [10, 50, 200])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.03, 0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("questions", [6, 10])
def test_intervals_of_shares_cover_95_percent_near_0_and_1_too(samples, share, correlation, questions):
    """Of 600 simulations of samples of questions, whose hits are correlated because samples have shares of their own (beta
    distributed): three standard errors are 0.027.
    """
    rng, hits = np.random.default_rng(0), 0
    for _ in range(600):
        own = np.full(samples, share)
        if 0 < share < 1 and correlation:
            scale = 1 / correlation - 1
            own = (
                rng.beta(share * scale, (1 - share) * scale, samples) if scale else (rng.random(samples) < share).astype(float)
            )
        low, high = share_interval(rng.random((samples, questions)) < own[:, None])
        hits += low <= share <= high
    assert hits / 600 > 0.923


def test_a_share_of_none_or_all_has_an_interval_that_is_not_a_point():
    low, high = share_interval(np.zeros((100, 6), dtype=bool))
    assert low == 0 and 0.03 < high < 0.06
    low, high = share_interval(np.ones((100, 6), dtype=bool))
    assert 0.94 < low < 0.97 and high == 1
