"""The alphabets of the copy test: which ids its tokens are drawn from, and how often each.

Random tokens of the whole vocabulary are a hard test where the training data holds most ids rarely or never, so there are
alphabets that depend on how often each id occurs there.
"""

from typing import NamedTuple

import numpy as np

from errors import UserError

RARE = 1e-5  # share of the training tokens below which an id is hardly trained


class Vocabulary(NamedTuple):
    """ids (n,): all but special ones; hex_ids: those of the characters 0-9a-f, or None where one is no token by itself;
    shares (n,): how large a part of the training tokens each id is, or None where it is unknown.
    """

    ids: np.ndarray
    hex_ids: list[int] | None = None
    shares: np.ndarray | None = None

    def untrained(self, ids) -> tuple[int, int] | None:
        """Returns how many of `ids` never occur in the training data, and how many are RARE there; None where it is unknown."""
        if self.shares is None:
            return None
        return tuple(int(np.isin(self.ids[few], ids).sum()) for few in (self.shares == 0, self.shares < RARE))


def default_alphabets(vocabulary: Vocabulary) -> list[str]:
    return ["full", "hex16"] + ["top128"] * (len(vocabulary.ids) >= 256 and vocabulary.shares is not None)


def alphabet(vocabulary: Vocabulary, name: str) -> np.ndarray:
    """Returns the ids of an alphabet. Raises UserError.

    full     all ids but special ones
    hex16    the characters 0-9a-f (the paper's Figure 1), or 16 random ids where the vocabulary lacks them
    N        N random ids, always the same
    topN     the N most frequent ids of the training data, in the order of ids: where two datasets have the same ones, models
             are asked the same questions
    freq     each id as many times as it occurs in a million training tokens
    seen     ids that are not RARE in the training data
    """
    ids, hex_ids, shares = vocabulary
    if name == "full":
        return ids
    if name == "hex16" and hex_ids:
        return np.array(hex_ids)
    number = name.removeprefix("top")
    n = 16 if name == "hex16" else int(number) if number.isdecimal() else 0
    if name not in ("freq", "seen") and not 2 <= n <= len(ids):
        known = "full, hex16, text, freq, seen, N or topN"
        raise UserError(f"alphabet={name}: expected {known}, with N from 2 to the {len(ids)} ids that are not special")
    if n and not name.startswith("top"):
        return np.random.default_rng(n).permutation(ids)[:n]
    if shares is None:
        missing = "how often each id occurs in the training data is not known for this model"
        raise UserError(f"alphabet={name}: {missing}; use full, hex16 or a number of random ids")
    if name == "freq":
        return np.repeat(ids, np.rint(shares * 1e6).astype(int))
    return ids[shares >= RARE] if name == "seen" else np.sort(ids[np.argsort(-shares, kind="stable")[:n]])
