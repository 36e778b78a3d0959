"""When something comes, and how that goes with what was varied.

Onset is the first of two consecutive evaluations at or above a threshold: one alone may be chance. It has one definition here,
and None, never within the run, is a value.
"""

import itertools

import numpy as np

from measures.statistics import interval


def onset(rows: list[dict], threshold: float, name: str = "copy_exact_full", axis: str = "step") -> float | None:
    """Where on `axis` the rows, in order, first have `name` at or above the threshold twice running; None: nowhere."""
    points = [(row[axis], row[name]) for row in rows if row.get(name) is not None]
    return next((x for (x, y), (_, after) in itertools.pairwise(points) if min(y, after) >= threshold), None)


def at_the_end(rows: list[dict], name: str) -> float:
    """The mean of `name` over the last fifth of the rows that have it."""
    values = [row[name] for row in rows if name in row]
    return float(np.mean(values[-max(len(values) // 5, 1) :]))


def difference(name: str, pairs: list[tuple[list[dict], list[dict]]]) -> dict:
    """at_the_end of the second run of each pair less that of the first: mean, and interval over pairs."""
    change = [at_the_end(treated, name) - at_the_end(plain, name) for plain, treated in pairs]
    return {"mean": float(np.mean(change)), "interval": interval(change)}


def exponents(cells: dict[tuple[float, ...], list[float | None]], draws: int = 1000) -> dict | None:
    """The e_i of onset = c * x_1^e_1 * x_2^e_2 ..., by least squares on the logarithms, all seeds of all cells alike.

    cells: {(x_1, x_2 ...): the onset of each seed}. Those without onset cannot be fitted; `never` says how many they are: where
    there are any, late onsets are missing from the fit. The intervals (95%) draw seeds anew within each cell. None where an x
    has fewer than two values with an onset.
    """
    found = {x: [o for o in onsets if o is not None] for x, onsets in cells.items()}
    found = {x: onsets for x, onsets in found.items() if onsets}
    if not found or any(len({x[i] for x in found}) < 2 for i in range(len(next(iter(found))))):
        return None

    def fit(onsets):
        rows = [([1.0, *np.log(x)], np.log(o)) for x, some in onsets.items() for o in some]
        return np.linalg.lstsq(*map(np.array, zip(*rows, strict=True)), rcond=None)[0][1:]

    rng = np.random.default_rng(0)
    drawn = [fit({x: rng.choice(onsets, len(onsets)) for x, onsets in found.items()}) for _ in range(draws)]
    return {
        "exponents": fit(found).tolist(),
        "intervals": np.quantile(drawn, (0.025, 0.975), axis=0).T.tolist(),
        "never": sum(o is None for onsets in cells.values() for o in onsets),
    }
