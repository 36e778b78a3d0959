"""The copy test of "Language Models 'Grok' to Copy" (arXiv 2409.09281, section 2).

A sample is 50 sequences of random tokens, each a prefix of 12 and a suffix of 6. After all of them, the prefix of sequence i
comes again, and the model must continue with its suffix, all six tokens (i = 5, 10, ..., 50). Where the context is too short
for 50 sequences, as many as fit are used, and the model is asked for each of them.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from errors import UserError
from measures.batching import batches, wide
from measures.statistics import share_interval
from model import KVCache, Llama

PREFIX, SUFFIX, SEQUENCES = 12, 6, 50
LENGTH = PREFIX + SUFFIX


class CopyTest(NamedTuple):
    """sequences (samples, n, 18) of token ids; asked: which of the n the model is asked for, counted from 0; bos: the first id
    of the context, or None; alphabet: the ids that the tokens are drawn from.
    """

    sequences: np.ndarray
    asked: list[int]
    bos: int | None
    alphabet: np.ndarray | None = None

    def context(self) -> np.ndarray:
        """Returns all sequences, without bos: (samples, n * 18)."""
        return self.sequences.reshape(len(self.sequences), -1)

    def cost(self) -> int:
        """Returns how many tokens the model reads."""
        return self.context().size + len(self.sequences) * len(self.asked) * (LENGTH - 1)

    def suffixes(self) -> np.ndarray:
        """Returns the right answers: (asked, samples, 6)."""
        return self.sequences[:, self.asked, PREFIX:].swapaxes(0, 1)

    def hash(self) -> str:
        """Identifies the questions: two models whose tests have the same hash were asked the same."""
        what = f"{self.sequences.shape} {self.asked} {self.bos} None ".encode()  # None: nothing between the sequences
        return hashlib.blake2b(what + self.sequences.astype("<i8").tobytes(), digest_size=6).hexdigest()


def make_test(ids: np.ndarray, seq_len: int, bos=None, samples=500, seed=0, passages=False) -> CopyTest:
    """Draws the test's tokens uniformly from `ids`, with replacement. With passages, `ids` is a text, and each sequence is 18
    consecutive tokens from a random position in it, none of them bos.

    The same arguments give the same test. Within a sample all prefixes differ, and all suffixes. Raises UserError where the
    context does not hold two sequences and a question, or `ids` do not give enough different sequences.
    """
    lead = int(bos is not None)
    n = min(SEQUENCES, (seq_len - lead + 1) // LENGTH - 1)
    if n < 2:
        least = lead + 3 * LENGTH - 1
        raise UserError(f"a context of {seq_len} tokens is too short for the copy test, which takes {least} at least")
    too_few = UserError(f"{len(ids)} tokens to draw from: too few for {n} sequences with different prefixes and suffixes")
    rng = np.random.default_rng([seed, len(ids)])
    if passages:
        seen = np.concatenate(([0], np.cumsum(ids == bos)))  # bos before each place
        starts = np.flatnonzero(seen[LENGTH:] == seen[:-LENGTH])
        if not len(starts):
            raise too_few

    def draw(count):
        if passages:
            return ids[rng.choice(starts, (count, 1)) + np.arange(LENGTH)]
        return rng.choice(ids, (count, LENGTH))

    sequences = draw(samples * n).reshape(samples, n, LENGTH)
    left = range(samples)  # the samples that may hold a prefix or suffix twice
    for _ in range(1000):
        again = {s: repeats for s in left if (repeats := _repeats(sequences[s])).any()}
        if not again:
            asked = list(range(4, n, 5) if n == SEQUENCES else range(n))
            return CopyTest(sequences, asked, bos, np.unique(ids))
        for s, repeats in again.items():
            sequences[s, repeats] = draw(int(repeats.sum()))
        left = again
    raise too_few


def _repeats(sequences: np.ndarray) -> np.ndarray:
    """Returns for each of sequences (n, 18) whether its prefix or its suffix is that of an earlier one: (n,) bool."""
    again = np.ones(len(sequences), dtype=bool)
    again[np.unique(sequences[:, :PREFIX], axis=0, return_index=True)[1]] = False
    fresh = np.unique(sequences[:, PREFIX:], axis=0, return_index=True)[1]
    return again | ~np.isin(np.arange(len(sequences)), fresh)


class Predictions(NamedTuple):
    """What a model predicts for the suffix tokens of a test, (asked, samples, 6) each.

    Each token is predicted after the right ones before it. tokens: the likeliest ones; logprob: the log-probability of the
    right ones, in nats. The first_* are the same at the sequence's first occurrence, where nothing can be copied.
    """

    tokens: np.ndarray
    logprob: np.ndarray
    first_tokens: np.ndarray
    first_logprob: np.ndarray


@torch.no_grad()
def predict(model: Llama, test: CopyTest) -> Predictions:
    """Returns the model's predictions, from one pass over the sequences of a sample and a rewound KVCache for each question."""
    model.eval()
    lead, context = int(test.bos is not None), test.context()
    whole = np.pad(context, ((0, 0), (lead, 0)), constant_values=test.bos or 0)
    found = []
    for part, sequences in batches(model, whole, test.sequences):
        cache = KVCache(model, len(part), part.shape[1] + LENGTH)
        hidden = model.hidden(part, cache=cache)  # (B, T, D)
        answers = []
        for i in test.asked:
            cache.length = part.shape[1]
            query = sequences[:, i]  # (B, 18)
            before = lead + i * LENGTH + PREFIX - 1  # the position that predicts the first suffix token
            first = model.lm_head(hidden[:, before : before + SUFFIX])
            again = model(query[:, :-1], cache=cache)[:, -SUFFIX:]  # (B, 6, V)
            answers.append([*_predicted(again, query[:, PREFIX:]), *_predicted(first, query[:, PREFIX:])])
        found.append([np.stack(kind) for kind in zip(*answers, strict=True)])  # (asked, B, 6) each
    return Predictions(*(np.concatenate(kind, axis=1) for kind in zip(*found, strict=True)))


def _predicted(logits, right) -> tuple[np.ndarray, np.ndarray]:
    """Logits (B, 6, V), right (B, 6) -> the likeliest tokens and the log-probabilities of the right ones, (B, 6) each."""
    logits = wide(logits)
    logprob = logits.log_softmax(-1).gather(-1, right[..., None])[..., 0]
    return logits.argmax(-1).cpu().numpy(), logprob.cpu().numpy()


def copy_scores(test: CopyTest, predictions: Predictions) -> dict:
    """Returns the scores of a model's predictions.

    exact: share of questions with all six suffix tokens right, with its 95% interval, and by sequence asked. Greedy decoding
        gets all six right in exactly these cases, as each is the likeliest after the right ones.
    token, first: share of suffix tokens right, and of first ones
    logprob: mean log-probability of a suffix token, in nats
    token_unseen, logprob_unseen: the same at the first occurrence of the sequence
    """
    right = predictions.tokens == test.suffixes()  # (asked, samples, 6)
    exact = right.all(-1)  # (asked, samples)
    return {
        "exact": float(exact.mean()),
        "interval": share_interval(exact.T),
        "token": float(right.mean()),
        "first": float(right[..., 0].mean()),
        "logprob": float(predictions.logprob.mean()),
        "token_unseen": float((predictions.first_tokens == test.suffixes()).mean()),
        "logprob_unseen": float(predictions.first_logprob.mean()),
        "queries": exact.size,
        "exact_by_sequence": {i + 1: float(e) for i, e in zip(test.asked, exact.mean(1), strict=True)},
    }
