"""Text in, bins out.

    python -m data.prepare python-stdlib --tokenizer=bpe --vocab_size=2048
    python -m data.prepare text notes/ book.txt crawl.jsonl.zst --tokenizer=llama.model --out=data/mine
    python -m data.prepare hf HuggingFaceFW/fineweb-edu --name=sample-10BT --tokenizer=gpt2
    python -m data.prepare redpajama --tokens=40e9 --tokenizer=llama.model
    python -m data.prepare from-bin data/fineweb10B --tokenizer=gpt2
    python -m data.prepare repeats --alphabet=64 --length=128

Each document becomes bos and its ids, in train.bin or val.bin by a hash of its text: the choice depends on nothing else, so it
stays the same when the source grows. Repeating a command whose dataset is there does nothing. Repeating one that was
interrupted resumes it, and ends with the same bytes.
"""

import argparse
import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from config import ROOT, Parser
from data import bpe
from data.documents import Part
from data.encode import Settings, batches, encode_all
from data.import_bins import import_bins
from data.meta import SPLITS, load_meta
from data.progress import Progress
from data.sources import SOURCES, option
from data.tokenizer import CHOICES, get_tokenizer, tokenizer_to_meta
from data.tokenizer_kinds import SentencePiece, Tokenizer
from data.writer import Writer
from errors import UserError, run_command


def prepare(argv: list[str]) -> Path:
    """Does what the command line says and returns the dataset's folder. Raises UserError for a user's mistake."""
    args, out, processes = parse(argv)
    if args["source"] == "from-bin":
        import_bins(out, args["tokenizer"])
        return out
    tokenizer = choose_tokenizer(args)
    if is_prepared(out, args, tokenizer):
        print(f"{out}: already prepared with these arguments; to make it again, remove the folder")
        return out

    parts = find_parts(args)
    listing = hashlib.blake2b(repr([(part.name, part.size) for part in parts]).encode(), digest_size=16).hexdigest()
    with Writer(out, key={"arguments": args, "listing": listing}) as writer:
        tokenizer = tokenizer or train_tokenizer(args["vocab_size"], parts, writer, f"{listing}.model")
        writer.vocab_size = tokenizer.size
        with Progress(writer, parts, args.get("tokens", 0)) as progress:
            settings = Settings(args["val_fraction"], args["seed"], args.get("repeat", 0.0))
            source = batches(parts, progress.position, progress.is_full)
            for batch, encoded in encode_all(source, tokenizer, settings, processes):
                progress.add(batch, encoded)
        progress.report()
        entry, files = tokenizer_to_meta(tokenizer)
        details = {
            "tokenizer": entry,
            "bos_id": tokenizer.bos,
            "eos_id": tokenizer.eos,
            "separator": "bos before each document",
            "dropped": progress.dropped,
            "altered": progress.altered,
            "source": {"arguments": args, "python": platform.python_version()},
        }
        if "repeat" in args:
            share = progress.repeated / writer.totals["train"]["tokens"]
            details["repeat"] = {"tokens": progress.repeated, "share": share}
            print(f"{share:.2%} of the training tokens are in inserted copies")
        writer.commit(details, files)
    sizes = ", ".join(f"{split} {writer.totals[split]['tokens']:,} tokens" for split in SPLITS)
    print(f"{out}: {sizes}, vocab_size {tokenizer.size} ({tokenizer.kind})")
    return out


BPE_CHARS = 10**9  # of text that the sample for training a tokenizer is drawn from, at most
TEXT = {
    "--tokenizer": option("bytes", CHOICES, "NAME"),
    "--vocab_size": option(2048, "number of ids of the bpe tokenizer (default: 2048)") | {"default": argparse.SUPPRESS},
    "--repeat": option(0.0, "share of the training tokens to insert as copies of passages shortly before them", "SHARE"),
}
COMMON = {
    "--val_fraction": option(0.01, "share of documents held out"),
    "--seed": option(0, "of the choice of val, of repeats' rows and of --repeat's copies"),
}


def parse(argv: list[str]) -> tuple[dict, Path, int]:
    """Returns the arguments that determine the dataset, as meta.json keeps them; its folder; and the number of processes."""
    parser = Parser(prog="python -m data.prepare", description="Turns text into bins. SOURCE --help lists its options.")
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, source in SOURCES.items():
        formatter = argparse.ArgumentDefaultsHelpFormatter
        command = commands.add_parser(name, help=source.help, description=source.help, formatter_class=formatter)
        for flag, keywords in (source.options | ({} if source.tokenizer else TEXT) | COMMON).items():
            command.add_argument(flag, **keywords)
        command.add_argument("--out", type=Path, default=ROOT / "data" / name, metavar="FOLDER", help="where to write")
        command.add_argument("--processes", **option(cores(), "number of processes that encode text"))
    command = commands.add_parser("from-bin", help="bins of nanoGPT, llama2.c, llm.c or modded-nanogpt: writes their meta.json")
    command.add_argument("out", type=Path, metavar="FOLDER", help="folder that holds the bins")
    command.add_argument("--tokenizer", **option("", "bytes, a .model or .tiktoken file, or gpt2; else unknown", "NAME"))
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    processes = args.pop("processes", 1)
    if args["source"] != "from-bin":
        check(args, out, processes)
    return args, out, processes


def check(args: dict, out: Path, processes: int):
    """Refuses impossible arguments, and brings the others into the form that meta.json keeps."""
    if not 0 < args["val_fraction"] < 1:
        raise UserError(f"--val_fraction={args['val_fraction']}: expected a share above 0 and below 1, such as 0.01")
    if args["seed"] < 0:
        raise UserError(f"--seed={args['seed']}: expected 0 or more")
    if not 0 <= args.get("repeat", 0) <= 0.5:
        raise UserError(f"--repeat={args['repeat']}: expected a share from 0 to 0.5, such as 0.02")
    if not args.get("repeat"):
        args.pop("repeat", None)  # meta.json of before does not have it
    if processes < 1:
        raise UserError(f"--processes={processes}: expected 1 or more")
    tokenizer = args.get("tokenizer")
    if tokenizer == "bpe":
        args.setdefault("vocab_size", 2048)
    elif "vocab_size" in args:
        raise UserError(f"--vocab_size={args['vocab_size']}: {tokenizer} has its own; add --tokenizer=bpe, or leave it out")
    if tokenizer and Path(tokenizer).suffix:
        args["tokenizer"] = str(Path(tokenizer).resolve())
    paths = args.get("paths", [])
    args |= {"paths": [str(Path(path).resolve()) if Path(path).exists() else path for path in paths]} if paths else {}
    for path in map(Path, args.get("paths", [])):
        if path in (out.resolve(), *out.resolve().parents):
            raise UserError(f"--out={out}: lies in {path}, which is read as text; name a folder outside it")


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_parts(args: dict) -> list[Part]:
    """Returns the parts of the source, whose function is called with those of its parameters that are arguments."""
    source = SOURCES[args["source"]].parts
    return source(**{name: args[name] for name in inspect.signature(source).parameters if name in args})


def choose_tokenizer(args: dict) -> Tokenizer | None:
    """Returns the tokenizer asked for; None if it is to be trained on the source."""
    source = SOURCES[args["source"]]
    if source.tokenizer:
        return source.tokenizer(args)
    if args["tokenizer"] == "bpe":
        return None
    tokenizer = get_tokenizer(args["tokenizer"])
    if not tokenizer.lossless:
        print(f"note: {args['tokenizer']} changes text before it encodes it, so it decodes to something else")
    return tokenizer


def train_tokenizer(size: int, parts: list[Part], writer: Writer, name: str) -> Tokenizer:
    """Trains a bpe tokenizer on the source; it is kept under `name`, so that resuming does not train it again."""
    model = writer.kept(name)
    if model is None:
        print(f"training a bpe tokenizer of {size} ids", flush=True)
        model = bpe.train_bpe(training_texts(parts), size)
        writer.keep(name, model)
    return SentencePiece(model)


def training_texts(parts: list[Part]) -> Iterator[str]:
    """Yields the texts of the parts, of a large source the first BPE_CHARS characters: of each group by its weight."""
    weights = {part.group: part.weight for part in parts}
    left = {group: BPE_CHARS * weight / sum(weights.values()) for group, weight in weights.items()}
    for part in parts:
        documents = part.read(None) if left[part.group] > 0 else ()
        for document in documents:
            if document.text:
                yield document.text
                left[part.group] -= len(document.text)
                if left[part.group] <= 0:
                    break


def is_prepared(out: Path, args: dict, tokenizer: Tokenizer | None) -> bool:
    """Returns whether `out` holds this very dataset, complete. Raises UserError if it holds another, as none is overwritten."""
    meta = load_meta(out)
    found = [name for name in ("train.bin", "val.bin", "tokenizer.model", "tokenizer.tiktoken") if (out / name).exists()]
    if meta is None and not found or (out / ".partial/journal.json").exists():
        return False
    if meta is None or meta["source"]["arguments"] != args:
        what = "a dataset made with other arguments" if meta else f"{found[0]} that data.prepare did not make"
        raise UserError(f"{out}: holds {what}; pass another --out, or remove the folder")
    if tokenizer and tokenizer_to_meta(tokenizer)[0] != meta["tokenizer"]:
        raise UserError(
            f"{out}: holds a dataset made with another {args['tokenizer']}; pass another --out, or remove the folder"
        )
    bins = {split: out / f"{split}.bin" for split in SPLITS}
    return all(path.exists() and path.stat().st_size == 2 * meta["splits"][split]["tokens"] for split, path in bins.items())


def main(argv: list[str]) -> int:
    try:
        prepare(argv)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
