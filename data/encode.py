"""Documents -> token ids, on all cores: batches go out to worker processes, and ids come back in the order of the documents.

The result does not depend on the number of processes. The main process reads and writes, which is little work: encoding a
batch takes hundreds of times longer than sending it.
"""

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from data.documents import Document, Part
from data.meta import SPLITS, TOKEN
from data.tokenizer import tokenizer_from_state
from data.tokenizer_kinds import Tokenizer
from errors import UserError

BATCH = 2**20  # characters of text in a batch, about; large enough that sending it costs little
AHEAD = 3  # batches in flight per process, so that none waits
SHORTEST = 20  # tokens in a passage that --repeat copies
LONGEST = 100
WITHIN = 300  # most tokens of the original text from the start of a passage to its copy


class Batch(NamedTuple):
    """Documents of one group. end: where reading resumes after them, as the number of a part and the state of its read()."""

    documents: list[Document]
    group: str
    end: tuple[int, Any]


class Settings(NamedTuple):
    """How documents become tokens, apart from the tokenizer."""

    val_fraction: float
    seed: int = 0
    repeat: float = 0.0  # share of the training tokens in inserted copies


class Encoded(NamedTuple):
    """The tokens of a batch and its statistics.

    ids: uint16, by split, bos before each document
    counts: "docs", "bytes" (of text) and "copied" (tokens that --repeat inserted) by split; "dropped" and "altered" (documents)
        by reason
    first: the id of the first dropped document, by reason
    places: the lowest and the highest split_hash() of the documents
    """

    ids: dict[str, np.ndarray]
    counts: dict[str, Counter]
    first: dict[str, str]
    places: tuple[float, float]


def batches(parts: list[Part], start: tuple[int, Any], is_full: Callable[[str], bool]) -> Iterator[Batch]:
    """Yields all documents from `start` on, as in Batch.end. Once a group is full, no more of it is read."""
    first, state = start
    for group, run in itertools.groupby(range(first, len(parts)), key=lambda i: parts[i].group):
        documents = []
        chars = 0
        for i in run:
            if is_full(group):
                break
            for document, after in parts[i].read(state if i == first else None):
                documents.append(document)
                end = (i, after)
                chars += len(document.text or "") + 64  # a document without text takes memory too
                if chars >= BATCH:
                    yield Batch(documents, group, end)
                    documents = []
                    chars = 0
                    if is_full(group):
                        break
        if documents:
            yield Batch(documents, group, end)


def encode(tokenizer: Tokenizer, documents: list[Document], settings: Settings) -> Encoded:
    """Returns the tokens of the documents; one is held out for validation if its split_hash() is below val_fraction."""
    bos = np.array([tokenizer.bos], TOKEN)
    pieces = {split: [bos[:0]] for split in SPLITS}
    counts = defaultdict(Counter)
    first = {}
    lowest, highest = 1.0, 0.0
    for document in documents:
        text = document.text
        if not text:
            reason = document.dropped or "empty"
            counts["dropped"][reason] += 1
            first.setdefault(reason, document.id)
            continue
        data = text.encode()
        place = split_hash(data, settings.seed)
        lowest, highest = min(place, lowest), max(place, highest)
        split = "val" if place < settings.val_fraction else "train"
        ids = np.asarray(tokenizer.encode(text), TOKEN)
        if change := tokenizer.altered(text, ids):
            counts["altered"][change] += 1
        if settings.repeat and split == "train":
            n = len(ids)
            ids = insert_repeats(ids, settings.repeat, np.random.default_rng([settings.seed, int(place * 2**64)]))
            counts["copied"][split] += len(ids) - n
        pieces[split] += bos, ids
        counts["docs"][split] += 1
        counts["bytes"][split] += len(data)
    return Encoded({split: np.concatenate(pieces[split]) for split in SPLITS}, counts, first, (lowest, highest))


def split_hash(text: bytes, seed: int) -> float:
    """Returns a hash of the text in [0, 1): a document keeps its split when the source grows."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def insert_repeats(ids: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the ids (n,) of a document with copies inserted that make up `share` of the result, on average.

    Each copy is a passage of the document's own tokens, chosen at random among those that end at or before the place of the
    copy. Documents of fewer than SHORTEST tokens stay as they are.
    """
    n = len(ids)
    if n < SHORTEST:
        return ids
    budget = share / (1 - share) * n
    places, copies = [], []
    while True:
        length = int(rng.integers(SHORTEST, min(LONGEST, n) + 1))
        if rng.random() * length >= budget:  # the last copy is made with a probability that keeps the average
            break
        place = int(rng.integers(length, n + 1))
        start = int(rng.integers(max(place - WITHIN, 0), place - length + 1))
        places.append(place)
        copies.append(ids[start : start + length])
        budget -= length
    if not copies:
        return ids
    return np.insert(ids, np.repeat(places, list(map(len, copies))), np.concatenate(copies))


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, settings: Settings, processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Yields each batch, without its documents, and its tokens. Encodes in this process if there is one batch or process."""
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if processes <= 1 or len(first) < 2:
        for batch in batches:
            yield batch._replace(documents=[]), encode(tokenizer, batch.documents, settings)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer.state(), settings))
    in_flight = deque()
    try:
        for batch in batches:
            with _ctrl_c_later():  # workers are started here: Ctrl-C is left to this process
                future = pool.submit(_encode, batch.documents)
            in_flight.append((batch._replace(documents=[]), future))
            if len(in_flight) > AHEAD * processes:
                batch, future = in_flight.popleft()
                yield batch, future.result()
        for batch, future in in_flight:
            yield batch, future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes was killed, perhaps for lack of memory; run the same command again to resume, "
            f"with --processes={max(processes // 2, 1)} if it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _ctrl_c_later():
    """Delays a Ctrl-C until the end of the block, and hides it from processes started in the block."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    came = []
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True))  # the mask covers only this thread
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _start_worker(tokenizer_state, settings):
    """Runs first in a new process, which exits when the main process dies."""
    global _tokenizer, _settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _tokenizer = tokenizer_from_state(tokenizer_state)
    _settings = settings


def _encode(documents):
    return encode(_tokenizer, documents, _settings)
