"""Confidence intervals that cover 95% for small samples, and for shares near 0 and 1."""

import math

import numpy as np

# The 97.5% quantile of Student's t for 1 to 10 degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
Z_975 = 1.959964


def t_975(freedom: int) -> float:
    """Returns the 97.5% quantile of Student's t; beyond the table by the expansion of Cornish and Fisher, to three decimals."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z, n = Z_975, freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def mean_interval(values, rounding: float = 0.0) -> list[float] | None:
    """Returns the 95% t interval of the mean of independent values (n,); None for fewer than two values.

    rounding: the standard deviation of the values' rounding error. Three onsets on the same evaluation step are not known more
    exactly than the distance of two evaluations allows.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return None
    half = t_975(len(values) - 1) * max(values.std(ddof=1), rounding) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def share_interval(hits: np.ndarray) -> list[float]:
    """Returns the 95% interval of a share of hits (samples, questions) bool, where a sample's questions are not independent.

    The interval of Agresti and Coull (1998) at the effective number of questions (Korn and Graubard 1998): their number divided
    by the design effect, the variance of the mean over samples relative to that of independent questions, between 1 and the
    questions per sample. The estimate is too low where few samples have a hit, or few a miss: with k of them it is multiplied
    by 1 + 2/k, and without any the largest value is taken. Student's t over samples covers badly near 0 and 1, where it may
    have no width, and Wilson's interval somewhat too little.
    """
    samples, questions = hits.shape
    share = float(hits.mean())
    effect = float(questions)
    if 0 < share < 1 and samples > 1:
        variance = hits.mean(1).var(ddof=1) / samples
        k = min(hits.any(1).sum(), (~hits).any(1).sum())
        effect = min(max(variance * hits.size / (share * (1 - share)), 1.0) * (1 + 2 / k), effect)
    t2 = (t_975(samples - 1) if samples > 1 else T_975[0]) ** 2
    n = hits.size / effect + t2
    middle = (share * hits.size / effect + t2 / 2) / n
    half = math.sqrt(t2 * middle * (1 - middle) / n)
    return [max(middle - half, 0.0) if share else 0.0, min(middle + half, 1.0) if share < 1 else 1.0]
