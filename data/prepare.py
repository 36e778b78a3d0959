"""Text in, bins out.

    python -m data.prepare python-stdlib --tokenizer=bpe --vocab_size=2048
    python -m data.prepare text notes/ book.txt --out=data/mine
    python -m data.prepare repeats --alphabet=64 --length=128

Each document becomes bos + its ids, in train.bin or val.bin by a hash of its text: the choice depends on nothing else,
so it stays the same when the source grows. Asking again for what is there already does nothing.
"""

import argparse
import errno
import hashlib
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np

from data import sources, vocab
from data.bins import SPLITS, DataError, Writer, load_meta

ROOT = Path(__file__).resolve().parent.parent


def prepare(argv: list[str]) -> Path:
    """Does what the command line `argv` says and returns the dataset's folder. Raises DataError for a user's mistake."""
    args = parse(argv)
    out = Path(args.pop("out"))
    if is_prepared(out, args):
        print(f"{out}: already prepared with these arguments; remove the folder to make it anew")
        return out

    def documents():
        return SOURCES[args["source"]](args)

    words = make_vocab(args, (d.text for d in documents() if d.text))
    with Writer(out, words.size) as writer:
        dropped, lowest = {"empty": 0, "undecodable": 0}, 1.0
        progress = Progress(writer.counts)
        for _, text in documents():
            if not text:
                dropped["undecodable" if text is None else "empty"] += 1
                continue
            data = text.encode()
            place = split_hash(data, args["seed"])
            lowest = min(lowest, place)
            ids = np.concatenate(([words.bos], words.encode(text)))
            writer.add("val" if place < args["val_fraction"] else "train", ids, n_bytes=len(data))
            progress.show()
        progress.show(last=True)
        check_splits(writer.counts, dropped, lowest, args["val_fraction"])
        entry, files = vocab.to_meta(words)
        meta = {
            "tokenizer": entry,
            "bos_id": words.bos,
            "eos_id": words.eos,
            "separator": "bos before each document",
            "dropped": dropped,
            "source": {"arguments": args, "python": platform.python_version()},
        }
        writer.commit(meta, files)
    sizes = ", ".join(f"{split} {writer.counts[split]['tokens']:,} tokens" for split in SPLITS)
    print(f"{out}: {sizes}, vocab_size {words.size} ({words.kind})")
    return out


SOURCES = {
    "python-stdlib": lambda args: sources.python_stdlib(),
    "text": lambda args: sources.text(args["paths"]),
    "repeats": lambda args: sources.repeats(**{knob: args[knob] for knob in REPEATS}, seed=args["seed"]),
}
REPEATS = {
    "alphabet": (int, 64, "different characters"),
    "length": (int, 128, "tokens in a row, bos among them: the seq_len to train with"),
    "rows": (int, 90000, "rows in all, one document each"),
    "span_min": (int, 32, "shortest segment, in characters"),
    "span_max": (int, 64, "longest segment, in characters"),
    "tiled": (float, 0.85, "share of rows that are one segment over and over; in the others pieces of it begin anywhere"),
}


class Parser(argparse.ArgumentParser):
    """Errors are DataErrors of one line, also for whoever calls prepare() from Python."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        raise DataError(f"{message}; see {self.prog} --help")


def parse(argv: list[str]) -> dict:
    """The arguments that make a dataset, as meta.json keeps them, and `out`. Each source takes its own options only."""
    parser = Parser(prog="python -m data.prepare", description="Turns text into bins. SOURCE --help lists its options.")
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    stdlib = commands.add_parser("python-stdlib", help="the .py files of this Python's standard library")
    text = commands.add_parser("text", help="your own files and folders, UTF-8")
    text.add_argument("paths", nargs="+", metavar="PATH", help="file, or folder to read all files of")
    repeats = commands.add_parser("repeats", help="random characters in which earlier spans come again")
    for name, (kind, default, doc) in REPEATS.items():
        repeats.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__.upper(), help=doc)
    for command in (stdlib, text):
        command.add_argument("--tokenizer", choices=("bytes", "bpe"), default="bytes", help="bpe is trained on the source")
        command.add_argument(
            "--vocab_size", type=int, default=argparse.SUPPRESS, metavar="INT", help="ids of the bpe tokenizer (default: 2048)"
        )
    for name, command in commands.choices.items():
        command.add_argument("--out", default=str(ROOT / "data" / name), metavar="FOLDER", help="where to write")
        command.add_argument("--val_fraction", type=float, default=0.01, metavar="FLOAT", help="share of documents held out")
        command.add_argument("--seed", type=int, default=0, metavar="INT", help="of the choice of val, and of repeats' rows")
    args = vars(parser.parse_args(argv))

    if not 0 < args["val_fraction"] < 1:
        raise DataError(f"--val_fraction={args['val_fraction']}: expected a share above 0 and below 1, such as 0.01")
    if args["seed"] < 0:
        raise DataError(f"--seed={args['seed']}: expected 0 or more")
    if args.get("tokenizer") == "bytes" and "vocab_size" in args:
        raise DataError(f"--vocab_size={args['vocab_size']}: bytes have 257 ids; add --tokenizer=bpe, or leave it out")
    if args.get("tokenizer") == "bpe":
        args.setdefault("vocab_size", 2048)
    if "paths" in args:
        args["paths"] = [str(Path(path).resolve()) for path in args["paths"]]
        out = Path(args["out"]).resolve()
        for path in args["paths"]:
            if Path(path) in (out, *out.parents):
                raise DataError(f"--out={out}: lies in {path}, which is read as text; name a folder outside it")
    return args


def is_prepared(out: Path, args: dict) -> bool:
    """Whether `out` holds this very dataset, whole. Raises DataError where it holds another one: nothing is written over."""
    meta, bins = load_meta(out), {split: out / f"{split}.bin" for split in SPLITS}
    here = [name for name in ("train.bin", "val.bin", "tokenizer.model") if (out / name).exists()]
    if meta is None and not here:
        return False
    if meta is None or meta["source"]["arguments"] != args:
        what = "a dataset made with other arguments" if meta else f"{here[0]} that data.prepare did not make"
        raise DataError(f"{out}: holds {what}; pass another --out, or remove the folder")
    return all(path.exists() and path.stat().st_size == 2 * meta["splits"][split]["tokens"] for split, path in bins.items())


def make_vocab(args: dict, texts) -> vocab.Vocab:
    if args["source"] == "repeats":
        return vocab.Chars(args["alphabet"])
    if args["tokenizer"] == "bytes":
        return vocab.Bytes()
    print(f"training a bpe tokenizer of {args['vocab_size']} ids", flush=True)
    return vocab.SentencePiece(vocab.train_bpe(texts, args["vocab_size"]))


def split_hash(text: bytes, seed: int) -> float:
    """Where the text lies in 0..1; below val_fraction it is held out."""
    digest = hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def check_splits(counts: dict, dropped: dict, lowest: float, val_fraction: float):
    """Raises DataError where a split got no document. lowest: the least split_hash that occurred."""
    docs = {split: counts[split]["docs"] for split in SPLITS}
    total = sum(docs.values())
    if total == 0:
        raise DataError(f"no documents: {dropped['empty']} empty files and {dropped['undecodable']} that are not UTF-8")
    if total == 1:
        raise DataError("one document cannot be split into train and val: name more files, or a longer one")
    if docs["val"] == 0:
        enough = math.ceil(lowest * 1000 + 1e-9) / 1000
        raise DataError(f"val.bin would be empty: none of {total} documents fell to it; pass --val_fraction={enough}")
    if docs["train"] == 0:
        raise DataError(
            f"train.bin would be empty: --val_fraction={val_fraction} takes all {total} documents; pass a smaller one"
        )


class Progress:
    """One line of documents, MB, tokens and MB/s: rewritten in place on a terminal, else a new one every 10 s."""

    def __init__(self, counts: dict):
        self.counts, self.started = counts, time.perf_counter()
        self.terminal, self.shown = sys.stdout.isatty(), self.started

    def show(self, last=False):
        now = time.perf_counter()
        if now - self.shown < (0.2 if self.terminal else 10) and not last:
            return
        self.shown = now
        docs, tokens, size = (sum(self.counts[s][name] for s in SPLITS) for name in ("docs", "tokens", "bytes"))
        rate = size / 1e6 / (now - self.started)
        line = f"{docs:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens, {rate:.1f} MB/s"
        print(f"\r{line}\033[K" if self.terminal else line, end="" if self.terminal and not last else "\n", flush=True)


def main() -> int:
    """Exit status 0: done; 2: the user's mistake; 4: the disk is full."""
    try:
        prepare(sys.argv[1:])
    except DataError as e:
        print(e, file=sys.stderr)
        return 2
    except OSError as e:
        print(f"{e.filename}: {e.strerror}" if e.filename else e.strerror, file=sys.stderr)
        return 4 if e.errno == errno.ENOSPC else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
