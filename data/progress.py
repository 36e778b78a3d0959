"""Where a prepare stands: what was written and left out so far, how to go on from there, and the line that shows it."""

import math
import sys
import time
from collections import Counter

from data import sources
from data.meta import SPLITS
from data.writer import Writer
from errors import UserError

SAVE_SECONDS = 10  # between two points to go on from


class Tally:
    """Writes what was encoded, counts it, shows it, and saves it every SAVE_SECONDS."""

    def __init__(self, args, parts, writer: Writer):
        self.args, self.parts, self.writer = args, parts, writer
        self.quotas = sources.quotas(args.get("tokens", 0), args.get("share"))
        state = writer.state or {}
        self.part, self.taken, self.read = state.get("at", (0, 0, 0))
        self.dropped = Counter({"empty": 0, "undecodable": 0} | state.get("dropped", {}))
        self.altered, self.spent = Counter(state.get("altered")), Counter(state.get("spent"))
        self.first, self.lowest = state.get("first", {}), state.get("lowest", 1.0)
        if writer.state:
            print(f"{writer.folder}: going on after {self.total('docs'):,} documents", flush=True)
        self.started = self.shown = self.saved = time.perf_counter()
        self.bytes_before, self.done_before = self.total("bytes"), self.done()
        self.terminal = sys.stdout.isatty()

    def full(self, group: str) -> bool:
        return bool(self.quotas[group]) and self.spent[group] >= self.quotas[group]

    def add(self, batch, encoded):
        self.part, self.taken, self.read = batch.part, batch.taken, batch.read
        if not self.full(batch.group):
            for split, ids in encoded.ids.items():
                self.writer.add(split, ids, encoded.docs[split], encoded.bytes[split])
                self.spent[batch.group] += len(ids)
            self.dropped.update(encoded.dropped)
            self.altered.update(encoded.altered)
            self.first = encoded.first | self.first
            self.lowest = min(self.lowest, encoded.lowest)
        now = time.perf_counter()
        if now - self.saved >= SAVE_SECONDS:
            self.save()
            self.saved = now
        if now - self.shown >= (0.2 if self.terminal else 10):
            self.show()
            self.shown = now

    def save(self):
        state = {name: getattr(self, name) for name in ("dropped", "altered", "spent", "first", "lowest")}
        self.writer.save(state | {"at": (self.part, self.taken, self.read)})

    def finish(self):
        """Says what was left out or will not decode as it was. Raises UserError where a split got no document."""
        self.show(last=True)
        for reason, n in self.dropped.items():
            if n:
                print(f"left out: {n:,} documents {reason}, the first {self.first[reason]}")
        for reason, n in self.altered.items():
            print(f"note: {n:,} documents do not decode to their text: {reason}")
        for group, quota in self.quotas.items():
            if self.spent[group] < quota:
                print(f"note: {group or self.args['source']} has {self.spent[group]:,} tokens of the {quota:,} asked for")
        check_splits(self.writer.counts, self.dropped, self.lowest, self.args["val_fraction"])

    def total(self, name: str) -> int:
        return sum(self.writer.counts[split][name] for split in SPLITS)

    def done(self) -> float:
        """The share of the work that is done: of the tokens asked for, else of the source's bytes."""
        if any(self.quotas.values()):
            return sum(min(self.spent[g], q) for g, q in self.quotas.items()) / sum(self.quotas.values())
        return (sum(part.size for part in self.parts[: self.part]) + self.read) / max(sum(p.size for p in self.parts), 1)

    def show(self, last=False):
        """One line, rewritten in place on a terminal."""
        seconds, done = time.perf_counter() - self.started, self.done()
        size, tokens = self.total("bytes"), self.total("tokens")
        rate = (size - self.bytes_before) / 1e6 / seconds
        line = f"{self.total('docs'):,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens, {rate:.1f} MB/s"
        if not last and done > self.done_before:
            line += f", {done:.0%}, ETA {(1 - done) / (done - self.done_before) * seconds:,.0f} s"
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal and not last else "\n", flush=True)


def check_splits(counts: dict, dropped: dict, lowest: float, val_fraction: float):
    """Raises UserError where a split got no document. lowest: the least place that occurred."""
    docs = {split: counts[split]["docs"] for split in SPLITS}
    total = sum(docs.values())
    if total == 0:
        raise UserError(f"no documents; left out: {', '.join(f'{n} {reason}' for reason, n in dropped.items())}")
    if total == 1:
        raise UserError("one document cannot be split into train and val: name more files, or a longer one")
    if docs["val"] == 0:
        enough = math.ceil(lowest * 1000 + 1e-9) / 1000
        raise UserError(f"val.bin would be empty: none of {total} documents fell to it; pass --val_fraction={enough}")
    if docs["train"] == 0:
        raise UserError(
            f"train.bin would be empty: --val_fraction={val_fraction} takes all {total} documents; pass a smaller one"
        )
