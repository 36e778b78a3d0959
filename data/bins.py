"""The format: train.bin and val.bin, headerless little-endian uint16 token ids, with a meta.json beside them.

nanoGPT's and llama2.c's bins are the same bytes and load unchanged, without a meta.json.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

FORMAT = 1
SPLITS = ("train", "val")
TOKEN = np.dtype("<u2")


class DataError(ValueError):
    """Data that cannot be used. The message is one line: the thing, its value, what was expected and what mends it."""


class Writer:
    """Writes a dataset into `folder`, whole or not at all: `with Writer(...) as w: w.add(...) ...; w.commit(...)`.

    Everything goes to temporary names beside the targets, which go away, as does a folder left empty, without a commit.
    """

    def __init__(self, folder, vocab_size: int):
        if not 1 <= vocab_size <= 65536:
            raise DataError(f"vocab_size={vocab_size}: uint16 tokens hold 1 to 65536")
        self.folder, self.vocab_size = Path(folder), vocab_size
        self.counts = {split: {"tokens": 0, "docs": 0, "bytes": 0} for split in SPLITS}
        self.digests = {split: hashlib.blake2b(digest_size=16) for split in SPLITS}
        self.temporary = {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files = {split: self._open(f"{split}.bin") for split in SPLITS}
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.close()
        for path in self.temporary.values():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something, as it should
            self.folder.rmdir()

    def _open(self, name):
        # The process id keeps two runs of one command from writing into each other's file.
        self.temporary[name] = self.folder / f"{name}.{os.getpid()}.tmp"
        return open(self.temporary[name], "wb")

    def add(self, split: str, ids, n_bytes: int = 0):
        """Appends one document: ids, a list or array of ints, from n_bytes bytes of text.

        Raises DataError for an id outside 0..vocab_size-1, which the cast to uint16 would wrap without a word.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise DataError(f"{self.folder / split}.bin: token id {bad} is outside 0..{self.vocab_size - 1} (vocab_size - 1)")
        data = ids.astype(TOKEN).tobytes()
        self.files[split].write(data)
        self.digests[split].update(data)
        for name, n in (("tokens", ids.size), ("docs", 1), ("bytes", n_bytes)):
            self.counts[split][name] += n

    def commit(self, meta: dict, files: dict[str, bytes]) -> dict:
        """Gives everything its final name: the bins, meta.json, and the small files that go with them. Returns the meta.

        meta.json is renamed first and val.bin, removed before, last: whoever is killed in between leaves a folder that
        says what it should hold and lacks it. Bins without a meta.json would pass for somebody else's.
        """
        splits = {s: self.counts[s] | {"blake2b": self.digests[s].hexdigest()} for s in SPLITS}
        both = b"".join(self.digests[s].digest() for s in SPLITS)
        own = {"format": FORMAT, "dtype": "uint16 little-endian", "vocab_size": self.vocab_size, "splits": splits}
        meta = own | meta | {"fingerprint": hashlib.blake2b(both, digest_size=16).hexdigest()}
        small = {"meta.json": (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode()} | files
        for name, data in small.items():
            self.files[name] = self._open(name)
            self.files[name].write(data)
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        (self.folder / "val.bin").unlink(missing_ok=True)
        for name in [*small, *(f"{split}.bin" for split in SPLITS)]:
            os.replace(self.temporary[name], self.folder / name)
        return meta


class Bin:
    """A bin, mapped once and read-only. Window w is tokens[w * seq_len : (w + 1) * seq_len + 1], so that neighbours
    share one token: the last target of the one is the first input of the next.

    n_tokens, n_windows: how many there are; tokens past the last whole window are not used.
    Raises DataError where the file is missing, empty, no whole number of tokens, shorter than a window, or not of the
    size that meta.json states.
    """

    def __init__(self, path, seq_len: int, vocab_size: int):
        self.path, self.seq_len, self.vocab_size = Path(path), seq_len, vocab_size
        if not self.path.is_file():
            raise DataError(f"{path}: no such file")
        n_bytes, meta = self.path.stat().st_size, load_meta(self.path.parent)
        if n_bytes == 0:
            raise DataError(f"{path}: empty; remove its folder and prepare it again")
        if n_bytes % TOKEN.itemsize:
            raise DataError(f"{path}: {n_bytes} bytes are no whole number of uint16 tokens; prepare it again")
        self.n_tokens = n_bytes // TOKEN.itemsize
        stated = meta["splits"][self.path.stem]["tokens"] if meta else self.n_tokens
        if self.n_tokens != stated:
            raise DataError(
                f"{path}: {self.n_tokens} tokens, but meta.json states {stated}; remove the folder and prepare it again"
            )
        if self.n_tokens < seq_len + 1:
            raise DataError(
                f"{path}: {self.n_tokens} tokens are fewer than a window of seq_len + 1 = {seq_len + 1}; "
                f"pass --seq_len={max(self.n_tokens - 1, 1)} or less, or prepare more text"
            )
        self.needs = meta["vocab_size"] if meta else 0
        self.n_windows = (self.n_tokens - 1) // seq_len
        self.tokens = np.asarray(np.memmap(self.path, TOKEN, mode="r"))  # a plain view: indexing a memmap is slower

    def windows(self, indices) -> np.ndarray:
        """Window numbers (B,) -> token ids (B, seq_len + 1) int64. Raises DataError for an id >= vocab_size."""
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        ids = self.tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64)  # (B, T+1)
        # Here and not on the device, where an embedding asked for too large an id aborts the whole process.
        if ids.size and ids.max() >= self.vocab_size:
            needs = max(ids.max() + 1, self.needs)
            raise DataError(
                f"{self.path}: token id {ids.max()}, but vocab_size={self.vocab_size}; pass --vocab_size={needs} or more"
            )
        return ids


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of all n windows in one epoch: a read-only permutation (n,), a function of its arguments alone."""
    permutation = np.random.default_rng([seed, epoch]).permutation(n)
    permutation.flags.writeable = False
    return permutation


def window_indices(seed: int, start: int, count: int, n: int) -> np.ndarray:
    """The windows at positions start .. start + count - 1 of the run: (count,). Position p is order(seed, p // n)[p % n]."""
    epochs, places = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    windows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = order(seed, int(epoch), n)[places[here]]
    return windows


def load_meta(folder) -> dict | None:
    """The folder's meta.json; None where there is none. Raises DataError for one that data.prepare did not write."""
    path = Path(folder) / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise DataError(f"{path}: not JSON ({e}); remove the folder and prepare it again") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise DataError(f"{path}: format {found}, expected {FORMAT} of data.prepare; remove the folder and prepare it again")
    return meta


def fingerprint(folder) -> str:
    """What tells this dataset from another: a hash of all tokens, from meta.json where there is one.

    Of bins without it, a hash of each one's size, first and last MB.
    """
    meta = load_meta(folder)
    if meta:
        return meta["fingerprint"]
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        path = Path(folder) / f"{split}.bin"
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{split} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(2**20))
                file.seek(max(size - 2**20, 0))
                digest.update(file.read(2**20))
    return digest.hexdigest()
