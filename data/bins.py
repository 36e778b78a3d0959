"""The format: train.bin and val.bin, headerless little-endian uint16 token ids, with a meta.json beside them.

nanoGPT's and llama2.c's bins are the same bytes, llm.c's and modded-nanogpt's have a header: all are read as they are, also in
many files, without a meta.json.

    python -m data.bins runs/tiny --step 1000                             the batch of that update, as ids and as text
    python -m data.bins data/tiny --step 1000 --config configs/tiny.py    the same, with no run there yet
"""

import argparse
import contextlib
import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from data.meta import SPLITS, TOKEN, load_meta
from data.tokenizer import load_tokenizer
from errors import RunFailed, UserError


class DataChanged(RunFailed):
    """A bin that is not the file it was when it was opened."""


def files(path) -> list[Path]:
    """The files whose tokens, one after the other, are the bin named `path`: that file; or where there is none the shards of
    others beside it, by name: those with "train" or "val" in it, or llama2.c's data00.bin to validate on, data01.bin ...
    """
    path = Path(path)
    if path.is_file():
        return [path]
    named, numbered = (sorted(filter(Path.is_file, path.parent.glob(f"{x}.bin"))) for x in (f"*{path.stem}*", "data[0-9]*"))
    return named or (numbered[1:] if path.stem == "train" else numbered[:1])


class Shard:
    """One file, mapped once and read-only: tokens (n,) uint16.

    Headerless, or after the header of llm.c and modded-nanogpt: 256 int32, the first three 20240520, 1 and n.
    Raises UserError where it is empty, no whole number of tokens, or not of the size that its header states.
    """

    HEADER, UINT16, UINT32 = 1024, 20240520, 20240801  # bytes; what the first int32 is for either width of a token

    def __init__(self, path: Path):
        self.path = path
        self.seen = self._look()
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"{path}: empty; remove its folder and prepare it again")
        magic, version, n = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
        if magic == self.UINT32 and n_bytes == self.HEADER + 4 * n:
            raise UserError(f"{path}: holds uint32 tokens, and uint16 are read here; prepare it with 65536 ids or fewer")
        headed = magic == self.UINT16 and version == 1 and n_bytes >= self.HEADER
        if headed and n_bytes != self.HEADER + TOKEN.itemsize * n:
            there = (n_bytes - self.HEADER) / TOKEN.itemsize
            raise UserError(f"{path}: its header states {n} tokens, and {there:g} are there; get the file again")
        if n_bytes % TOKEN.itemsize:
            raise UserError(f"{path}: {n_bytes} bytes are no whole number of uint16 tokens; prepare it again")
        # As a plain view: indexing a memmap is slower.
        self.tokens = np.asarray(np.memmap(path, TOKEN, mode="r"))[self.HEADER // TOKEN.itemsize if headed else 0 :]

    def _look(self):
        """What changes when the file is cut, written to or replaced; None where it is gone."""
        with contextlib.suppress(OSError):
            now = self.path.stat()
            return now.st_ino, now.st_size, now.st_mtime_ns

    def check(self):
        """Raises DataChanged where the file is not what it was: reading a mapped file that was cut would kill the process."""
        if self._look() != self.seen:
            raise DataChanged(f"{self.path}: changed since this run opened it; put the data back, and run the same command")


class Bin:
    """The tokens of one split, in one file or several: they are one stream, and where it is cut into files makes no difference.
    Window w is tokens[w * seq_len : (w + 1) * seq_len + 1], so that neighbours share one token: the last target of the one
    is the first input of the next.

    n_tokens, n_windows: how many there are; tokens past the last whole window are not used.
    Raises UserError where there is no file, one that Shard refuses, less than a window, or not what meta.json states.
    """

    def __init__(self, path, seq_len: int, vocab_size: int):
        self.path, self.seq_len, self.vocab_size = Path(path), seq_len, vocab_size
        self.shards, meta = [Shard(file) for file in files(path)], load_meta(self.path.parent)
        if not self.shards:
            raise UserError(f"{path}: no such file")
        self.ends = np.cumsum([len(shard.tokens) for shard in self.shards])  # (files,): where in the stream each one ends
        self.n_tokens = int(self.ends[-1])
        stated = meta["splits"][self.path.stem]["tokens"] if meta else self.n_tokens
        if self.n_tokens != stated:
            raise UserError(
                f"{path}: {self.n_tokens} tokens, but meta.json states {stated}; remove the folder and prepare it again"
            )
        if self.n_tokens < seq_len + 1:
            raise UserError(
                f"{path}: {self.n_tokens} tokens are fewer than a window of seq_len + 1 = {seq_len + 1}; "
                f"pass --seq_len={max(self.n_tokens - 1, 1)} or less, or prepare more text"
            )
        self.needs = meta["vocab_size"] if meta else 0
        self.n_windows = (self.n_tokens - 1) // seq_len

    def windows(self, indices) -> np.ndarray:
        """Window numbers (B,) -> token ids (B, seq_len + 1) int64.

        Raises UserError for an id >= vocab_size, and DataChanged where a file is not what it was.
        """
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        ids = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start, first in zip(
            ids, starts.tolist(), np.searchsorted(self.ends, starts, side="right").tolist(), strict=True
        ):
            self._fill(row, start, first)
        # Here and not on the device, where an embedding asked for too large an id aborts the whole process.
        if ids.size and ids.max() >= self.vocab_size:
            needs = max(ids.max() + 1, self.needs)
            raise UserError(
                f"{self.path}: token id {ids.max()}, but vocab_size={self.vocab_size}; pass --vocab_size={needs} or more"
            )
        return ids

    def _fill(self, row, start, i):
        """row (n,) becomes the n tokens from `start`, which lies in file i: they may go on in the next ones."""
        while len(row):
            shard = self.shards[i]
            shard.check()
            part = shard.tokens[start - self.ends[i] :][: len(row)]  # counted from its end
            row[: len(part)] = part
            row, start, i = row[len(part) :], start + len(part), i + 1


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of all n windows in one epoch: a read-only permutation (n,), a function of its arguments alone.

    For the 39 million windows of 40 billion tokens it takes 2 s and 156 MB, once an epoch.
    """
    permutation = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(permutation)
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


def fingerprint(folder) -> str:
    """What tells this dataset from another: a hash of all tokens, from meta.json where there is one.

    Of bins without it, a hash of each file's size, first and last MB.
    """
    meta = load_meta(folder)
    if meta:
        return meta["fingerprint"]
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        for path in files(Path(folder) / f"{split}.bin"):
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

    from config import from_dict, load  # what a run's config means is said there alone

    source = config or path / "config.json"
    if not source.exists():
        raise UserError(f"{source}: not found; name a run directory, or a data folder and its --config")
    try:
        c = load([str(source)]) if source.suffix == ".py" else from_dict(json.loads(source.read_bytes()))
    except ValueError as e:
        raise UserError(f"{source}: {e}") from None
    if step < 1:
        raise UserError(f"--step={step}: updates count from 1")
    folder = path if files(path / "train.bin") else Path(c.data)
    data = Bin(folder / "train.bin", c.seq_len, c.vocab_size)
    windows = window_indices(c.seed, (step - 1) * c.batch_size, c.batch_size, data.n_windows)
    return windows, data.windows(windows), load_tokenizer(folder, c.vocab_size)


def main(argv: list[str]) -> int:
    """Exit status 0: shown; 2: the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m data.bins", description="Shows the exact batch of an update.")
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory, or data folder")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the update, from 1")
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="config of a run; default: config.json in PATH")
    args = parser.parse_args(argv)
    try:
        windows, ids, tokenizer = batch(args.path, args.step, args.config)
    except (UserError, OSError) as e:
        print(e, file=sys.stderr)
        return 2
    with contextlib.suppress(BrokenPipeError):
        for i, (window, row) in enumerate(zip(windows, ids.tolist(), strict=True)):
            print(
                f"sequence {i}, window {window}\nids  {' '.join(map(str, row))}\ntext {tokenizer.decode(row)!r}\n", flush=True
            )
    return 0


if __name__ == "__main__":
    from data import bins  # this very file, under the name that the others know it by

    sys.exit(bins.main(sys.argv[1:]))
