"""Writes a dataset, whole or not at all, and resumes one that was interrupted.

An unfinished dataset lies in the folder `.partial` inside its own: the bins so far, small files to go beside them, and
journal.json, which says how much of the bins counts. Only the Writer reads it.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import filelock
import numpy as np

from data.meta import MAX_VOCAB, SPLITS, TOKEN, make_meta, meta_to_json
from errors import UserError
from files import atomic_write

BLOCK = 2**24  # bytes read at a time


class Writer:
    """Writes the bins of one dataset into `folder`: `with Writer(...) as w: w.add(...) ...; w.save(...) ...; w.commit(...)`.

    key: plain values that say what the dataset is made from. If an unfinished dataset of the same key is there, it is resumed:
    `totals` and `state` are then those of the last save(). Without any save(), nothing is left of a dataset that was not
    committed. Raises UserError if the unfinished dataset has another key, or another process is writing it.
    """

    def __init__(self, folder, vocab_size: int | None = None, key=None):
        if vocab_size is not None and not 1 <= vocab_size <= MAX_VOCAB:
            raise UserError(f"vocab_size={vocab_size}: uint16 tokens hold 1 to {MAX_VOCAB}")
        self.folder = Path(folder)
        self.partial = self.folder / ".partial"
        self.vocab_size = vocab_size
        self.key = key
        self.totals = {split: {"tokens": 0, "docs": 0, "bytes": 0} for split in SPLITS}
        self.digests = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
        self.counts = np.zeros(MAX_VOCAB, np.int64)  # how often each id occurs in train.bin
        self.files = {}
        self.state = None

    def __enter__(self):
        self.partial.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.partial / "lock", timeout=0)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process is writing it; wait for it, or pass another --out") from None
        try:
            self._load_journal()
            for split in SPLITS:
                self._open(split)
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_):
        resumable = (self.partial / "journal.json").exists()
        for file in self.files.values():
            file.close()
        for path in () if resumable else self.partial.iterdir():
            if path.name != "lock":
                path.unlink()
        self.lock.release()
        if not resumable:
            (self.partial / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder holds a dataset
                self.partial.rmdir()
                self.folder.rmdir()

    def _load_journal(self):
        try:
            journal = json.loads((self.partial / "journal.json").read_bytes())
        except FileNotFoundError:
            return
        if journal["key"] != json.loads(json.dumps(self.key)):
            raise UserError(
                f"{self.partial}: an unfinished dataset of other arguments, or its source has changed since; "
                "remove that folder, or pass another --out"
            )
        self.totals = journal["totals"]
        self.state = journal["state"]

    def _open(self, split):
        """Opens the bin so far, cut to what the journal says, and computes its hash and counts."""
        path = self.partial / f"{split}.bin"
        n_bytes = self.totals[split]["tokens"] * TOKEN.itemsize
        if self.state and not path.exists():  # commit() had begun
            os.replace(self.folder / path.name, path)
        self.files[split] = file = open(path, "r+b" if self.state else "w+b")
        if file.seek(0, os.SEEK_END) < n_bytes:
            raise UserError(f"{path}: shorter than its journal says; remove {self.partial} and start again")
        file.truncate(n_bytes)
        file.seek(0)
        while block := file.read(BLOCK):
            self._count(split, np.frombuffer(block, TOKEN))

    def _count(self, split, tokens):
        self.digests[split].update(tokens)
        if split == "train":
            self.counts += np.bincount(tokens, minlength=MAX_VOCAB)

    def add(self, split: str, ids, docs: int = 1, n_bytes: int = 0):
        """Appends documents: ids, a list or array of ints, of `docs` documents, from n_bytes bytes of text.

        Raises UserError for an id outside 0..vocab_size-1, which the cast to uint16 would silently wrap.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"{self.folder / split}.bin: token id {bad} is outside 0..{self.vocab_size - 1} (vocab_size - 1)")
        tokens = ids.astype(TOKEN)
        self.files[split].write(tokens)
        self._count(split, tokens)
        for name, n in (("tokens", ids.size), ("docs", docs), ("bytes", n_bytes)):
            self.totals[split][name] += n

    def keep(self, name: str, data: bytes):
        """Stores a small file beside the unfinished bins, on the disk from now on."""
        atomic_write(self.partial / name, data)

    def kept(self, name: str) -> bytes | None:
        path = self.partial / name
        return path.read_bytes() if path.exists() else None

    def save(self, state: dict):
        """Makes what was added so far permanent; `state`, plain values, is what resuming starts from."""
        self._sync()
        self.state = state
        journal = {"key": self.key, "totals": self.totals, "state": state}
        atomic_write(self.partial / "journal.json", json.dumps(journal))

    def _sync(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def commit(self, details: dict, files: dict[str, bytes]) -> dict:
        """Gives everything its final name: the bins, meta.json, and `files`, which go with them. Returns the meta.

        Older bins are removed first, then meta.json is renamed first and val.bin last: if the process dies in between, the
        folder says what it should hold and lacks it. Bins without a meta.json would pass for bins of another program.
        """
        splits = {split: self.totals[split] | {"blake2b": self.digests[split].hexdigest()} for split in SPLITS}
        meta = make_meta(self.vocab_size, splits, self.counts[: self.vocab_size], details)
        small = {"meta.json": meta_to_json(meta)} | files
        for name, data in small.items():
            atomic_write(self.partial / name, data)
        self._sync()
        for file in self.files.values():
            file.close()  # Windows does not rename open files
        bins = [f"{split}.bin" for split in SPLITS]
        for name in bins:
            (self.folder / name).unlink(missing_ok=True)
        for name in [*small, *bins]:
            os.replace(self.partial / name, self.folder / name)
        (self.partial / "journal.json").unlink(missing_ok=True)
        return meta
