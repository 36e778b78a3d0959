"""How the end and the onset of copying depend on what was varied, with intervals that cover 95% for a few seeds."""

import math

import numpy as np

from measures.statistics import mean_interval, t_975
from runtime.curves import at_the_end


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
    parameters, with a residual variance of at least that of the rounding; None where no point is left over. Runs without an
    onset cannot be fitted, and `never` counts them. Returns None where an x has fewer than two values with an onset.
    """
    points = [(x, onset) for x, onsets in cells.items() for onset in onsets if onset is not None]
    if not points or any(len(set(values)) < 2 for values in zip(*(x for x, _ in points), strict=True)):
        return None
    X = np.array([[1.0, *np.log(x)] for x, _ in points])
    onsets = np.array([onset for _, onset in points])
    fit, *_ = np.linalg.lstsq(X, np.log(onsets), rcond=None)
    freedom = len(points) - len(fit)
    intervals = None
    if freedom > 0:
        residual = np.log(onsets) - X @ fit
        rounding = np.array([every[x] for x, _ in points]) / onsets
        variance = max(residual @ residual / freedom, np.mean(rounding**2) / 12)
        half = t_975(freedom) * np.sqrt(variance * np.linalg.pinv(X.T @ X).diagonal())
        intervals = np.stack((fit - half, fit + half), axis=1)[1:].tolist()
    never = sum(onset is None for onsets in cells.values() for onset in onsets)
    return {"exponents": fit[1:].tolist(), "intervals": intervals, "never": never, "runs": len(points) + never}


def rounding_of_a_difference(every: float) -> float:
    """The standard deviation of the difference of two onsets, each rounded up to a multiple of `every`."""
    return every / math.sqrt(6)
