"""Documents -> token ids, on all cores: batches out to the processes, ids back, in the order of the documents.

What comes back does not depend on the number of processes. The parent reads and writes, which is little work: a batch of
text costs hundreds of times more to encode than to send.
"""

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

from data.meta import SPLITS, TOKEN
from data.readers import Document
from data.sources import Part
from data.tokenizer import Tokenizer, tokenizer_from_state
from errors import UserError

BATCH = 2**20  # characters of text in a batch, about: as many as make sending it cheap
AHEAD = 3  # batches out per process, so that none waits


class Batch(NamedTuple):
    """part, taken: where the source stands behind it, that is in which part and how many documents of it came before."""

    documents: list[Document]
    part: int
    taken: int
    read: int  # bytes of that part
    group: str


@dataclass
class Encoded:
    """What a batch became. ids: uint16, each document with bos before it; dropped, altered: how many documents, by reason,
    and first: the id of the first dropped of each; lowest: the least split_place().
    """

    ids: dict[str, np.ndarray]
    docs: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)
    dropped: Counter = field(default_factory=Counter)
    altered: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    lowest: float = 1.0


def batches(parts: list[Part], part: int, taken: int, full: Callable[[str], bool]) -> Iterator[Batch]:
    """All documents from document `taken` of part `part` on. Of a group that is full() no more are read."""
    for group, run in itertools.groupby(range(part, len(parts)), key=lambda i: parts[i].group):
        held, size, last = [], 0, None
        for i in run:
            if full(group):
                break
            for n, document in enumerate(parts[i].read(), 1):
                if i == part and n <= taken:
                    continue
                held.append(document)
                size += len(document.text or "") + 64  # a document without text is held too
                last = i, n, document.read
                if size >= BATCH:
                    yield Batch(held, *last, group)
                    held, size = [], 0
                    if full(group):
                        break
        if held:
            yield Batch(held, *last, group)


def encode(tokenizer: Tokenizer, documents: list[Document], val_fraction: float, seed: int) -> Encoded:
    """The documents as ids; each is held out to validate on where its text's split_place() is below val_fraction."""
    pieces, out, bos = {split: [] for split in SPLITS}, Encoded({}), np.array([tokenizer.bos], TOKEN)
    for document in documents:
        text = document.text
        if not text:
            reason = document.dropped or "empty"
            out.dropped[reason] += 1
            out.first.setdefault(reason, document.id)
            continue
        data = text.encode()
        place = split_place(data, seed)
        split = "val" if place < val_fraction else "train"
        ids = np.asarray(tokenizer.encode(text), TOKEN)
        pieces[split] += bos, ids
        out.docs[split] += 1
        out.bytes[split] += len(data)
        out.lowest = min(out.lowest, place)
        if change := tokenizer.altered(text, ids):
            out.altered[change] += 1
    out.ids = {split: np.concatenate([bos[:0], *pieces[split]]) for split in SPLITS}
    return out


def split_place(text: bytes, seed: int) -> float:
    """Where the text lies in 0..1, by its hash: it stays there when the source grows."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def encode_all(
    batches: Iterable[Batch], tokenizer: Tokenizer, val_fraction: float, seed: int, processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Each batch, without its documents, and what it became. One batch or one process is done here, with no other."""
    batches = iter(batches)
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if processes == 1 or len(first) < 2:
        for batch in batches:
            yield batch._replace(documents=[]), encode(tokenizer, batch.documents, val_fraction, seed)
        return
    start = tokenizer.state(), val_fraction, seed
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin, start)
    out = deque()
    try:
        for batch in batches:
            out.append((batch._replace(documents=[]), pool.submit(_encode, batch.documents)))
            if len(out) > AHEAD * processes:
                batch, future = out.popleft()
                yield batch, future.result()
        for batch, future in out:
            yield batch, future.result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {processes} processes was killed, perhaps for want of memory; the same command goes on, "
            f"with --processes={max(processes // 2, 1)} if it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(state, val_fraction, seed):
    """In a new process. Ctrl-C is the parent's to answer; where the parent is killed, this one goes too."""
    global _encode_with
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    _encode_with = tokenizer_from_state(state), val_fraction, seed


def _encode(documents):
    tokenizer, val_fraction, seed = _encode_with
    return encode(tokenizer, documents, val_fraction, seed)
