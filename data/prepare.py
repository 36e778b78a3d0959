"""Prepares a dataset: turns text into bins of token ids.

    python -m data.prepare python-stdlib --tokenizer=bpe --vocab_size=2048
    python -m data.prepare text notes/ book.txt crawl.jsonl.zst --tokenizer=llama.model --out=data/mine
    python -m data.prepare hf HuggingFaceFW/fineweb-edu --name=sample-10BT --tokenizer=gpt2
    python -m data.prepare redpajama --tokens=40e9 --tokenizer=llama.model
    python -m data.prepare from-bin data/fineweb10B --tokenizer=gpt2
    python -m data.prepare repeats --alphabet=64 --length=128

Each document becomes bos and its ids, in train.bin or val.bin by a hash of its text and --seed: it keeps its split when the
source grows. Repeating a command whose dataset is complete does nothing. Repeating one that was interrupted resumes it, and
gives the same bytes.
"""

import sys

if __name__ == "__main__" and not __package__:
    print("expected: python -m data.prepare, from the project's folder", file=sys.stderr)
    sys.exit(2)

from cli import Parser, exit_on_interrupt, run_command, say, whole

if __name__ == "__main__":
    exit_on_interrupt()  # importing NumPy and the tokenizers takes a while

import argparse
import hashlib
import inspect
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from config import ROOT
from data.bins import import_bins
from data.documents import Part
from data.encode import Settings
from data.meta import SPLITS, load_meta
from data.sources import HELP, SOURCES
from data.tokenizer import KINDS, get_tokenizer, tokenizer_to_meta, train_bpe
from data.tokenizer_kinds import Chars, SentencePiece, Tokenizer
from data.writer import Writer, report, write_documents
from errors import UserError
from files import atomic_write

BPE_CHARS = 10**9  # characters, at most, from which the sample for training a tokenizer is drawn
TOKEN_CHARS = 20  # of these, at most, for each token that --tokens asks for
# The options of sources without a tokenizer of their own, and those of all sources, with their defaults.
TEXT = {"tokenizer": "bytes", "vocab_size": 0, "repeat": 0.0}
COMMON = {"val_fraction": 0.01, "seed": 0}


def prepare(argv: list[str]) -> Path:
    """Prepares the dataset that the command line describes, and returns its folder. Raises UserError for a usage error."""
    args, out, processes = parse(argv)
    tokenizer = choose_tokenizer(args)
    if args["source"] == "from-bin":
        show(out, import_bins(out, tokenizer, args))
        return out
    if is_prepared(out, args, tokenizer):
        say(f"{out}: already prepared with these arguments; to make it again, remove the folder")
        return out

    source = SOURCES[args["source"]]
    parts = source(**{name: args[name] for name in inspect.signature(source).parameters})
    listing = repr([(part.name, part.size, part.mtime) for part in parts]).encode()
    key = {"arguments": args, "parts": hashlib.blake2b(listing, digest_size=16).hexdigest()}
    if tokenizer:
        key["tokenizer"] = tokenizer_to_meta(tokenizer)[0]["tokenizer"]
    with Writer(out, key=key) as writer:
        if is_prepared(out, args, tokenizer):  # by another process, while this one listed the source
            say(f"{out}: prepared by another process")
            return out
        tokenizer = tokenizer or train_tokenizer(args["vocab_size"], parts, writer)
        writer.vocab_size = tokenizer.size
        settings = Settings(args["val_fraction"], args["seed"], args.get("repeat", 0.0))
        state = write_documents(writer, parts, tokenizer, settings, processes)
        report(writer, state, parts)
        entries, files = tokenizer_to_meta(tokenizer)
        details = entries | {
            "separator": "bos before each document",
            "dropped": state["counts"]["dropped"],
            "altered": state["counts"]["altered"],
            "source": {"arguments": args, "python": platform.python_version()},
        }
        if "repeat" in args:
            copied = state["counts"]["copied"]["train"]
            details["repeat"] = {"tokens": copied, "share": copied / writer.totals["train"]["tokens"]}
            say(f"{details['repeat']['share']:.2%} of the training tokens are in inserted copies")
        show(out, writer.commit(details, files))
    return out


def show(out: Path, meta: dict):
    """Prints the sizes of a dataset."""
    sizes = ", ".join(f"{split} {meta['splits'][split]['tokens']:,} tokens" for split in SPLITS)
    say(f"{out}: {sizes}, vocab_size {meta['vocab_size']} ({meta['tokenizer']['kind']})")


def parse(argv: list[str]) -> tuple[dict, Path, int]:
    """Returns the arguments that determine the dataset, as meta.json keeps them; its folder; and the number of processes."""
    parser = Parser(prog="python -m data.prepare", description="Turns text into bins. SOURCE --help lists its options.")
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, source in SOURCES.items():
        doc = source.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=doc, description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        own = {option.name: option.default for option in inspect.signature(source).parameters.values()}
        for option, default in (own | ({} if name == "repeats" else TEXT) | COMMON).items():
            add_option(command, option, default)
        folder = ROOT / "data" / ("mine" if name == "text" else name)  # data/text is that of configs/text.py
        command.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help="where to write")
        add_option(command, "processes", cores())
    command = commands.add_parser("from-bin", help="bins of nanoGPT, llama2.c, llm.c or modded-nanogpt: writes their meta.json")
    command.add_argument("out", type=Path, metavar="FOLDER", help="folder that holds the bins")
    add_option(command, "tokenizer", "")
    for word in argv:
        if not word or word.startswith("--") and word.find("=") == len(word) - 1:
            raise UserError(f"{word or 'an empty argument'}: has no value; is a shell variable unset?")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    processes = args.pop("processes", 1)
    if args["source"] != "from-bin":
        check(args, out, processes)
    return args, out, processes


def add_option(command: argparse.ArgumentParser, name: str, default):
    """Adds an option of the type of its default; without a default, it is a list of positional arguments."""
    if default is inspect.Parameter.empty:
        command.add_argument(name, nargs="+", metavar=name.upper().removesuffix("S"), help=HELP[name])
    else:
        kind = whole if type(default) is int else type(default)
        command.add_argument(f"--{name}", type=kind, default=default, metavar=type(default).__name__.upper(), help=HELP[name])


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(args: dict, out: Path, processes: int):
    """Refuses impossible arguments, and brings the others into the form that meta.json keeps."""
    if not 0 < args["val_fraction"] < 1:
        raise UserError(f"--val_fraction={args['val_fraction']}: expected a share above 0 and below 1, such as 0.01")
    if processes < 1:
        raise UserError(f"--processes={processes}: expected 1 or more")
    if not 0 <= args.get("repeat", 0) <= 0.9:
        raise UserError(f"--repeat={args['repeat']}: expected a share from 0 to 0.9, such as 0.02")
    if not args.get("repeat"):
        args.pop("repeat", None)  # older datasets do not have it
    tokenizer = args.get("tokenizer")
    size = args.pop("vocab_size", None)
    if tokenizer == "bpe":
        args["vocab_size"] = size or 2048
    elif size:
        raise UserError(f"--vocab_size={size}: {tokenizer} has a fixed vocabulary; add --tokenizer=bpe, or leave it out")
    if tokenizer and Path(tokenizer).suffix:
        args["tokenizer"] = os.path.abspath(tokenizer)
    if "paths" in args:
        args["paths"] = [os.path.abspath(path) if Path(path).exists() else path for path in args["paths"]]
    for path in args.get("paths", []):
        if Path(path).exists() and Path(path).resolve() in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out={out}: lies in {path}, which is read as text; name a folder outside it")


def choose_tokenizer(args: dict) -> Tokenizer | None:
    """Returns the tokenizer asked for; None if it is to be trained on the source, or is not known."""
    if args["source"] == "repeats":
        return Chars(args["alphabet"])
    if args["tokenizer"] == "bpe" and args["source"] == "from-bin":
        raise UserError("--tokenizer=bpe: is trained on text; name the tokenizer that made the bins, or leave it out")
    if args["tokenizer"] in ("bpe", ""):
        return None
    return get_tokenizer(args["tokenizer"])


def is_prepared(out: Path, args: dict, tokenizer: Tokenizer | None) -> bool:
    """Returns whether `out` holds exactly this dataset, complete. Raises UserError if it holds another: none is overwritten."""
    meta = load_meta(out)
    names = ("train.bin", "val.bin", *(kind.file for kind in KINDS.values() if kind.file))
    found = [name for name in names if (out / name).exists()]
    if meta is None and not found or (out / ".partial/journal.json").exists():
        return False
    other = ""
    if meta is None:
        other = f"{found[0]} that data.prepare did not make"
    elif not isinstance(source := meta.get("source"), dict) or source.get("arguments") != args:
        other = "a dataset made with other arguments"
    elif tokenizer and tokenizer_to_meta(tokenizer)[0]["tokenizer"] != meta["tokenizer"]:
        other = f"a dataset made with another {args['tokenizer']}"
    if other:
        raise UserError(f"{out}: holds {other}; pass another --out, or remove the folder")
    if (file := meta["tokenizer"].get("file")) and not (out / file).exists():
        return False
    bins = {split: out / f"{split}.bin" for split in SPLITS}
    return all(path.exists() and path.stat().st_size == 2 * meta["splits"][split]["tokens"] for split, path in bins.items())


def train_tokenizer(size: int, parts: list[Part], writer: Writer) -> Tokenizer:
    """Trains a bpe tokenizer on the source; it lies beside the unfinished bins, so that resuming does not train it again."""
    path = writer.partial / "tokenizer.model"
    if writer.state is None:
        say(f"training a bpe tokenizer of {size} ids")
        atomic_write(path, train_bpe(training_texts(parts), size))
        writer.save({})
    return SentencePiece(path.read_bytes())


def training_texts(parts: list[Part]) -> Iterator[str]:
    """Yields the texts of the parts: at most the first BPE_CHARS characters, which groups share in proportion to their quotas.

    If --tokens sets quotas, at most TOKEN_CHARS characters are read for each token of them.
    """
    quotas = {part.group: part.quota for part in parts}
    total = sum(quotas.values())
    left = {group: min(BPE_CHARS / total, TOKEN_CHARS) * quota if total else BPE_CHARS for group, quota in quotas.items()}
    for part in parts:
        documents = part.read(None) if left[part.group] > 0 else ()
        for document, _ in documents:
            if document.text:
                yield document.text
                left[part.group] -= len(document.text)
                if left[part.group] <= 0:
                    break


def main(argv: list[str]) -> int:
    try:
        prepare(argv)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
