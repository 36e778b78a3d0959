"""Text in, bins out.

    python -m data.prepare python-stdlib --tokenizer=bpe --vocab_size=2048
    python -m data.prepare text notes/ book.txt crawl.jsonl.zst --tokenizer=llama.model --out=data/mine
    python -m data.prepare redpajama --tokens=40e9 --tokenizer=llama.model
    python -m data.prepare from-bin data/fineweb10B --tokenizer=gpt2
    python -m data.prepare repeats --alphabet=64 --length=128

Each document becomes bos + its ids, in train.bin or val.bin by a hash of its text: the choice depends on nothing else,
so it stays the same when the source grows. Asking again for what is there already does nothing; asking again for what was
stopped goes on with it, and ends with the same bytes.
"""

import argparse
import errno
import hashlib
import os
import platform
import sys
from pathlib import Path

from data import bpe, sources
from data.encode import batches, encode_all
from data.import_bins import import_bins
from data.meta import SPLITS, load_meta
from data.progress import Tally
from data.tokenizer import Chars, SentencePiece, Tokenizer, get_tokenizer, tokenizer_to_meta
from data.writer import Writer
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def prepare(argv: list[str]) -> Path:
    """Does what the command line `argv` says and returns the dataset's folder. Raises UserError for a user's mistake."""
    args, how = parse(argv)
    out = how["out"]
    if args["source"] == "from-bin":
        import_bins(out, args["tokenizer"])
        return out
    tokenizer = make_vocab(args)
    if is_prepared(out, args, tokenizer):
        print(f"{out}: already prepared with these arguments; remove the folder to make it anew")
        return out

    parts = SOURCES[args["source"]](args, how)
    listing = hashlib.blake2b(repr([(part.name, part.size) for part in parts]).encode(), digest_size=16).hexdigest()
    with Writer(out, key={"arguments": args, "parts": listing}) as writer:
        tokenizer = tokenizer or trained_vocab(args["vocab_size"], parts, writer, f"{listing}.model")
        writer.vocab_size = tokenizer.size
        tally = Tally(args, parts, writer)
        source = batches(parts, tally.part, tally.taken, tally.full)
        for batch, encoded in encode_all(source, tokenizer, args["val_fraction"], args["seed"], how["processes"]):
            tally.add(batch, encoded)
        tally.finish()
        entry, files = tokenizer_to_meta(tokenizer)
        meta = {
            "tokenizer": entry,
            "bos_id": tokenizer.bos,
            "eos_id": tokenizer.eos,
            "separator": "bos before each document",
            "dropped": tally.dropped,
            "altered": tally.altered,
            "source": {"arguments": args, "python": platform.python_version()},
        }
        writer.commit(meta, files)
    sizes = ", ".join(f"{split} {writer.counts[split]['tokens']:,} tokens" for split in SPLITS)
    print(f"{out}: {sizes}, vocab_size {tokenizer.size} ({tokenizer.kind})")
    return out


def corpus(args, how):
    return sources.corpus(
        args["source"], how["cache"], how["out"], args["tokens"], args["urls"], args.get("share"), args["field"]
    )


SOURCES = {
    "python-stdlib": lambda args, how: sources.python_stdlib(),
    "python-packages": lambda args, how: sources.python_packages(),
    "text": lambda args, how: sources.text(args["paths"], args["field"]),
    "redpajama-sample": corpus,
    "redpajama": corpus,
    "fineweb-edu": corpus,
    "repeats": lambda args, how: sources.repeats(**{knob: args[knob] for knob in REPEATS}, seed=args["seed"]),
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
        raise UserError(f"{message}; see {self.prog} --help")


def share(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    if name not in sources.SHARES or not float(weight) >= 0:
        raise ValueError
    return name, float(weight)


def count(text: str) -> int:
    """40e9 as well as 40000000000."""
    return int(float(text))


def parse(argv: list[str]) -> tuple[dict, dict]:
    """The arguments that make a dataset, as meta.json keeps them; and those that say where and how it is made. Each source
    takes its own options only.
    """
    parser = Parser(prog="python -m data.prepare", description="Turns text into bins. SOURCE --help lists its options.")
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    stdlib = commands.add_parser("python-stdlib", help="the .py files of this Python's standard library")
    packages = commands.add_parser("python-packages", help="those, and the .py files of all packages installed")
    text = commands.add_parser("text", help="your own files and folders: UTF-8, .jsonl (.gz, .zst), .parquet")
    text.add_argument("paths", nargs="+", metavar="PATH", help="file, or folder to read all files of")
    corpora = [
        commands.add_parser("redpajama-sample", help="RedPajama's sample of a billion tokens: 11 files, 5.4 GB"),
        commands.add_parser("redpajama", help="RedPajama v1, as many tokens as asked for, by share of each source"),
        commands.add_parser("fineweb-edu", help="FineWeb-Edu's sample of 10 billion tokens: 14 files, 28.5 GB"),
    ]
    for name in ("redpajama-sample", "redpajama", "fineweb-edu"):
        command, tokens = commands.choices[name], 40_000_000_000 if name == "redpajama" else 0
        command.add_argument("--tokens", type=count, default=tokens, metavar="N", help="tokens wanted, such as 40e9; 0: all")
        command.add_argument("--urls", default="", metavar="LIST", help="file or URL with other URLs of files, one a line")
        command.add_argument("--cache", type=Path, default=ROOT / "data/cache", metavar="FOLDER", help="for what is downloaded")
    commands.choices["redpajama"].add_argument(
        "--share", type=share, action="append", default=[], metavar="SOURCE=WEIGHT",
        help=f"instead of its own, which are {' '.join(f'{k}={v}' for k, v in sources.SHARES.items())}",
    )  # fmt: skip
    for command in (text, *corpora):
        command.add_argument("--field", default="text", metavar="NAME", help="what holds the text in .jsonl and .parquet files")
    repeats = commands.add_parser("repeats", help="random characters in which earlier spans come again")
    for name, (kind, default, doc) in REPEATS.items():
        repeats.add_argument(f"--{name}", type=kind, default=default, metavar=kind.__name__.upper(), help=doc)
    for command in (stdlib, packages, text, *corpora):
        command.add_argument(
            "--tokenizer", default="bytes", metavar="NAME",
            help="bytes; bpe, trained on the source; a sentencepiece .model; a .tiktoken file; or gpt2",
        )  # fmt: skip
        command.add_argument(
            "--vocab_size", type=int, default=argparse.SUPPRESS, metavar="INT", help="ids of the bpe tokenizer (default: 2048)"
        )
    for name, command in commands.choices.items():
        command.add_argument("--out", type=Path, default=ROOT / "data" / name, metavar="FOLDER", help="where to write")
        command.add_argument("--val_fraction", type=float, default=0.01, metavar="FLOAT", help="share of documents held out")
        command.add_argument("--seed", type=int, default=0, metavar="INT", help="of the choice of val, and of repeats' rows")
        command.add_argument("--processes", type=int, default=cores(), metavar="INT", help="that encode text")
    bins = commands.add_parser("from-bin", help="bins of nanoGPT, llama2.c, llm.c or modded-nanogpt: writes their meta.json")
    bins.add_argument("out", type=Path, metavar="FOLDER", help="that holds them")
    bins.add_argument("--tokenizer", default="", metavar="NAME", help="bytes, a .model, a .tiktoken file or gpt2; else unknown")
    args = vars(parser.parse_args(argv))
    how = {name: args.pop(name) for name in ("out", "cache", "processes") if name in args}
    check(args, how)
    return args, how


def check(args: dict, how: dict):
    """Refuses what cannot be, and brings what is left into the form that meta.json keeps."""
    if args["source"] == "from-bin":
        return
    if not 0 < args["val_fraction"] < 1:
        raise UserError(f"--val_fraction={args['val_fraction']}: expected a share above 0 and below 1, such as 0.01")
    for name, least in (("seed", 0), ("tokens", 0), ("processes", 1)):
        value = how.get(name, args.get(name, least))
        if value < least:
            raise UserError(f"--{name}={value}: expected {least} or more")
    tokenizer = args.get("tokenizer")
    if tokenizer == "bpe":
        args.setdefault("vocab_size", 2048)
    elif "vocab_size" in args:
        raise UserError(f"--vocab_size={args['vocab_size']}: {tokenizer} has its own; add --tokenizer=bpe, or leave it out")
    if tokenizer and Path(tokenizer).suffix:
        args["tokenizer"] = str(Path(tokenizer).resolve())
    if args["source"] == "redpajama":
        if not args["tokens"]:
            raise UserError("--tokens=0: all of RedPajama is 2.7 TB; say how many tokens, such as --tokens=40e9")
        args["share"] = sources.SHARES | dict(args["share"])
        if not any(args["share"].values()):
            raise UserError("--share: every source has weight 0")
    if "paths" in args:
        args["paths"] = [str(Path(path).resolve()) for path in args["paths"]]
        out = how["out"].resolve()
        for path in args["paths"]:
            if Path(path) in (out, *out.parents):
                raise UserError(f"--out={out}: lies in {path}, which is read as text; name a folder outside it")


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_prepared(out: Path, args: dict, tokenizer: Tokenizer | None) -> bool:
    """Whether `out` holds this very dataset, whole. Raises UserError where it holds another one: nothing is written over."""
    meta, bins = load_meta(out), {split: out / f"{split}.bin" for split in SPLITS}
    here = [name for name in ("train.bin", "val.bin", "tokenizer.model", "tokenizer.tiktoken") if (out / name).exists()]
    if meta is None and not here or (out / ".partial/journal.json").exists():
        return False
    if meta is None or meta["source"]["arguments"] != args:
        what = "a dataset made with other arguments" if meta else f"{here[0]} that data.prepare did not make"
        raise UserError(f"{out}: holds {what}; pass another --out, or remove the folder")
    if tokenizer and tokenizer_to_meta(tokenizer)[0] != meta["tokenizer"]:
        raise UserError(
            f"{out}: holds a dataset made with another {args['tokenizer']}; pass another --out, or remove the folder"
        )
    return all(path.exists() and path.stat().st_size == 2 * meta["splits"][split]["tokens"] for split, path in bins.items())


def make_vocab(args: dict) -> Tokenizer | None:
    """The vocabulary asked for; None where it is to be trained on the source."""
    if args["source"] == "repeats":
        return Chars(args["alphabet"])
    if args["tokenizer"] == "bpe":
        return None
    tokenizer = get_tokenizer(args["tokenizer"])
    if not tokenizer.lossless:
        print(f"note: {args['tokenizer']} changes text before it encodes it, so that it decodes to something else")
    return tokenizer


def trained_vocab(size: int, parts, writer: Writer, name: str) -> Tokenizer:
    """A bpe tokenizer trained on the source, kept under `name` for whoever goes on after a kill."""
    if (model := writer.kept(name)) is None:
        print(f"training a bpe tokenizer of {size} ids", flush=True)
        model = bpe.train_bpe((d.text for part in parts for d in part.read() if d.text), size)
        writer.keep(name, model)
    return SentencePiece(model)


def main() -> int:
    """Exit status 0: done; 2: the user's mistake; 3: stopped by SIGINT; 4: the disk is full."""
    try:
        prepare(sys.argv[1:])
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 3
    except OSError as e:
        print(f"{e.filename}: {e.strerror}" if e.filename else e.strerror or e, file=sys.stderr)
        return 4 if e.errno == errno.ENOSPC else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
