"""Writes a dataset, whole or not at all, and goes on where one that was killed stopped.

What is not whole yet lies in the folder `.partial` of the dataset's own: the bins so far, small files to go beside them, and
journal.json, which says how much of the bins counts. Nothing reads it but the Writer.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data.meta import FORMAT, SPLITS, TOKEN, combined
from errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # on Windows nothing keeps two writers apart
    fcntl = None

BLOCK = 2**24  # bytes read at a time


class Writer:
    """`with Writer(...) as w: w.add(...) ...; w.save(...) ...; w.commit(...)`: the bins of one dataset, in `folder`.

    key: what the dataset is made from, plain values. Where an unfinished one of the same key lies there, it is gone on with:
    counts and state are those of the last save(). Without any save() nothing is left of what was not committed.
    Raises UserError where an unfinished one of another key lies there, or another process is writing it.
    """

    def __init__(self, folder, vocab_size: int | None = None, key=None):
        if vocab_size is not None and not 1 <= vocab_size <= 65536:
            raise UserError(f"vocab_size={vocab_size}: uint16 tokens hold 1 to 65536")
        self.folder, self.partial, self.vocab_size, self.key = Path(folder), Path(folder) / ".partial", vocab_size, key
        self.counts = {split: {"tokens": 0, "docs": 0, "bytes": 0} for split in SPLITS}
        self.digests = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
        self.files, self.state = {}, None

    def __enter__(self):
        self.partial.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.partial / "lock", "w")
        try:
            self._lock()
            self._go_on()
            for split in SPLITS:
                self._open(split)
        except BaseException:
            self.lock.close()
            raise
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.close()
        if not (self.partial / "journal.json").exists():
            for path in self.partial.iterdir():
                path.unlink()
            with contextlib.suppress(OSError):  # it holds something, as it should
                self.partial.rmdir()
                self.folder.rmdir()
        self.lock.close()

    def _lock(self):
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another process is writing it; wait for it, or pass another --out") from None

    def _go_on(self):
        """Counts and state as the journal has them, where there is one."""
        try:
            journal = json.loads((self.partial / "journal.json").read_bytes())
        except FileNotFoundError:
            return
        if journal["key"] != json.loads(json.dumps(self.key)):
            raise UserError(
                f"{self.partial}: an unfinished dataset of other arguments, or its source has changed since; "
                "remove that folder, or pass another --out"
            )
        self.counts, self.state = journal["counts"], journal["state"]

    def _open(self, split):
        """The bin so far, cut to what the journal says, and its hash."""
        path, n_bytes = self.partial / f"{split}.bin", self.counts[split]["tokens"] * TOKEN.itemsize
        if self.state and not path.exists():  # the commit that was to come had begun
            os.replace(self.folder / path.name, path)
        self.files[split] = file = open(path, "r+b" if self.state else "w+b")
        if file.seek(0, os.SEEK_END) < n_bytes:
            raise UserError(f"{path}: shorter than its journal says; remove {self.partial} and begin anew")
        file.truncate(n_bytes)
        file.seek(0)
        while block := file.read(BLOCK):
            self.digests[split].update(block)

    def add(self, split: str, ids, docs: int = 1, n_bytes: int = 0):
        """Appends documents: ids, a list or array of ints, of `docs` documents, from n_bytes bytes of text.

        Raises UserError for an id outside 0..vocab_size-1, which the cast to uint16 would wrap without a word.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"{self.folder / split}.bin: token id {bad} is outside 0..{self.vocab_size - 1} (vocab_size - 1)")
        data = ids.astype(TOKEN).tobytes()
        self.files[split].write(data)
        self.digests[split].update(data)
        for name, n in (("tokens", ids.size), ("docs", docs), ("bytes", n_bytes)):
            self.counts[split][name] += n

    def keep(self, name: str, data: bytes):
        """A small file of that name, on disk from now on, to be committed beside the bins."""
        aside = self.partial / f"{name}.aside"
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.partial / name)

    def kept(self, name: str) -> bytes | None:
        path = self.partial / name
        return path.read_bytes() if path.exists() else None

    def save(self, state: dict):
        """What was added so far counts from now on, whatever happens; state: plain values for whoever goes on."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        self.state = state
        self.keep("journal.json", json.dumps({"key": self.key, "counts": self.counts, "state": state}).encode())

    def commit(self, meta: dict, files: dict[str, bytes]) -> dict:
        """Gives everything its final name: the bins, meta.json, and the small files that go with them. Returns the meta.

        Older bins are removed before, meta.json is renamed first and val.bin last: whoever is killed in between leaves a folder
        that says what it should hold and lacks it. Bins without a meta.json would pass for somebody else's.
        """
        splits = {s: self.counts[s] | {"blake2b": self.digests[s].hexdigest()} for s in SPLITS}
        own = {"format": FORMAT, "dtype": "uint16 little-endian", "vocab_size": self.vocab_size, "splits": splits}
        meta = own | meta | {"fingerprint": combined(splits)}
        small = {"meta.json": encoded(meta)} | files
        for name, data in small.items():
            self.keep(name, data)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        bins = [f"{split}.bin" for split in SPLITS]
        for name in bins:
            (self.folder / name).unlink(missing_ok=True)
        for name in [*small, *bins]:
            os.replace(self.partial / name, self.folder / name)
        (self.partial / "journal.json").unlink(missing_ok=True)
        return meta


def encoded(meta: dict) -> bytes:
    return (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode()
