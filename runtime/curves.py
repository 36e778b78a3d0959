"""Onsets and end values of a run, from its rows of metrics.jsonl."""

import itertools

import numpy as np

# What forms on the way to copying, the columns that show it (the first that a run has), and the level at which it has formed.
FORMED = {
    "previous-token head": (("previous_max",), 0.5),
    "induction head": (("induction_max",), 0.3),
    "copying": (("copy_token_top128", "copy_token_full"), 0.3),
}


def onset(rows: list[dict], threshold: float, name: str, axis: str = "step") -> float | None:
    """Returns the first point on `axis` at which `name` is at or above the threshold in two consecutive rows, as one may be
    chance; None if there is none.
    """
    points = [(row[axis], row[name]) for row in rows if row.get(name) is not None]
    return next((x for (x, y), (_, after) in itertools.pairwise(points) if min(y, after) >= threshold), None)


def at_the_end(rows: list[dict], name: str) -> float:
    """Returns the mean of `name` over the last fifth of the rows that have it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values[-max(len(values) // 5, 1) :]))


def formed(rows: list[dict]) -> dict[str, float]:
    """Returns the number of tokens after which each of FORMED had formed, for those that did."""
    found = {}
    for title, (names, level) in FORMED.items():
        name = next((name for name in names if any(name in row for row in rows)), names[-1])
        found[title] = onset(rows, level, name, "tokens")
    return {title: tokens for title, tokens in found.items() if tokens is not None}
