"""The reader that trains from bins: train.bin and val.bin, little-endian uint16 token ids, with a meta.json beside them.

nanoGPT's and llama2.c's bins are headerless like ours, llm.c's and modded-nanogpt's have a header. All are read as they are,
also in many files, and without a meta.json.

    python -m data.bins runs/tiny --step 1000                             the batch of that step, as ids and as text
    python -m data.bins data/tiny --step 1000 --config configs/tiny.py    the same, before there is a run
"""

import contextlib
import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from config import Parser, from_dict, load
from data.meta import SPLITS, TOKEN, load_meta
from data.tokenizer import load_tokenizer
from errors import RunFailed, UserError, run_command


class DataChanged(RunFailed):
    """A bin file changed while the run had it open."""


def files(path) -> list[Path]:
    """Returns the files whose tokens, one after the other, are the bin named `path`, such as data/tiny/train.bin.

    If that file does not exist, these are the shards beside it: by name those with "train" or "val" in it, or llama2.c's
    data00.bin for validation and data01.bin ... for training. Raises UserError if its folder is a file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.parent.is_file():
        raise UserError(f"{path.parent}: is a file; pass the folder that holds it: --data={path.parent.parent}")
    named = sorted(filter(Path.is_file, path.parent.glob(f"*{path.stem}*.bin")))
    numbered = sorted(filter(Path.is_file, path.parent.glob("data[0-9]*.bin")))
    return named or (numbered[1:] if path.stem == "train" else numbered[:1])


class Shard:
    """One file, mapped once and read-only: tokens (n,) uint16.

    Headerless, or after the header of llm.c and modded-nanogpt: 256 int32, the first three 20240520, 1 and n.
    Raises UserError if it is empty, no whole number of tokens, or not of the size that its header states.
    """

    HEADER = 1024  # bytes
    UINT16 = 20240520  # the first int32 of a header, by the width of a token
    UINT32 = 20240801

    def __init__(self, path: Path):
        self.path = path
        self.opened = self._stat()
        n_bytes = path.stat().st_size
        if n_bytes == 0:
            raise UserError(f"{path}: empty; remove its folder and prepare it again")
        magic, version, n = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
        if magic == self.UINT32 and n_bytes == self.HEADER + 4 * n:
            raise UserError(f"{path}: holds uint32 tokens, and only uint16 can be read; prepare it with 65536 ids or fewer")
        headed = magic == self.UINT16 and version == 1 and n_bytes >= self.HEADER
        if headed and n_bytes != self.HEADER + TOKEN.itemsize * n:
            found = (n_bytes - self.HEADER) / TOKEN.itemsize
            raise UserError(f"{path}: its header states {n} tokens, but it holds {found:g}; get the file again")
        if n_bytes % TOKEN.itemsize:
            raise UserError(f"{path}: {n_bytes} bytes are no whole number of uint16 tokens; prepare it again")
        # As a plain view: indexing a memmap is slower.
        self.tokens = np.asarray(np.memmap(path, TOKEN, mode="r"))[self.HEADER // TOKEN.itemsize if headed else 0 :]

    def _stat(self):
        """Returns what changes when the file is cut or written to; None if it is gone."""
        with contextlib.suppress(OSError):
            now = self.path.stat()
            return now.st_size, now.st_mtime_ns

    def check(self):
        """Raises DataChanged if the file was changed: reading a mapped file that was cut would kill the process."""
        if self._stat() != self.opened:
            raise DataChanged(f"{self.path}: changed since this run opened it; put the data back, and run the same command")


class Bin:
    """The tokens of one split, in one file or several: one stream, wherever it is cut into files.

    Window w is tokens[w * seq_len : (w + 1) * seq_len + 1], so that neighbours share one token: the last target of the one
    is the first input of the next. Tokens past the last whole window are not used.

    n_tokens, n_windows: how many there are
    Raises UserError if there is no file, one that Shard refuses, less than a window, or not what meta.json states.
    """

    def __init__(self, path, seq_len: int, vocab_size: int):
        self.path = Path(path)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.shards = [Shard(file) for file in files(path)]
        if not self.shards:
            raise UserError(f"{path}: no such file")
        meta = load_meta(self.path.parent)
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
        self.meta_vocab_size = meta["vocab_size"] if meta else 0
        self.n_windows = (self.n_tokens - 1) // seq_len

    def windows(self, indices) -> np.ndarray:
        """Returns the token ids (B, seq_len + 1) int64 of the windows with these numbers (B,).

        Raises UserError for an id >= vocab_size, and DataChanged if a file was changed since it was opened.
        """
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        first = np.searchsorted(self.ends, starts, side="right").tolist()
        last = np.searchsorted(self.ends, starts + self.seq_len, side="right").tolist()
        for i in {i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)}:
            self.shards[i].check()
        ids = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start, shard in zip(ids, starts.tolist(), first, strict=True):
            self._fill(row, start, shard)
        # Here and not on the device, where an embedding asked for too large an id aborts the whole process.
        if ids.size and ids.max() >= self.vocab_size:
            needed = max(ids.max() + 1, self.meta_vocab_size)
            raise UserError(
                f"{self.path}: token id {ids.max()}, but vocab_size={self.vocab_size}; pass --vocab_size={needed} or more"
            )
        return ids

    def _fill(self, row, start, i):
        """Fills row (n,) with the n tokens from `start` on, which lies in file i; they may continue in the next files."""
        while len(row):
            part = self.shards[i].tokens[start - self.ends[i] :][: len(row)]  # counted from the file's end
            row[: len(part)] = part
            row = row[len(part) :]
            start += len(part)
            i += 1


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the order of all n windows in one epoch: a read-only permutation (n,), a function of the arguments alone.

    It takes 4 bytes a window, so 156 MB for the 39 million windows of 40 billion tokens, and is computed once an epoch.
    """
    permutation = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    np.random.default_rng([seed, epoch]).shuffle(permutation)
    permutation.flags.writeable = False
    return permutation


def window_indices(seed: int, start: int, count: int, n: int) -> np.ndarray:
    """Returns the windows at positions start .. start + count - 1 of the run: (count,).

    The window at position p is order(seed, p // n, n)[p % n].
    """
    epochs, places = np.divmod(np.arange(start, start + count, dtype=np.int64), n)
    windows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        windows[here] = order(seed, int(epoch), n)[places[here]]
    return windows


def fingerprint(folder) -> str:
    """Returns what identifies the dataset: the hash of all tokens that meta.json states.

    Without a meta.json, it is a hash of each file's size, first and last MB.
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
    """Returns the batch of a step: its windows' numbers (B,), their ids (B, seq_len + 1), and the tokenizer.

    path: a run directory, whose config.json tells the rest, or a data folder
    config: a config.json or a config's .py file; None for the config.json in `path`
    """
    source = config or path / "config.json"
    if not source.exists():
        raise UserError(f"{source}: not found; name a run directory, or a data folder and its --config")
    try:
        c = load([str(source)]) if source.suffix == ".py" else from_dict(json.loads(source.read_bytes()))
    except ValueError as e:
        raise UserError(f"{source}: {e}") from None
    if step < 1:
        raise UserError(f"--step={step}: steps count from 1")
    folder = path if files(path / "train.bin") else Path(c.data)
    data = Bin(folder / "train.bin", c.seq_len, c.vocab_size)
    windows = window_indices(c.seed, (step - 1) * c.batch_size, c.batch_size, data.n_windows)
    return windows, data.windows(windows), load_tokenizer(folder, c.vocab_size)


def show(argv: list[str]) -> int:
    """Prints the exact batch of a step."""
    parser = Parser(prog="python -m data.bins", description="Shows the exact batch of a step.")
    parser.add_argument("path", type=Path, metavar="PATH", help="run directory, or data folder")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step, from 1")
    parser.add_argument("--config", type=Path, metavar="CONFIG", help="config of a run; default: config.json in PATH")
    args = parser.parse_args(argv)
    windows, ids, tokenizer = batch(args.path, args.step, args.config)
    with contextlib.suppress(BrokenPipeError):
        for i, (window, row) in enumerate(zip(windows, ids.tolist(), strict=True)):
            shown = " ".join(map(str, row))
            print(f"sequence {i}, window {window}\nids  {shown}\ntext {tokenizer.decode(row)!r}\n", flush=True)
    return 0


def main(argv: list[str]) -> int:
    return run_command(show, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
