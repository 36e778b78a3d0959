"""Verbatim repetition for training text, `--repeat=SHARE`: copies of passages are inserted shortly after their originals."""

import numpy as np

SHORTEST = 20  # tokens in a passage
LONGEST = 100
WITHIN = 300  # tokens of the original text between the begin of a passage and its copy, at most


def insert_repeats(ids: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Returns the ids (n,) of a document with copies inserted, and how many tokens the copies have.

    On average these are `share` of the tokens returned. Each copy is a passage of the document's own tokens, chosen at random
    among those that end at or before the place of the copy. Documents of fewer than SHORTEST tokens stay as they are.
    """
    n = len(ids)
    if n < SHORTEST:
        return ids, 0
    budget = share / (1 - share) * n
    copies = []
    while True:
        length = int(rng.integers(SHORTEST, min(LONGEST, n) + 1))
        if rng.random() * length >= budget:  # the last copy is made with a probability that keeps the average
            break
        place = int(rng.integers(length, n + 1))
        start = int(rng.integers(max(place - WITHIN, 0), place - length + 1))
        copies.append((place, ids[start : start + length]))
        budget -= length
    copies.sort(key=lambda copy: copy[0])
    pieces = []
    end = 0
    for place, copy in copies:
        pieces += ids[end:place], copy
        end = place
    return np.concatenate([*pieces, ids[end:]]), sum(len(copy) for _, copy in copies)
