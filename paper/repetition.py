"""How often a corpus repeats itself within a window, and how well the repeats predict the next token."""

import functools

import numpy as np

from config import ROOT, Config
from data.bins import Bin, order
from runtime.validation import repeated

WINDOWS = 1000


def repetition(ids: np.ndarray) -> dict[str, float]:
    """Returns what windows (B, T+1) of token ids offer to an induction head, over all B * T targets.

    frequency: the share of targets whose current token, the one before, occurred earlier in the window
    reliability: among these, how often what followed its latest occurrence is the target
    predictable: the share of targets that followed their current token somewhere earlier in the window
    """
    x, y = ids[:, :-1], ids[:, 1:]
    places = np.argsort(x, axis=1, kind="stable")  # equal tokens one after the other, in the order of the window
    ordered = np.take_along_axis(x, places, axis=1)
    followed = np.take_along_axis(y, places, axis=1)
    again = ordered[:, 1:] == ordered[:, :-1]
    right = (followed[:, 1:] == followed[:, :-1])[again]
    return {
        "frequency": float(again.sum() / x.size),
        "reliability": float(right.mean()) if right.size else 0.0,
        "predictable": float(repeated(ids, 2).mean()),
    }


@functools.cache
def of_training_data(config: Config) -> dict[str, float]:
    """Returns the repetition in windows of a run's training data, drawn at random; {} where the data are gone."""
    path = ROOT / config.data / "train.bin"
    if not path.exists():
        return {}
    data = Bin(path, config.seq_len, config.vocab_size)
    return repetition(data.windows(order(0, 0, data.n_windows)[:WINDOWS]))
