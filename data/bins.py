"""The format: train.bin and val.bin, headerless little-endian uint16 token ids, with a meta.json beside them.

nanoGPT's and llama2.c's bins are the same bytes and load unchanged, without a meta.json.

    python -m data.bins runs/tiny --step 1000                             the batch of that update, as ids and as text
    python -m data.bins data/tiny --step 1000 --config configs/tiny.py    the same, with no run there yet
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

FORMAT = 1
SPLITS = ("train", "val")
TOKEN = np.dtype("<u2")
SPLIT = {"tokens": int, "docs": int, "bytes": int, "blake2b": str}
META = {"vocab_size": int, "fingerprint": str, "tokenizer": dict, "splits": {split: SPLIT for split in SPLITS}}


class DataError(ValueError):
    """Data that cannot be used. The message is one line: the thing, its value, what was expected and what mends it."""


class DataChanged(RuntimeError):
    """A bin that is not the file it was when it was opened."""


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
        own = {"format": FORMAT, "dtype": "uint16 little-endian", "vocab_size": self.vocab_size, "splits": splits}
        meta = own | meta | {"fingerprint": _both(splits)}
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
        self.seen, meta = self._look(), load_meta(self.path.parent)
        n_bytes = self.path.stat().st_size
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

    def _look(self):
        """What changes when the file is cut, written to or replaced; None where it is gone."""
        with contextlib.suppress(OSError):
            now = self.path.stat()
            return now.st_ino, now.st_size, now.st_mtime_ns

    def windows(self, indices) -> np.ndarray:
        """Window numbers (B,) -> token ids (B, seq_len + 1) int64.

        Raises DataError for an id >= vocab_size, and DataChanged where the file is not what it was: reading a mapped file
        that was cut would kill the process.
        """
        if self._look() != self.seen:
            raise DataChanged(f"{self.path}: changed since this run opened it; put the data back, and run the same command")
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
    if wrong := _misfit(meta, META):
        raise DataError(f"{path}: {wrong} is missing or of the wrong kind; remove the folder and prepare it again")
    with contextlib.suppress(ValueError):
        if meta["fingerprint"] == _both(meta["splits"]):
            return meta
    raise DataError(f"{path}: its fingerprint is not that of its splits; remove the folder and prepare it again")


def _both(splits: dict) -> str:
    """The fingerprint of a dataset: a hash of its splits' hashes."""
    digests = b"".join(bytes.fromhex(splits[s]["blake2b"]) for s in SPLITS)
    return hashlib.blake2b(digests, digest_size=16).hexdigest()


def _misfit(value, shape) -> str | None:
    """The first entry of nested dicts that is not of the type that `shape` has in its place, by its name."""
    if not isinstance(shape, dict):
        return None if type(value) is shape else ""
    if not isinstance(value, dict):
        return ""
    for name, below in shape.items():
        wrong = _misfit(value.get(name), below)
        if wrong is not None:
            return f"{name}.{wrong}" if wrong else name
    return None


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


def batch(path: Path, step: int, config: Path | None):
    """The batch of update `step`: its sequences' window numbers (B,), their ids (B, seq_len + 1), and the vocabulary.

    path: a run directory, whose config.json tells the rest, or a data folder; config: a config.json, or a config's .py file.
    """
    from data import vocab
    from runtime.config import from_dict, load  # what a run's config means is said there alone

    source = config or path / "config.json"
    if not source.exists():
        raise DataError(f"{source}: not found; name a run directory, or a data folder and its --config")
    try:
        c = load([str(source)]) if source.suffix == ".py" else from_dict(json.loads(source.read_bytes()))
    except ValueError as e:
        raise DataError(f"{source}: {e}") from None
    if step < 1:
        raise DataError(f"--step={step}: updates count from 1")
    folder = path if (path / "train.bin").exists() else Path(c.data)
    data = Bin(folder / "train.bin", c.seq_len, c.vocab_size)
    windows = window_indices(c.seed, (step - 1) * c.batch_size, c.batch_size, data.n_windows)
    return windows, data.windows(windows), vocab.load(folder, c.vocab_size)


def main(argv: list[str]) -> int:
    """Exit status 0: shown; 2: the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m data.bins", description="Shows the exact batch of an update.")
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory, or data folder")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the update, from 1")
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="config of a run; default: config.json in PATH")
    args = parser.parse_args(argv)
    try:
        windows, ids, words = batch(args.path, args.step, args.config)
    except (DataError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    with contextlib.suppress(BrokenPipeError):
        for i, (window, row) in enumerate(zip(windows, ids.tolist(), strict=True)):
            print(f"sequence {i}, window {window}\nids  {' '.join(map(str, row))}\ntext {words.decode(row)!r}\n", flush=True)
    return 0


if __name__ == "__main__":
    from data import bins  # this very file, under the name that the others know it by

    sys.exit(bins.main(sys.argv[1:]))
