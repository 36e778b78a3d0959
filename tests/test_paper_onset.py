import numpy as np
import pytest

from paper.onset import at_the_end, difference, exponents, interval, onset


def rows(*values, every=100):
    return [{"step": i * every, "tokens": i, "x": v} for i, v in enumerate(values)]


def test_onset_is_the_first_of_two_consecutive_evaluations_at_or_above_the_threshold():
    assert onset(rows(0, 0.1, 0.5, 0.6, 0.2), 0.5, "x") == 200
    assert onset(rows(0, 0.9, 0.1, 0.5, 0.5), 0.5, "x") == 300  # one alone may be chance
    assert onset(rows(0, 0.9, 0.1, 0.5, 0.5), 0.5, "x", axis="tokens") == 3
    assert onset(rows(0.7, 0.7), 0.5, "x") == 0
    assert onset(rows(0, 0, 0.9), 0.5, "x") is None and onset([], 0.5, "x") is None
    assert onset([{"step": 0}, *rows(None, 0.6, 0.6)], 0.5, "x") == 100  # rows that lack it are no evaluations


def test_the_end_is_the_last_fifth():
    assert at_the_end(rows(*range(10)), "x") == 8.5 and at_the_end(rows(3.0), "x") == 3.0


def test_a_difference_is_taken_pair_by_pair():
    pairs = [(rows(*[v] * 5), rows(*[v + 0.25] * 5)) for v in (0.1, 0.4, 0.7)]
    assert difference("x", pairs) == {"mean": pytest.approx(0.25), "interval": [pytest.approx(0.25)] * 2}


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert interval(values) == [low, high] and interval([1.0, 1.0]) == [1.0, 1.0] and interval([2.0]) == [2.0, 2.0]


@pytest.mark.parametrize("truth", [(0.0, 0.0), (-0.5, -0.5), (-1.0, 0.3)])
def test_exponents_are_found_with_intervals_that_hold_them(truth):
    rng = np.random.default_rng(0)
    cells = {
        (b, c): list(1e4 * b ** truth[0] * c ** truth[1] * np.exp(rng.normal(0, 0.1, 4)))
        for b in (8, 16, 32)
        for c in (64, 128, 256)
    }
    law = exponents(cells)
    for e, found, (low, high) in zip(truth, law["exponents"], law["intervals"], strict=True):
        assert found == pytest.approx(e, abs=0.1) and low < e + 0.05 and e - 0.05 < high and 0 < high - low < 0.4
    assert law["never"] == 0


def test_those_without_onset_are_counted_and_left_out():
    law = exponents({(8,): [800.0, None], (16,): [400.0, 400.0], (32,): [None, None]})
    assert law["exponents"] == [pytest.approx(-1.0)] and law["never"] == 3
    assert exponents({(8,): [800.0], (16,): [None]}) is None and exponents({(8,): [None]}) is None
