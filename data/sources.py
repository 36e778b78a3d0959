"""Where documents come from. SOURCES names every source; each is a function that returns its parts, always the same ones in
the same order.
"""

import functools
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import corpora
from data.documents import Document, Part, decoded
from data.tokenizer_kinds import Chars, Tokenizer
from errors import UserError


class Source(NamedTuple):
    """
    parts: called with those of its parameters that are options of data.prepare
    options: of this source alone: {name: keyword arguments of ArgumentParser.add_argument}
    tokenizer: makes the source's own tokenizer from the arguments; None if --tokenizer is to choose one
    """

    help: str
    parts: Callable[..., list[Part]]
    options: dict[str, dict] = {}
    tokenizer: Callable[[dict], Tokenizer] | None = None


def python_stdlib() -> list[Part]:
    """Returns the .py files of this Python's standard library, by relative path; each is one document."""
    return _python(Path(sysconfig.get_paths()["stdlib"]), skip=("site-packages", "dist-packages", "__pycache__"))


def python_packages() -> list[Part]:
    """Returns the .py files of the standard library and of all packages installed beside it."""
    return python_stdlib() + _python(Path(sysconfig.get_paths()["purelib"]), skip=("__pycache__",))


def _python(root: Path, skip) -> list[Part]:
    def read(path, name, state=None):
        yield decoded(name, path.read_bytes(), path.stat().st_size)

    names = {path: path.relative_to(root).as_posix() for path in _files(root, skip) if path.suffix == ".py"}
    return [Part(name, path.stat().st_size, functools.partial(read, path, name)) for path, name in names.items()]


def text(paths, field="text") -> list[Part]:
    """Returns the files named, and every regular file below the folders named, hidden ones left out.

    field: the key or column that holds the text of .jsonl (.gz, .zst) and .parquet files. All others are text in UTF-8,
    .txt.gz and .txt.zst among them. Raises UserError for a path that does not exist.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found += map(str, _files(path) if path.is_dir() else [path])
    kinds = {path: corpora.file_kind(path) for path in found}
    return [corpora.file_part(path, kind if kind in ("lines", "parquet") else "text", field) for path, kind in kinds.items()]


def _files(folder, skip=()) -> list[Path]:
    """Returns the regular files below a folder by relative path, except hidden ones and those in folders named in skip."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


def repeats(alphabet=64, length=128, rows=90000, span_min=32, span_max=64, tiled=0.85, seed=0) -> list[Part]:
    """Returns synthetic rows in which earlier spans repeat, so that a model must learn to copy to lower its loss.

    A row is one document of length - 1 characters: with bos before it, exactly one window of seq_len=length. See repeat_row
    for span_min, span_max and tiled.
    """
    for ok, mistake in (
        (length >= 2, f"--length={length}: a row needs bos and at least one character"),
        (rows >= 1, f"--rows={rows}: expected at least 1"),
        (1 <= span_min <= span_max, f"--span_min={span_min} --span_max={span_max}: expected 1 <= span_min <= span_max"),
        (0 <= tiled <= 1, f"--tiled={tiled}: a share of the rows, 0 to 1"),
    ):
        if not ok:
            raise UserError(mistake)
    codes = np.array([ord(c) for c in Chars(alphabet).alphabet], dtype="<u4")

    def read(state=None):
        rng = np.random.default_rng(seed)
        for row in range(rows):
            symbols = repeat_row(rng, length - 1, alphabet, span_min, span_max, tiled)
            yield Document(str(row), codes[symbols].tobytes().decode("utf-32-le"), read=(row + 1) * length)

    return [Part("rows", rows * length, read)]


def repeat_row(rng, n, alphabet, span_min, span_max, tiled):
    """Returns one row: n symbols (n,) of 0..alphabet-1, of which all but the first span_min..span_max are repeated.

    The row begins with a random segment. With probability `tiled` the segment is then repeated to the end: a single match
    gives the period, and with it all the rest. Otherwise pieces of the segment follow, of 12 to 40 symbols and from random
    starts, so that each must be matched anew.
    """
    segment = rng.integers(alphabet, size=rng.integers(span_min, span_max + 1))
    if rng.random() < tiled:
        return np.resize(segment, n)
    pieces = [segment]
    while sum(map(len, pieces)) < n:
        pieces.append(np.roll(segment, -rng.integers(len(segment)))[: rng.integers(12, 41)])
    return np.concatenate(pieces)[:n]


def count(text: str) -> int:
    """Parses 40e9 as well as 40000000000."""
    number = int(float(text))
    if number < 0:
        raise ValueError
    return number


def share(text: str) -> dict[str, float]:
    """Parses SOURCE=WEIGHT."""
    name, _, weight = text.partition("=")
    if name not in corpora.SHARES or not float(weight) >= 0:
        raise ValueError
    return {name: float(weight)}


def option(default, help: str, metavar: str = "", **keywords) -> dict:
    """Returns the keyword arguments of add_argument for an option of the type of its default."""
    kind = type(default)
    return dict(type=kind, default=default, metavar=metavar or kind.__name__.upper(), help=help) | keywords


FIELD = {"--field": option("text", "key or column that holds the text", "NAME")}
CORPUS = FIELD | {
    "--tokens": option(0, "stop after about N tokens, such as 40e9; 0: read everything", "N", type=count),
    "--download": dict(action="store_true", help="download the files before reading them, instead of streaming"),
}
SOURCES = {
    "text": Source(
        "your own files and folders: UTF-8 text, .jsonl (.gz, .zst) and .parquet",
        text,
        {"paths": dict(nargs="+", metavar="PATH", help="file, or folder of files")} | FIELD,
    ),
    "python-stdlib": Source("the .py files of this Python's standard library", python_stdlib),
    "python-packages": Source("those, and the .py files of all installed packages", python_packages),
    "repeats": Source(
        "rows of random characters in which earlier spans repeat",
        repeats,
        {
            "--alphabet": option(64, "number of different characters"),
            "--length": option(128, "tokens in a row with its bos: the seq_len to train with"),
            "--rows": option(90000, "number of rows, each of which is a document"),
            "--span_min": option(32, "shortest segment, in characters"),
            "--span_max": option(64, "longest segment, in characters"),
            "--tiled": option(0.85, "share of rows that are one segment, repeated"),
        },
        lambda args: Chars(args["alphabet"]),
    ),
    "hf": Source(
        "a dataset of the Hugging Face hub, or files and URLs that `datasets` reads",
        corpora.corpus,
        {
            "paths": dict(nargs="+", metavar="PATH", help="a dataset such as HuggingFaceFW/fineweb-edu, or files and URLs"),
            "--name": option("", "configuration of the dataset, such as sample-10BT", "NAME"),
            "--split": option("train", "split of the dataset", "NAME"),
            "--revision": option("", "revision of the dataset: with one, it stays the same for ever", "SHA"),
        }
        | CORPUS,
    ),
    "fineweb-edu": Source(
        "FineWeb-Edu's sample of 10 billion tokens: 28.5 GB",
        functools.partial(corpora.corpus, ["HuggingFaceFW/fineweb-edu"], "sample-10BT"),
        CORPUS,
    ),
    "redpajama-sample": Source(
        "RedPajama's sample of a billion tokens: 11 files, 5.4 GB",
        functools.partial(corpora.corpus, corpora.RED_PAJAMA_SAMPLE),
        CORPUS,
    ),
    "redpajama": Source(
        "RedPajama v1, each of its sources by its share of --tokens",
        corpora.redpajama,
        {
            "--urls": option(corpora.RED_PAJAMA_URLS, "file or URL that lists the URLs of its files, one a line", "LIST"),
            "--share": option([], "weight of one of its sources", "SOURCE=WEIGHT", type=share, action="append"),
        }
        | CORPUS,
    ),
}
