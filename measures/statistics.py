"""Confidence intervals."""

import numpy as np


def interval(values, draws: int = 2000) -> list[float]:
    """The 95% bootstrap interval of the mean of values (n,): of n drawn with replacement, with a fixed seed."""
    values = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return [float(x) for x in np.quantile(drawn, (0.025, 0.975))]
