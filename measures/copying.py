"""The copying test of "Language Models 'Grok' to Copy" (arXiv 2409.09281, section 2), and what simple readers score on it.

A sample is 50 sequences of random tokens, 12 of prefix and 6 of suffix, one after the other; then comes the prefix of sequence
i again, and the model must go on with its suffix, all six tokens (i = 5, 10, ..., 50). Where the context is too short for 50,
as many sequences as fit are used and every one is asked.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from data.tokenizer import Tokenizer
from errors import UserError
from measures.statistics import interval
from model import KVCache, Llama

PREFIX, SUFFIX, SEQUENCES = 12, 6, 50
K = (1, 2, 3, 4)
PASS = 32768  # tokens at once, about
TELLING = 10  # tokens by which readers of k and of k - 1 tokens must differ to be told apart


class CopyTest(NamedTuple):
    """contexts (samples, sequences, 18) of token ids; asked: the sequences queried, from 0; bos: first id, or None; separator:
    the id after each sequence, or None.
    """

    contexts: np.ndarray
    asked: list[int]
    bos: int | None
    separator: int | None = None

    def tokens(self) -> np.ndarray:
        """All sequences, a separator after each, without bos: (samples, n * 18) or (samples, n * 19)."""
        rows = self.contexts
        if self.separator is not None:
            rows = np.pad(rows, ((0, 0), (0, 0), (0, 1)), constant_values=self.separator)
        return rows.reshape(len(rows), -1)

    def hash(self) -> str:
        """Of all that the questions are made of: two models with one hash were asked the same."""
        what = f"{self.contexts.shape} {self.asked} {self.bos} {self.separator} ".encode()
        return hashlib.blake2b(what + self.contexts.astype("<i8").tobytes(), digest_size=6).hexdigest()


def alphabet_ids(tokenizer: Tokenizer, name: str) -> np.ndarray:
    """The ids that test tokens are drawn from.

    full: all but special ones; a number n: n of those, drawn with a fixed seed; hex16: the ids of the characters 0-9a-f
    (the paper's Figure 1), or 16 drawn ones where the vocabulary lacks them.
    """
    ids = np.array([i for i in range(tokenizer.size) if i not in tokenizer.special])
    if name == "full":
        return ids
    if name == "hex16" and tokenizer.hex_ids():
        return np.array(tokenizer.hex_ids())
    n = 16 if name == "hex16" else int(name) if name.isdecimal() else 0
    if not 2 <= n <= len(ids):
        raise UserError(f"alphabet={name}: expected full, hex16 or a number from 2 to the {len(ids)} ids that are not special")
    return np.random.default_rng(n).permutation(ids)[:n]


def make_test(tokenizer: Tokenizer, alphabet: str, seq_len: int, samples=500, seed=0, separator=False) -> CopyTest:
    """The same samples for the same arguments. Within a sample all prefixes differ, and so do all suffixes.

    separator: puts the line end of the paper's Figure 1 after each sequence; where the vocabulary has none, the first id that
    is not special. Test tokens are then drawn from the others.
    """
    ids, end = alphabet_ids(tokenizer, alphabet), None
    if separator:
        line_end = [] if tokenizer.kind in ("chars", "ids") else list(tokenizer.encode("\n"))
        end = int(line_end[-1]) if line_end else min(set(range(tokenizer.size)) - tokenizer.special)
        ids = ids[ids != end]
    each = PREFIX + SUFFIX + separator
    room = seq_len - (tokenizer.bos is not None) - PREFIX - SUFFIX + 1
    n = min(SEQUENCES, room // each)
    if n < 2:
        least = seq_len - room + 2 * each
        raise UserError(f"seq_len={seq_len}: too short for the copy test, which takes {least} tokens at least")
    rng = np.random.default_rng([seed, len(ids)])
    contexts = rng.choice(ids, (samples, n, PREFIX + SUFFIX))
    while (again := np.flatnonzero([_repeats(c[:, :PREFIX]) or _repeats(c[:, PREFIX:]) for c in contexts])).size:
        contexts[again] = rng.choice(ids, (len(again), n, PREFIX + SUFFIX))
    return CopyTest(contexts, list(range(4, n, 5) if n == SEQUENCES else range(n)), tokenizer.bos, end)


def _repeats(rows: np.ndarray) -> bool:
    return len(np.unique(rows, axis=0)) < len(rows)


class Answers(NamedTuple):
    """What a model says to a test, (asked, samples, 6) each: the likeliest token, given the right ones before it; and the
    log-probability of the right one, in nats.
    """

    tokens: np.ndarray
    logprob: np.ndarray


@torch.no_grad()
def answers(model: Llama, test: CopyTest) -> Answers:
    """The queries of a sample share one pass over its sequences: their keys and values are kept, and rewound for each."""
    model.eval()
    device = model.embed.weight.device
    rows, parts = test.tokens(), []
    pieces = -(-rows.size // PASS)
    for contexts, part in zip(np.array_split(test.contexts, pieces), np.array_split(rows, pieces), strict=True):
        context = torch.from_numpy(part).to(device)  # (B, n * 18)
        if test.bos is not None:
            context = torch.cat((torch.full_like(context[:, :1], test.bos), context), dim=1)
        cache, said = KVCache(model, len(part), context.shape[1] + PREFIX + SUFFIX), []
        model.hidden(context, cache=cache)
        for i in test.asked:
            cache.length = context.shape[1]
            query = torch.from_numpy(contexts[:, i]).to(device)  # (B, 18)
            logits = model(query[:, :-1], cache=cache)[:, -SUFFIX:].float()  # (B, 6, V)
            logprob = logits.log_softmax(-1).gather(-1, query[:, PREFIX:, None])[..., 0]
            said.append((logits.argmax(-1).cpu().numpy(), logprob.cpu().numpy()))
        parts.append([np.stack(kind) for kind in zip(*said, strict=True)])  # (asked, B, 6) each
    return Answers(*(np.concatenate(kind, axis=1) for kind in zip(*parts, strict=True)))


def copy_scores(test: CopyTest, said: Answers) -> dict:
    """exact: share of queries with all six suffix tokens right, its 95% interval over samples, and by sequence asked; token,
    first: share of tokens, of first tokens; logprob: mean log-probability of a suffix token, in nats.

    Greedy decoding is right on all six exactly when these are: each is the likeliest after the right ones.
    """
    right = said.tokens == suffixes(test)  # (asked, samples, 6)
    exact = right.all(-1)  # (asked, samples)
    return {
        "exact": float(exact.mean()),
        "interval": interval(exact.mean(0)),
        "token": float(right.mean()),
        "first": float(right[..., 0].mean()),
        "logprob": float(said.logprob.mean()),
        "queries": exact.size,
        "exact_by_sequence": {i + 1: float(e) for i, e in zip(test.asked, exact.mean(1), strict=True)},
    }


def suffixes(test: CopyTest) -> np.ndarray:
    """What is right: (asked, samples, 6)."""
    return test.contexts[:, test.asked, PREFIX:].swapaxes(0, 1)


def kgram_readers(test: CopyTest) -> Iterator[np.ndarray]:
    """What readers of k = 0, 1 .. 4 tokens go on with, for each sequence asked and each of its six suffix tokens in turn:
    (5, samples, tokens) counts, over the tokens as numbered(test) has them, of what followed the last k tokens earlier.
    """
    labels = numbered(test)[0]  # (samples, n * 18)
    samples, T = labels.shape
    each = T // test.contexts.shape[1]
    size, row = labels.max() + 1, np.arange(samples)[:, None]
    for i in test.asked:
        whole = np.concatenate((labels, labels[:, i * each : i * each + PREFIX + SUFFIX]), axis=1)
        for end in range(whole.shape[1] - SUFFIX, whole.shape[1]):  # predict token `end` from those before it
            match, counts = np.ones((samples, end), dtype=bool), []  # of places j, before which the last k tokens stand
            for k in (0, *K):
                if k:
                    match[:, :k] = False
                    match[:, k:] &= whole[:, : end - k] == whole[:, end - k, None]
                at = np.broadcast_to(row, match.shape)[match] * size + whole[:, :end][match]
                counts.append(np.bincount(at, minlength=samples * size).reshape(samples, size))
            yield np.stack(counts)


def numbered(test: CopyTest) -> tuple[np.ndarray, list[np.ndarray]]:
    """The tokens of each sample as numbers from 0, (samples, n * 18), and for each sample the token ids that they number."""
    found = [np.unique(row, return_inverse=True) for row in test.tokens()]
    return np.stack([inverse for _, inverse in found]), [ids for ids, _ in found]


def kgrams(test: CopyTest, said: Answers) -> dict:
    """Readers of k tokens: they find all earlier places of the last k tokens and go on with the follower of one of them, each
    as likely as the other.

    ceiling: the exact match expected of each reader.
    uses: whether the model goes by the k-th token back, seen where a reader of k tokens has fewer followers to choose from than
    one of k - 1. Of the model's likeliest tokens that are among the latter's, how many more than by chance are among the
    former's: 0 for a reader of k - 1 tokens, 1 for one of k or more; None where the two differ in too few places to tell.
    like: the last k up to which all uses are above one half.
    """
    labels, ids = numbered(test)
    size = labels.max() + 1
    # The model's tokens as numbers; one that its sample lacks is `size`, which no reader goes on with.
    place = [np.searchsorted(known, said.tokens[:, s]).clip(max=len(known) - 1) for s, known in enumerate(ids)]
    own = np.stack(
        [np.where(known[at] == said.tokens[:, s], at, size) for s, (known, at) in enumerate(zip(ids, place, strict=True))],
        axis=1,
    )  # (asked, samples, 6)
    each = labels.shape[1] // test.contexts.shape[1]
    samples, rows = len(labels), np.arange(len(labels))
    chance = np.ones((len(test.asked), len(K), samples))  # of all six tokens right, by reader
    hits, by_chance, places = np.zeros(len(K)), np.zeros(len(K)), np.zeros(len(K))
    for n, counts in enumerate(kgram_readers(test)):
        a, t = divmod(n, SUFFIX)
        right = labels[:, test.asked[a] * each + PREFIX + t]
        share = counts / counts.sum(-1, keepdims=True)  # (5, samples, tokens)
        chance[a] *= share[1:, rows, right]
        said_so = np.pad(counts > 0, ((0, 0), (0, 0), (0, 1)))[:, rows, own[a, :, t]]  # (5, samples)
        among = np.where(counts[1:] > 0, share[:-1], 0).sum(-1)  # (4, samples): of the followers of k - 1, those of k
        differ = among < 1
        # Of the model's tokens that a reader of k - 1 could say too.
        asked = differ & said_so[:-1]
        places += asked.sum(1)
        hits += (asked & said_so[1:]).sum(1)
        by_chance += np.where(asked, among, 0).sum(1)
    uses = [(h - c) / (p - c) if p - c >= TELLING else None for h, c, p in zip(hits, by_chance, places, strict=True)]
    like = next((k - 1 for k, u in zip(K, uses, strict=True) if u is None or u < 0.5), K[-1])
    ceilings = chance.mean((0, 2))
    return {
        "ceiling": {k: float(c) for k, c in zip(K, ceilings, strict=True)},
        "uses": {k: None if u is None else float(u) for k, u in zip(K, uses, strict=True)},
        "like": like,
    }
