"""Writes a dataset completely or not at all, and resumes an interrupted one.

An unfinished dataset lies in the folder `.partial` inside its own: the bins so far, and journal.json, which states how much of
them counts and where reading resumes.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import tqdm

from cli import say
from data.documents import Part
from data.encode import Settings, batches, encode_all
from data.meta import BLOCK, MAX_VOCAB, SPLITS, TOKEN, scan, write_meta
from data.tokenizer_kinds import Tokenizer
from errors import UserError
from files import atomic_write, naming

SAVE_SECONDS = 10  # between two points to resume from


class Writer:
    """Writes the bins of one dataset into `folder`: `with Writer(...) as w: w.add(...) ...; w.save(...) ...; w.commit(...)`.

    key: plain values that say what the dataset is made from. If an unfinished dataset of the same key is there, it is resumed:
    `totals` and `state` are then those of the last save(). Without any save(), nothing is left of a dataset that was not
    committed. Raises UserError if the unfinished dataset has another key, or another process is writing it.
    """

    def __init__(self, folder, vocab_size: int = MAX_VOCAB, key=None):
        self.folder = Path(folder)
        self.partial = self.folder / ".partial"
        self.journal = self.partial / "journal.json"
        self.lock = filelock.FileLock(self.partial / "lock", timeout=0)
        self.vocab_size = vocab_size
        self.key = json.loads(json.dumps(key))
        self.totals = {split: {"tokens": 0, "docs": 0, "bytes": 0} for split in SPLITS}
        self.state = None
        self.files = {}

    def __enter__(self):
        self.partial.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process is writing it; wait for it, or pass another --out") from None
        try:
            if self.journal.exists():
                self._read_journal()
            for split in SPLITS:
                self._open(split)
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # on a full disk: what is lost counts in no journal, and was reported
                file.close()
        if not self.journal.exists():
            shutil.rmtree(self.partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # the folder holds a dataset
                self.folder.rmdir()
        self.lock.release()

    def _read_journal(self):
        try:
            journal = json.loads(self.journal.read_bytes())
            key, self.totals, self.state = journal["key"], journal["totals"], journal["state"]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.journal}: damaged; remove {self.partial} and start again") from None
        if key != self.key:
            raise UserError(
                f"{self.partial}: an unfinished dataset of other arguments, or its source has changed since; "
                "remove that folder, or pass another --out"
            )

    def _open(self, split):
        """Opens the bin so far, cut to what the journal states."""
        path = self.partial / f"{split}.bin"
        n_bytes = self.totals[split]["tokens"] * TOKEN.itemsize
        if n_bytes and not path.exists():  # commit() had begun
            os.replace(self.folder / path.name, path)
        self.files[split] = file = open(path, "ab")
        if file.tell() < n_bytes:
            raise UserError(f"{path}: shorter than its journal states; remove {self.partial} and start again")
        file.truncate(n_bytes)

    def add(self, split: str, ids, docs: int = 1, n_bytes: int = 0):
        """Appends documents: ids, a list or array of ints, of `docs` documents, from n_bytes bytes of text.

        Raises UserError for an id outside 0..vocab_size-1, which the cast to uint16 would silently wrap.
        """
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            bad = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(f"{self.folder / split}.bin: token id {bad} is outside 0..{self.vocab_size - 1} (vocab_size - 1)")
        file = self.files[split]
        with naming(file.name):
            file.write(ids.astype(TOKEN))
        for name, n in (("tokens", ids.size), ("docs", docs), ("bytes", n_bytes)):
            self.totals[split][name] += n

    def save(self, state: dict):
        """Makes what was added so far permanent; `state`, plain values, is what resuming starts from."""
        self._sync()
        atomic_write(self.journal, json.dumps({"key": self.key, "totals": self.totals, "state": state}))

    def _sync(self):
        for file in self.files.values():
            with naming(file.name):
                file.flush()
                os.fsync(file.fileno())

    def commit(self, details: dict, files: dict[str, bytes]) -> dict:
        """Writes meta.json and the files that go with it, and gives the bins their final names. Returns the meta.

        Older bins are removed first: if the process dies in between, meta.json describes bins that are missing, and readers
        refuse the folder. Bins without a meta.json would pass for bins of another program.
        """
        self._sync()
        scans = {split: scan(_read(self.partial / f"{split}.bin")) for split in SPLITS}
        splits = {split: self.totals[split] | {"blake2b": digest} for split, (digest, _) in scans.items()}
        bins = [f"{split}.bin" for split in SPLITS]
        for name in bins:
            (self.folder / name).unlink(missing_ok=True)
        meta = write_meta(self.folder, self.vocab_size, splits, scans["train"][1], details, files)
        for file in self.files.values():
            file.close()  # Windows does not rename open files
        for name in bins:
            os.replace(self.partial / name, self.folder / name)
        self.journal.unlink(missing_ok=True)
        return meta


def _read(path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, TOKEN, BLOCK)):
            yield block


def write_documents(writer: Writer, parts: list[Part], tokenizer: Tokenizer, settings: Settings, processes: int) -> dict:
    """Encodes all documents of the parts, or of each group until it has its quota of tokens, into the writer's bins.

    Returns the state at the end, which is also what is saved every SAVE_SECONDS: "position", as in Batch.end; "counts",
    "first" and "places", as in Encoded, and in the counts the "tokens" of each group.
    """
    state = {"position": (0, None), "counts": {"dropped": {"empty": 0, "undecodable": 0}}, "first": {}, "places": (1.0, 0.0)}
    state |= writer.state or {}
    state["counts"] = counts = defaultdict(Counter, {name: Counter(counter) for name, counter in state["counts"].items()})
    quotas = {part.group: part.quota for part in parts}
    counted = "tokens" if any(quotas.values()) else "bytes"  # by the progress bar

    def is_full(group: str) -> bool:
        return 0 < quotas[group] <= counts["tokens"][group]

    if writer.state:
        say(f"{writer.folder}: resuming after {sum(counts['docs'].values()):,} documents")
    saved = time.monotonic()
    with progress_bar(parts, sum(quotas.values()), initial=sum(counts[counted].values())) as bar:
        for batch, encoded in encode_all(batches(parts, state["position"], is_full), tokenizer, settings, processes):
            state["position"] = batch.end
            if not is_full(batch.group):
                for split, ids in encoded.ids.items():
                    writer.add(split, ids, encoded.counts["docs"][split], encoded.counts["bytes"][split])
                    counts["tokens"][batch.group] += len(ids)
                for name, counter in encoded.counts.items():
                    counts[name].update(counter)
                state["first"] = encoded.first | state["first"]
                lowest, highest = zip(state["places"], encoded.places, strict=True)
                state["places"] = (min(lowest), max(highest))
            bar.update(sum(counts[counted].values()) - bar.n)
            if time.monotonic() - saved >= SAVE_SECONDS:
                writer.save(state)
                saved = time.monotonic()
    return state


def progress_bar(parts: list[Part], tokens: int, initial: int) -> tqdm.tqdm:
    """Returns a bar of the tokens wanted, or of the bytes of text, without a total for compressed and remote files."""
    sizes = [None if part.name.endswith((".gz", ".zst")) else part.size for part in parts]
    total = tokens or (None if None in sizes else sum(sizes))
    terminal = sys.stdout.isatty()
    look = {"unit_scale": True, "file": sys.stdout, "dynamic_ncols": terminal, "mininterval": 0.2 if terminal else 10}
    return tqdm.tqdm(total=total, initial=initial, unit="tok" if tokens else "B", **look)


def report(writer: Writer, state: dict, parts: list[Part]):
    """Prints what was left out, what will not decode to its text, and what is missing. Raises UserError if a split is empty."""
    counts = state["counts"]
    for reason, n in counts["dropped"].items():
        if n:
            say(f"left out: {n:,} documents {reason}, the first {state['first'][reason]}")
    for reason, n in counts["altered"].items():
        say(f"note: {n:,} documents do not decode to their text: {reason}")
    for group, quota in {part.group: part.quota for part in parts}.items():
        if counts["tokens"][group] < quota:
            say(f"note: {group or 'the source'} has {counts['tokens'][group]:,} tokens of the {quota:,} asked for")
    total = sum(counts["docs"].values())
    if not all(counts["docs"][split] for split in SPLITS):
        writer.journal.unlink(missing_ok=True)  # resuming would end here again
    if total < 2:
        left_out = ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items())
        raise UserError(
            f"found {total} documents, where train and val need one each (left out: {left_out}); name more or longer files"
        )
    for split in SPLITS:
        if not counts["docs"][split]:
            remedy = another_fraction(split, *state["places"])
            kind = {"train": "training", "val": "validation"}[split]
            raise UserError(f"no document was selected for {kind}, of {total} in all; {remedy}")


def another_fraction(split: str, lowest: float, highest: float) -> str:
    """Returns advice for an empty split: a short --val_fraction between the split hashes, which gives it few documents."""
    if lowest == highest:
        return "all of them have the same text; name other files"
    exact = lowest + (highest - lowest) * (0.01 if split == "val" else 0.99)
    rounded = (round(exact, digits) for digits in range(1, 20))
    return f"pass --val_fraction={next(fraction for fraction in rounded if lowest < fraction < highest)}"
