"""Progress and resume state of data.prepare."""

import itertools
import math
import sys
import time
from collections import Counter

import tqdm

from data.documents import Part
from data.encode import Batch, Encoded, Position
from data.meta import SPLITS
from data.writer import Writer
from errors import UserError

SAVE_SECONDS = 10  # between two points to resume from


class Progress:
    """`with Progress(...) as progress: progress.add(...) ...`: writes encoded batches, counts them, and shows a progress bar.

    What is to be resumed from is saved every SAVE_SECONDS. position: where reading starts.
    """

    def __init__(self, writer: Writer, parts: list[Part], tokens: int):
        """tokens: how many are wanted; 0 for all."""
        self.writer = writer
        weights = {part.group: part.weight for part in parts}
        self.quotas = {group: math.ceil(tokens * weight / sum(weights.values())) for group, weight in weights.items()}
        state = writer.state or {}
        self.position = Position(*state.get("position", ()))
        self.dropped = Counter({"empty": 0, "undecodable": 0} | state.get("dropped", {}))
        self.altered = Counter(state.get("altered"))
        self.spent = Counter(state.get("spent"))  # tokens, by group
        self.first = state.get("first", {})
        self.lowest = state.get("lowest", 1.0)  # split_hash() of a document
        self.repeated = state.get("repeated", 0)  # tokens in inserted copies
        if writer.state:
            print(f"{writer.folder}: resuming after {self.total('docs'):,} documents", flush=True)
        sizes = [part.size for part in parts]
        self.offsets = None if None in sizes else [0, *itertools.accumulate(sizes)]  # of the parts, in bytes
        self.unit = "tok" if tokens else "B"
        self.goal = sum(self.quotas.values()) if tokens else self.offsets and self.offsets[-1]

    def __enter__(self):
        terminal = sys.stdout.isatty()
        self.bar = tqdm.tqdm(
            total=self.goal, initial=self.done(), unit=self.unit, unit_scale=True, file=sys.stdout,
            dynamic_ncols=terminal, mininterval=0.2 if terminal else 10,
        )  # fmt: skip
        self.saved = time.monotonic()
        return self

    def __exit__(self, *_):
        self.bar.close()

    def is_full(self, group: str) -> bool:
        return 0 < self.quotas[group] <= self.spent[group]

    def add(self, batch: Batch, encoded: Encoded):
        self.position = batch.end
        if not self.is_full(batch.group):
            for split, ids in encoded.ids.items():
                self.writer.add(split, ids, encoded.docs[split], encoded.bytes[split])
                self.spent[batch.group] += len(ids)
            self.dropped.update(encoded.dropped)
            self.altered.update(encoded.altered)
            self.first = encoded.first | self.first
            self.lowest = min(self.lowest, encoded.lowest)
            self.repeated += encoded.repeated
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self.save()
            self.saved = time.monotonic()
        self.bar.update(self.done() - self.bar.n)

    def save(self):
        names = ("position", "dropped", "altered", "spent", "first", "lowest", "repeated")
        self.writer.save({name: getattr(self, name) for name in names})

    def done(self) -> int:
        """Returns how far it is, in self.unit: tokens of those wanted, else bytes read, else bytes of text written."""
        if self.unit == "tok":
            return sum(min(self.spent[group], quota) for group, quota in self.quotas.items())
        if self.offsets:
            return self.offsets[self.position.part] + self.position.read
        return self.total("bytes")

    def total(self, name: str) -> int:
        return sum(self.writer.totals[split][name] for split in SPLITS)

    def report(self):
        """Says what was dropped, and what will not decode to its text. Raises UserError if a split got no document."""
        for reason, n in self.dropped.items():
            if n:
                print(f"left out: {n:,} documents {reason}, the first {self.first[reason]}")
        for reason, n in self.altered.items():
            print(f"note: {n:,} documents do not decode to their text: {reason}")
        for group, quota in self.quotas.items():
            if self.spent[group] < quota:
                print(f"note: {group or 'the source'} has {self.spent[group]:,} tokens of the {quota:,} asked for")
        docs = {split: self.writer.totals[split]["docs"] for split in SPLITS}
        total = sum(docs.values())
        if total == 0:
            raise UserError(f"no documents; left out: {', '.join(f'{n} {reason}' for reason, n in self.dropped.items())}")
        if total == 1:
            raise UserError("one document cannot be split into train and val: name more files, or a longer one")
        if docs["val"] == 0:
            enough = math.ceil(self.lowest * 1000 + 1e-9) / 1000
            raise UserError(f"val.bin would be empty: none of {total} documents fell to it; pass --val_fraction={enough}")
        if docs["train"] == 0:
            raise UserError(f"train.bin would be empty: val takes all {total} documents; pass a smaller --val_fraction")
