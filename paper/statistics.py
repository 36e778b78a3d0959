"""How the end and the onset of copying depend on what was varied, with intervals that cover 95% for a few seeds."""

import functools
import math

import numpy as np

from measures.statistics import mean_interval, t_975
from runtime.curves import at_the_end

MISFIT = 0.05  # p value of a lack of fit below which onsets count as following no power law
# Two standard deviations of the difference in accuracy between two draws of 50 samples at top128, over 16 draws.
OTHER_QUESTIONS = 0.04


def summary(values, rounding: float = 0.0) -> dict:
    """The mean of values over seeds, its 95% interval (None for a single seed), and the values themselves."""
    values = [float(v) for v in values]
    return {"mean": float(np.mean(values)), "interval": mean_interval(values, rounding), "values": values}


def difference(name: str, pairs: list[tuple[list[dict], list[dict]]]) -> dict:
    """summary of how much higher `name` ends in the second run of each pair than in the first."""
    return summary(at_the_end(treated, name) - at_the_end(plain, name) for plain, treated in pairs)


def exponents(cells: dict[tuple[float, ...], list[float | None]], every: dict[tuple[float, ...], float]) -> dict | None:
    """Fits onset = c * x_1^e_1 * x_2^e_2 ... by least squares on the logarithms, every seed of every cell a point.

    cells: {(x_1, x_2, ...): the onset of each seed}; every: the distance of two evaluations in each cell, to which onsets are
    rounded. The intervals are those of linear regression: t at as many degrees of freedom as there are points beyond
    parameters, with a residual variance of at least that of the rounding; None where no point is left over. `misfit` is the p
    value of lack_of_fit; below MISFIT the cells follow no power law, and the variance is that of their distance from the
    fitted one. Runs without an onset cannot be fitted, and `never` counts them. Returns None where an x has fewer than two
    values with an onset.
    """
    points = [(x, onset) for x, onsets in cells.items() for onset in onsets if onset is not None]
    if not points or any(len(set(values)) < 2 for values in zip(*(x for x, _ in points), strict=True)):
        return None
    X = np.array([[1.0, *np.log(x)] for x, _ in points])
    onsets = np.array([onset for _, onset in points])
    fit, *_ = np.linalg.lstsq(X, np.log(onsets), rcond=None)
    freedom = len(points) - len(fit)
    intervals = misfit = None
    if freedom > 0:
        residual = np.log(onsets) - X @ fit
        rounding = np.mean((np.array([every[x] for x, _ in points]) / onsets) ** 2) / 12
        variance = max(residual @ residual / freedom, rounding)
        between, cells_beyond, misfit = lack_of_fit(residual, [x for x, _ in points], len(fit), rounding)
        if is_misfit(misfit):
            variance, freedom = between, cells_beyond
        half = t_975(freedom) * np.sqrt(variance * np.linalg.pinv(X.T @ X).diagonal())
        intervals = np.stack((fit - half, fit + half), axis=1)[1:].tolist()
    never = sum(onset is None for onsets in cells.values() for onset in onsets)
    runs = len(points) + never
    return {"exponents": fit[1:].tolist(), "intervals": intervals, "misfit": misfit, "never": never, "runs": runs}


def is_misfit(p: float | None) -> bool:
    """Returns whether a p value of lack_of_fit says that onsets follow no power law."""
    return p is not None and p < MISFIT


def lack_of_fit(residual: np.ndarray, cells: list, parameters: int, least: float) -> tuple[float, int, float | None]:
    """Tests whether the cells lie further from a fitted line than the scatter within them explains (the F test of lack of fit).

    residual (n,) of the points; cells: the cell of each; least: the smallest variance that a point can have. Returns the mean
    square of the cells' distances, its degrees of freedom, and the p value, from 200,000 random draws; None where there are
    no more cells than parameters, or no cell has two points.
    """
    groups = {cell: residual[[c == cell for c in cells]] for cell in cells}
    between, within = len(groups) - parameters, len(residual) - len(groups)
    if between < 1 or within < 1:
        return 0.0, between, None
    square = sum(len(group) * group.mean() ** 2 for group in groups.values()) / between
    scatter = max(sum(len(group) * group.var() for group in groups.values()) / within, least)
    return float(square), between, float(np.mean(f_draws(between, within) >= square / scatter)) if scatter else 0.0


@functools.cache
def f_draws(between: int, within: int) -> np.ndarray:
    """Returns 200,000 draws from the F distribution of these degrees of freedom."""
    rng = np.random.default_rng(0)
    return (rng.chisquare(between, 200_000) / between) / (rng.chisquare(within, 200_000) / within)


def rounding_of_a_difference(every: float) -> float:
    """The standard deviation of the difference of two onsets, each rounded up to a multiple of `every`."""
    return every / math.sqrt(6)
