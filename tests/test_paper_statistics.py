import numpy as np
import pytest

from paper.statistics import difference, exponents, summary


def rows(*values):
    return [{"step": 100 * i, "x": v} for i, v in enumerate(values)]


def test_a_difference_is_taken_pair_by_pair():
    pairs = [(rows(*[v] * 5), rows(*[v + 0.25] * 5)) for v in (0.1, 0.4, 0.7)]
    found = difference("x", pairs)
    assert found["mean"] == pytest.approx(0.25) and found["interval"] == [pytest.approx(0.25)] * 2
    assert found["values"] == [pytest.approx(0.25)] * 3


def test_equal_onsets_are_known_to_the_distance_of_two_evaluations_alone():
    assert summary([-100, -100, -100])["interval"] == [-100, -100]
    low, high = summary([-100, -100, -100], rounding=100 / 6**0.5)["interval"]
    assert low < -190 and high > -10


def drawn(rng, truth, seeds, noise=0.2, every=0.0):
    """Onsets of a batch x context grid in which each seed has an effect of its own."""
    effect = rng.normal(0, noise / 2, seeds)
    cells = {}
    for x in ((8, 64), (16, 64), (32, 64), (8, 256), (16, 256), (32, 256)):
        log = np.log(1e4) + np.log(x) @ truth + effect + rng.normal(0, noise, seeds)
        cells[x] = list(np.ceil(np.exp(log) / every) * every if every else np.exp(log))
    return cells


@pytest.mark.parametrize("truth", [(0.0, 0.0), (-0.5, -0.5), (-1.0, 0.3)])
def test_exponents_are_found_with_intervals_that_hold_them(truth):
    law = exponents(drawn(np.random.default_rng(2), truth, 4, noise=0.05))
    for e, found, (low, high) in zip(truth, law["exponents"], law["intervals"], strict=True):
        assert found == pytest.approx(e, abs=0.1) and low < e < high and 0 < high - low < 0.4
    assert law["never"] == 0 and law["runs"] == 24


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("every", [0.0, 200.0])
def test_intervals_of_exponents_cover_95_percent(seeds, every):
    """Of 600 simulations: three standard errors are 0.027. A bootstrap over the seeds of each cell covers 0.83 at n = 3."""
    rng, truth, hits = np.random.default_rng(seeds), np.array([-0.5, 0.2]), 0
    for _ in range(600):
        low, high = np.array(exponents(drawn(rng, truth, seeds, every=every), every)["intervals"]).T
        hits += (low <= truth) & (truth <= high)
    assert (hits / 600 > 0.923).all()


def test_runs_without_onset_are_counted_and_left_out():
    law = exponents({(8,): [800.0, None], (16,): [400.0, 400.0], (32,): [None, None]})
    assert law["exponents"] == [pytest.approx(-1.0)] and law["never"] == 3 and law["runs"] == 6
    assert exponents({(8,): [800.0], (16,): [None]}) is None and exponents({(8,): [None]}) is None
    assert exponents({(8,): [800.0], (16,): [400.0]})["intervals"] is None  # two points and two parameters
