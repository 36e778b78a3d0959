import itertools

import numpy as np
import pytest

from paper.report import HOLDS, INCONCLUSIVE, at_exponents
from paper.scales import SCALES
from paper.statistics import difference, exponents, lack_of_fit, summary
from paper.treatments import compare


def rows(*values):
    return [{"step": 100 * i, "x": v} for i, v in enumerate(values)]


def test_a_difference_is_taken_pair_by_pair():
    pairs = [(rows(*[v] * 5), rows(*[v + 0.25] * 5)) for v in (0.1, 0.4, 0.7)]
    found = difference("x", pairs)
    assert found["mean"] == pytest.approx(0.25) and found["interval"] == [pytest.approx(0.25)] * 2
    assert found["values"] == [pytest.approx(0.25)] * 3


def test_the_interval_of_equal_onsets_has_the_width_of_their_rounding():
    assert summary([-100, -100, -100])["interval"] == [-100, -100]
    low, high = summary([-100, -100, -100], rounding=100 / 6**0.5)["interval"]
    assert low < -190 and high > -10


def fitted(cells, every=0.0):
    return exponents(cells, dict.fromkeys(cells, every))


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
    law = fitted(drawn(np.random.default_rng(2), truth, 4, noise=0.05))
    for e, found, (low, high) in zip(truth, law["exponents"], law["intervals"], strict=True):
        assert found == pytest.approx(e, abs=0.1) and low < e < high and 0 < high - low < 0.4
    assert law["never"] == 0 and law["runs"] == 24


@pytest.mark.parametrize("seeds", [3, 5, 10, (5, 3, 3)], ids=str)
@pytest.mark.parametrize("every", [0.0, 200.0])
def test_intervals_of_exponents_cover_95_percent(seeds, every):
    """Of 600 simulations: three standard errors are 0.027. A bootstrap over the seeds of each cell covers 0.83 at n = 3. Some
    cells may have more seeds than others, as the base does.
    """
    rng, truth, hits = np.random.default_rng(np.sum(seeds)), np.array([-0.5, 0.2]), 0
    for _ in range(600):
        cells = drawn(rng, truth, np.max(seeds), every=every)
        cells = {x: onsets[:n] for (x, onsets), n in zip(cells.items(), np.resize(seeds, len(cells)), strict=True)}
        low, high = np.array(fitted(cells, every)["intervals"]).T
        hits += (low <= truth) & (truth <= high)
    assert (hits / 600 > 0.923).all()


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("truth", [0.0, 700.0])
def test_intervals_of_what_a_treatment_changes_cover_95_percent(seeds, truth):
    """Onsets that share an effect of the seed, rounded to evaluations 100 steps apart, and final accuracies. Of 1,000
    simulations three standard errors are 0.021; rounding can widen the intervals of onsets, by a factor that is not bounded.
    """
    rng, scale, hits = np.random.default_rng(seeds), SCALES["tiny"], np.zeros(2)

    def run(onset, level):
        return [{"step": s, scale.copying: level * (s >= onset), "x": level} for s in range(100, 6001, 100)]

    for _ in range(1000):
        effect = rng.normal(3000, 300, seeds)
        before, after = effect + rng.normal(0, 200, seeds), effect - truth + rng.normal(0, 200, seeds)
        levels = rng.normal([[0.5], [0.6]], 0.03, (2, seeds))
        pairs = [(run(a, x), run(b, y)) for a, b, x, y in zip(before, after, *levels, strict=True)]
        found = compare(pairs, scale, ("x",))
        for i, (change, right) in enumerate(((found["onset"]["change"], -truth), (found["x"], 0.1))):
            low, high = change["interval"]
            hits[i] += low <= right <= high
    assert (hits / 1000 > 0.929).all() and hits[1] / 1000 < 0.971


def test_cells_that_follow_no_power_law_widen_the_intervals_and_their_claims_do_not_hold():
    """The onset comes after a number of tokens up to 2,048 tokens a step, and more slowly from there on."""
    rng, cells = np.random.default_rng(0), {}
    for x in itertools.product((4, 8, 16), (128, 256, 512)):
        tokens = x[0] * x[1]
        log = np.log(2e6 / tokens) + 0.5 * max(np.log(tokens / 2048), 0)
        cells[x] = list(np.exp(log + rng.normal(0, 0.1, 3)))
    law = fitted(cells)
    assert law["misfit"] < 0.05 and at_exponents(law, (-0.7, -0.7)) == INCONCLUSIVE
    straight = {x: [2e6 / (x[0] * x[1]) * np.exp(rng.normal(0, 0.1)) for _ in range(3)] for x in cells}
    followed = fitted(straight)
    assert followed["misfit"] > 0.05 and at_exponents(followed, (-1, -1)) == HOLDS
    widths = [np.diff(found["intervals"]).mean() for found in (law, followed)]
    assert widths[0] > 1.5 * widths[1]


def test_lack_of_fit_is_found_in_5_percent_of_lines():
    """Of 1,000 simulations three standard errors are 0.021. scipy.stats.f.sf(3.0, 4, 12) is 0.0626."""
    rng, cells = np.random.default_rng(1), [i for i in range(6) for _ in range(3)]
    X = np.stack((np.ones(18), cells), axis=1)
    found = []
    for _ in range(1000):
        y = rng.normal(size=18)
        residual = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        found.append(lack_of_fit(residual, cells, 2, 0.0)[2] < 0.05)
    assert abs(np.mean(found) - 0.05) < 0.021
    within = np.tile([-1.0, 0.0, 1.0], 6)  # a mean square of 1 within the cells
    distances = np.repeat([1.0, -1.0, 0.0, 0.0, 0.0, 0.0], 3) * 2**0.5  # and of 12 / 4 between them
    assert lack_of_fit(within + distances, cells, 2, 0.0) == (pytest.approx(3.0), 4, pytest.approx(0.0626, abs=0.003))


def test_runs_asked_other_questions_are_compared_with_wider_intervals():
    def run(level, questions):
        return [{"step": s, SCALES["text"].copying: level, "induction_max": 0.0, "questions_top128": questions} for s in (1, 2)]

    pairs = [(run(x, "a"), run(x + 0.1, "a")) for x in (0.1, 0.2, 0.3)]
    others = [(run(x, "a"), run(x + 0.1, "b")) for x in (0.1, 0.2, 0.3)]
    same, wider = (compare(p, SCALES["text"], (SCALES["text"].copying,))[SCALES["text"].copying] for p in (pairs, others))
    assert wider["interval"] == pytest.approx([same["interval"][0] - 0.04, same["interval"][1] + 0.04])


def test_runs_without_onset_are_counted_and_left_out():
    law = fitted({(8,): [800.0, None], (16,): [400.0, 400.0], (32,): [None, None]})
    assert law["exponents"] == [pytest.approx(-1.0)] and law["never"] == 3 and law["runs"] == 6
    assert fitted({(8,): [800.0], (16,): [None]}) is None and fitted({(8,): [None]}) is None
    assert fitted({(8,): [800.0], (16,): [400.0]})["intervals"] is None  # two points and two parameters
