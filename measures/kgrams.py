"""The k-gram baseline of the copy test: the score of copying by the last k tokens alone, and whether the model does so.

The baseline finds all earlier occurrences of the last k tokens and predicts the token that followed one of them, chosen
uniformly. Textbook induction heads do so for k = 1, which fails where every token has occurred often.
"""

from collections.abc import Iterator

import numpy as np

from measures.copying import LENGTH, PREFIX, SUFFIX, CopyTest, Predictions

K = (1, 2, 3, 4)
INFORMATIVE = 10  # predictions, beyond those right by chance, that are needed to report the use of token k


def numbered(test: CopyTest) -> tuple[np.ndarray, list[np.ndarray]]:
    """Numbers the distinct tokens of each sample from 0. Returns the contexts in these numbers (samples, T), and the token ids
    by number for each sample.
    """
    found = [np.unique(row, return_inverse=True) for row in test.context()]
    return np.stack([numbers for _, numbers in found]), [ids for ids, _ in found]


def follower_counts(test: CopyTest) -> Iterator[np.ndarray]:
    """Yields, for each sequence asked and each of its six suffix tokens, how often each token of the sample (by its number in
    numbered(test)) followed the last k tokens before: (5, samples, tokens) counts for k = 0, 1, 2, 3, 4.
    """
    context = numbered(test)[0]  # (samples, T)
    samples = len(context)
    size = context.max() + 1
    sample = np.arange(samples)[:, None]
    for i in test.asked:
        whole = np.concatenate((context, context[:, i * LENGTH : (i + 1) * LENGTH]), axis=1)
        for end in range(whole.shape[1] - SUFFIX, whole.shape[1]):  # predict token `end` from those before it
            match = np.ones((samples, end), dtype=bool)  # whether the last k tokens stand right before place j
            counts = []
            for k in (0, *K):
                if k:
                    match[:, :k] = False
                    match[:, k:] &= whole[:, : end - k] == whole[:, end - k, None]
                at = np.broadcast_to(sample, match.shape)[match] * size + whole[:, :end][match]
                counts.append(np.bincount(at, minlength=samples * size).reshape(samples, size))
            yield np.stack(counts)


def _predicted_numbers(ids: list[np.ndarray], tokens: np.ndarray, missing: int) -> np.ndarray:
    """Returns predicted ids (asked, samples, 6) as numbers of their sample, `missing` for those that the sample lacks."""
    columns = []
    for s, known in enumerate(ids):
        place = np.searchsorted(known, tokens[:, s]).clip(max=len(known) - 1)
        columns.append(np.where(known[place] == tokens[:, s], place, missing))
    return np.stack(columns, axis=1)


def kgram_baseline(test: CopyTest, predictions: Predictions) -> dict:
    """Compares a model's predictions with the baselines of k = 1 to 4.

    ceiling: the exact match that the baseline is expected to score, by k. It is no upper bound: continuing with the most
    frequent of the tokens that followed scores more.
    uses: whether the model's predictions depend on the k-th last token, by k, measured where the baseline of k has fewer tokens
    to choose from than that of k - 1: among the predictions that the latter could make, the share that the former could make
    too, corrected for chance. 0 for a model that uses k - 1 tokens, 1 for one that uses k or more. None if these predictions,
    less those right by chance, are fewer than INFORMATIVE.
    """
    context, ids = numbered(test)
    samples = len(context)
    predicted = _predicted_numbers(ids, predictions.tokens, missing=context.max() + 1)
    row = np.arange(samples)
    chance = np.ones((len(test.asked), len(K), samples))  # that the baseline gets all six right
    hits = np.zeros(len(K))
    by_chance = np.zeros(len(K))
    places = np.zeros(len(K))
    for step, counts in enumerate(follower_counts(test)):
        a, t = divmod(step, SUFFIX)
        right = context[:, test.asked[a] * LENGTH + PREFIX + t]
        share = counts / counts.sum(-1, keepdims=True)  # (5, samples, tokens)
        chance[a] *= share[1:, row, right]
        possible = np.pad(counts > 0, ((0, 0), (0, 0), (0, 1)))[:, row, predicted[a, :, t]]  # (5, samples)
        kept = np.where(counts[1:] > 0, share[:-1], 0).sum(-1)  # (4, samples): of the followers of k - 1, those of k
        telling = (kept < 1) & possible[:-1]
        places += telling.sum(1)
        hits += (telling & possible[1:]).sum(1)
        by_chance += np.where(telling, kept, 0).sum(1)
    uses = [(h - c) / (p - c) if p - c >= INFORMATIVE else None for h, c, p in zip(hits, by_chance, places, strict=True)]
    return {
        "ceiling": dict(zip(K, chance.mean((0, 2)).tolist(), strict=True)),
        "uses": {k: None if u is None else float(u) for k, u in zip(K, uses, strict=True)},
    }
