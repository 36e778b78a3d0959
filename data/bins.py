"""Reads bins for training: train.bin and val.bin, little-endian uint16 token ids, with a meta.json beside them.

nanoGPT's and llama2.c's bins are headerless like ours, llm.c's and modded-nanogpt's have a header. All are read as they are,
in one file or many, with or without a meta.json.

    python -m data.bins runs/tiny --step=1000     the batch of that step, as ids and as text
"""

import contextlib
import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from cli import Parser, quiet_pipe, run_command
from config import from_dict, renamed
from data.meta import BLOCK, SPLITS, TOKEN, load_meta, scan, write_meta
from data.tokenizer import Ids, Tokenizer, load_tokenizer, tokenizer_to_meta
from errors import RunFailed, UserError

HEADER = 1024  # bytes of the header of llm.c and modded-nanogpt: 256 int32, the first three MAGIC, 1 and the number of tokens
MAGIC = 20240520
MAGIC_UINT32 = 20240801  # where tokens are uint32


class DataChanged(RunFailed):
    """A bin file changed while the run had it open. Of several ranks, only one may notice."""


class UnknownId(UserError):
    """A token id is not below vocab_size. Of several ranks, only those that read it notice."""


def files(path) -> list[Path]:
    """Returns the files whose concatenated tokens are the bin named `path`, such as data/tiny/train.bin.

    If that file does not exist, these are the shards beside it: those with "train" or "val" in their names, or llama2.c's
    data00.bin for validation and data01.bin ... for training. Raises UserError if its folder is a file.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.parent.is_file():
        raise UserError(f"{path.parent}: is a file; pass the folder that holds it: --data={path.parent.parent}")
    named = sorted(file for file in path.parent.glob(f"*{path.stem}*.bin") if file.is_file())
    if path.stem == "val":
        named = [file for file in named if "train" not in file.name]  # retrieval_train_0.bin has both
    numbered = sorted(filter(Path.is_file, path.parent.glob("data[0-9]*.bin")))
    return named or (numbered[1:] if path.stem == "train" else numbered[:1])


class Shard:
    """One file, mapped once and read-only: tokens (n,) uint16.

    Raises UserError if it is empty, not a whole number of tokens, or not of the size that its header states.
    """

    def __init__(self, path: Path):
        self.path = path
        self.opened = self._stat()
        n_bytes = path.stat().st_size
        magic, version, stated = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
        if magic == MAGIC_UINT32 and version == 7:
            raise UserError(f"{path}: holds uint32 tokens, and only uint16 can be read; prepare it with 65536 ids or fewer")
        has_header = magic == MAGIC and version == 1 and n_bytes >= HEADER
        if n_bytes == 0 or n_bytes % TOKEN.itemsize:
            raise UserError(f"{path}: {n_bytes} bytes, not a positive whole number of uint16 tokens; prepare it again")
        # As a plain view: indexing a memmap is slower.
        self.tokens = np.asarray(np.memmap(path, TOKEN, mode="r"))[HEADER // TOKEN.itemsize if has_header else 0 :]
        if has_header and len(self.tokens) != stated:
            raise UserError(f"{path}: its header states {stated} tokens, but it holds {len(self.tokens)}; get the file again")

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

    Window w is tokens[w * seq_len : (w + 1) * seq_len + 1], so that neighbours share one token: the last target of one is the
    first input of the next. Tokens past the last whole window are not used.

    option: the command-line option that sets seq_len, for messages
    n_tokens, n_windows: how many there are
    Raises UserError if there is no file, Shard refuses one, the tokens are fewer than a window, or their number differs from
    meta.json's.
    """

    def __init__(self, path, seq_len: int, vocab_size: int, option="--seq_len"):
        self.path = Path(path)
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.shards = [Shard(file) for file in files(path)]
        if not self.shards:
            raise UserError(f"{path}: no such file; python -m data.prepare --help says how to make it")
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
                f"pass {option}={max(self.n_tokens - 1, 1)} or less, or prepare more text"
            )
        self.meta_vocab_size = meta["vocab_size"] if meta else 0
        self.n_windows = (self.n_tokens - 1) // seq_len

    def windows(self, indices) -> np.ndarray:
        """Returns the token ids (B, seq_len + 1) int64 of the windows with these indices (B,).

        Raises UnknownId for an id >= vocab_size, and DataChanged if a file was changed since it was opened.
        """
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        first = np.searchsorted(self.ends, starts, side="right").tolist()
        last = np.searchsorted(self.ends, starts + self.seq_len, side="right").tolist()
        for i in {i for a, b in zip(first, last, strict=True) for i in range(a, b + 1)}:
            self.shards[i].check()
        ids = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start, shard in zip(ids, starts.tolist(), first, strict=True):
            self._fill(row, start, shard)
        # Checked on the CPU: on a GPU an embedding index out of range aborts the process.
        if ids.size and ids.max() >= self.vocab_size:
            needed = max(ids.max() + 1, self.meta_vocab_size)
            raise UnknownId(
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
    """Returns the fingerprint of the dataset: the hash of its tokens, as meta.json states it, or fingerprint_of_ends."""
    meta = load_meta(folder)
    return meta["fingerprint"] if meta else fingerprint_of_ends(folder)


def fingerprint_of_ends(folder) -> str:
    """Returns a hash of each file's size, first and last MB: the fingerprint of bins without a meta.json."""
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


def import_bins(folder: Path, tokenizer: Tokenizer | None, arguments: dict) -> dict:
    """Writes meta.json, and the tokenizer's file, into a folder of bins made by another program. Returns the meta.

    tokenizer: None if it is not known. Raises UserError if there is a meta.json already, no bin of a split, a damaged bin, or
    an id that the tokenizer does not have.
    """
    if load_meta(folder):
        raise UserError(f"{folder}: has a meta.json already; remove it to have it made again")
    splits = {}
    counts = {}
    for split in SPLITS:
        shards = [Shard(path).tokens for path in files(folder / f"{split}.bin")]
        if not shards:
            raise UserError(f"{folder}: no file of {split} tokens; its name must have {split!r} in it and end in .bin")
        blocks = (tokens[start : start + BLOCK] for tokens in shards for start in range(0, len(tokens), BLOCK))
        digest, counts[split] = scan(blocks)
        docs = int(counts[split][tokenizer.bos]) if tokenizer else 0
        splits[split] = {"tokens": sum(map(len, shards)), "docs": docs, "bytes": 0, "blake2b": digest}
    highest = int(np.flatnonzero(counts["train"] + counts["val"]).max(initial=0))
    tokenizer = tokenizer or Ids(highest + 1)
    if highest >= tokenizer.size:
        raise UserError(f"{folder}: has token id {highest}, but {arguments['tokenizer']} has only {tokenizer.size} ids")
    details, small_files = tokenizer_to_meta(tokenizer)
    for name, data in small_files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != data:
            raise UserError(f"{folder / name}: is another tokenizer; pass --tokenizer={folder / name}, or move the file away")
    details |= {"separator": "unknown: made elsewhere", "source": {"arguments": arguments}}
    return write_meta(folder, tokenizer.size, splits, counts["train"], details, small_files)


def batch(run: Path, step: int, folder: str = ""):
    """Returns the batch of a step of a run: its windows' indices (B,), their ids (B, seq_len + 1), and the tokenizer.

    folder: where the data are, if not at the path that the run was given. Raises UserError if they are not the run's data.
    """
    path = run / "config.json"
    if not path.exists():
        raise UserError(f"{run}: not a run directory, as it has no config.json")
    if step < 1:
        raise UserError(f"--step={step}: steps are counted from 1")
    try:
        values = renamed(json.loads(path.read_bytes()))
        values.pop("op_set", None)
        trained_on = values.pop("data_fingerprint", None)  # older runs do not have it
        c = from_dict(values)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: not the settings of a run: {e}") from None
    if step > c.max_steps:
        raise UserError(f"--step={step}: the run has {c.max_steps} steps")
    folder = folder or c.data
    if not files(Path(folder) / "train.bin"):
        raise UserError(f"{folder}/train.bin: not found from this folder; pass --data=FOLDER")
    # `data.prepare from-bin` may have added a meta.json since.
    if trained_on not in (None, fingerprint(folder)) and trained_on != fingerprint_of_ends(folder):
        raise UserError(f"{folder}: not the data that {run} was trained on; pass --data=FOLDER")
    data = Bin(Path(folder) / "train.bin", c.seq_len, c.vocab_size)
    windows = window_indices(c.seed, (step - 1) * c.batch_size, c.batch_size, data.n_windows)
    return windows, data.windows(windows), load_tokenizer(folder, c.vocab_size)


def show(argv: list[str]) -> int:
    """Prints the exact batch of a step."""
    parser = Parser(prog="python -m data.bins", description="Shows the exact batch of a step.")
    parser.add_argument("path", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step, from 1")
    parser.add_argument("--data", default="", metavar="FOLDER", help="the run's data (default: the path that it was given)")
    args = parser.parse_args(argv)
    windows, ids, tokenizer = batch(args.path, args.step, args.data)
    with quiet_pipe():
        for i, (window, row) in enumerate(zip(windows, ids.tolist(), strict=True)):
            text = tokenizer.decode(row)
            print(f"sequence {i}, window {window}\nids  {' '.join(map(str, row))}\ntext {text!r}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(show, sys.argv[1:]))
