"""Documents -> token ids, on all cores: batches out to the worker processes, ids back, in the order of the documents.

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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.documents import Document, Part
from data.meta import SPLITS, TOKEN
from data.repeat import insert_repeats
from data.tokenizer import tokenizer_from_state
from data.tokenizer_kinds import Tokenizer
from errors import UserError

BATCH = 2**20  # characters of text in a batch, about; large enough that sending it costs little
AHEAD = 3  # batches in flight per process, so that none waits


class Position(NamedTuple):
    """Where reading resumes: after `taken` documents of a part.

    state: what to pass to Part.read(); it then begins after `skipped` documents.
    read: bytes of the part that were read by then.
    """

    part: int = 0
    taken: int = 0
    state: dict | None = None
    skipped: int = 0
    read: int = 0


class Batch(NamedTuple):
    """Documents of one group, and the position behind the last of them."""

    documents: list[Document]
    end: Position
    group: str


class Settings(NamedTuple):
    """How documents become tokens, apart from the tokenizer."""

    val_fraction: float
    seed: int = 0
    repeat: float = 0.0  # share of the training tokens in inserted copies


@dataclass
class Encoded:
    """The tokens of a batch, by split, and what there is to count.

    ids: uint16, bos before each document
    docs, bytes: number of documents and bytes of their text, by split
    dropped, altered: number of documents, by reason; first: the id of the first dropped document, by reason
    lowest: the least split_hash()
    repeated: tokens in inserted copies
    """

    ids: dict[str, np.ndarray] = field(default_factory=dict)
    docs: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    altered: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    lowest: float = 1.0
    repeated: int = 0


def batches(parts: list[Part], start: Position, is_full: Callable[[str], bool]) -> Iterator[Batch]:
    """Yields all documents from position `start` on. Once a group is full, no more of it is read."""
    for group, run in itertools.groupby(range(start.part, len(parts)), key=lambda i: parts[i].group):
        documents = []
        size = 0
        for i in run:
            if is_full(group):
                break
            resumed = i == start.part
            state, skipped = (start.state, start.skipped) if resumed else (None, 0)
            for taken, document in enumerate(parts[i].read(state), skipped + 1):
                if document.state is not None:
                    state, skipped = document.state, taken - 1
                if resumed and taken <= start.taken:
                    continue
                documents.append(document._replace(state=None))
                size += len(document.text or "") + 64  # a document without text takes memory too
                end = Position(i, taken, state, skipped, document.read)
                if size >= BATCH:
                    yield Batch(documents, end, group)
                    documents = []
                    size = 0
                    if is_full(group):
                        break
        if documents:
            yield Batch(documents, end, group)


def encode(tokenizer: Tokenizer, documents: list[Document], settings: Settings) -> Encoded:
    """Returns the tokens of the documents; one is held out for validation if its split_hash() is below val_fraction."""
    out = Encoded()
    bos = np.array([tokenizer.bos], TOKEN)
    pieces = {split: [bos[:0]] for split in SPLITS}
    for document in documents:
        text = document.text
        if not text:
            reason = document.dropped or "empty"
            out.dropped[reason] += 1
            out.first.setdefault(reason, document.id)
            continue
        data = text.encode()
        place = split_hash(data, settings.seed)
        split = "val" if place < settings.val_fraction else "train"
        ids = np.asarray(tokenizer.encode(text), TOKEN)
        if settings.repeat and split == "train":
            with_copies, n = insert_repeats(ids, settings.repeat, np.random.default_rng([settings.seed, int(place * 2**64)]))
            pieces[split] += bos, with_copies
            out.repeated += n
        else:
            pieces[split] += bos, ids
        out.docs[split] += 1
        out.bytes[split] += len(data)
        out.lowest = min(out.lowest, place)
        if change := tokenizer.altered(text, ids):
            out.altered[change] += 1
    out.ids = {split: np.concatenate(pieces[split]) for split in SPLITS}
    return out


def split_hash(text: bytes, seed: int) -> float:
    """Returns a hash of the text in [0, 1): a document keeps its split when the source grows."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, settings: Settings, processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Yields each batch, without its documents, and its tokens. A single batch or process is encoded in this process."""
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if processes == 1 or len(first) < 2:
        for batch in batches:
            yield batch._replace(documents=[]), encode(tokenizer, batch.documents, settings)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer.state(), settings))
    in_flight = deque()
    try:
        for batch in batches:
            with _sigint_blocked():  # workers are started here, and inherit it: Ctrl-C is left to this process
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
def _sigint_blocked():
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(tokenizer_state, settings):
    """Runs first in a new process, which exits when the main process dies."""
    global _tokenizer, _settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _tokenizer = tokenizer_from_state(tokenizer_state)
    _settings = settings


def _encode(documents):
    return encode(_tokenizer, documents, _settings)
