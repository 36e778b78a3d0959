"""Where documents come from. Each source is a function that returns its Parts, the same ones in the same order every time."""

import functools
import hashlib
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import download, readers
from data.readers import Document
from data.tokenizer import Chars
from errors import UserError


class Part(NamedTuple):
    """One file of a source, or what is like one. size: its bytes, as far as known; read(): its documents, from the first on;
    group: whose share of --tokens it counts for.
    """

    name: str
    size: int
    read: Callable[[], Iterator[Document]]
    group: str = ""


def python_stdlib() -> list[Part]:
    """The .py files of the standard library of the Python that runs this, by relative path; each is one document."""
    return _python(Path(sysconfig.get_paths()["stdlib"]), skip=("site-packages", "dist-packages", "__pycache__"))


def python_packages() -> list[Part]:
    """Those of the standard library, and of all packages installed beside it."""
    return python_stdlib() + _python(Path(sysconfig.get_paths()["purelib"]), skip=("__pycache__",))


def _python(root: Path, skip) -> list[Part]:
    found = _files(root, skip)

    def read(path, name):
        yield readers.decoded(name, path.read_bytes())

    names = {path: path.relative_to(root).as_posix() for path in found if path.suffix == ".py"}
    return [Part(name, path.stat().st_size, functools.partial(read, path, name)) for path, name in names.items()]


def text(paths, field: str = "text") -> list[Part]:
    """The files named, and every regular file below the folders named, hidden ones left out.

    field: what holds the text in .jsonl (also .gz, .zst) and .parquet files; all others are text themselves, see
    readers.plain. Raises UserError for a path that does not exist.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found += _files(path) if path.is_dir() else [path]
    return [Part(str(file), file.stat().st_size, functools.partial(readers.read, file, field)) for file in found]


def _files(folder, skip=()):
    """The regular files below a folder by relative path, without those that are hidden or in a folder named in skip."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


SAMPLE = "https://huggingface.co/datasets/togethercomputer/RedPajama-Data-1T-Sample/resolve/main/{}_sample.jsonl"
CRAWLS = ("cc_2019-30", "cc_2020-05", "cc_2021-04", "cc_2022-05", "cc_2023-06")
FINEWEB = "https://huggingface.co/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{:03}_00000.parquet"
CORPORA = {  # the URLs of its files, or of a list of them
    "redpajama-sample": [SAMPLE.format(x) for x in ("arxiv", "book", "c4", *CRAWLS, "github", "stackexchange", "wikipedia")],
    "redpajama": "https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt",
    "fineweb-edu": [FINEWEB.format(i) for i in range(14)],
}
# RedPajama's sources and how many billion tokens each has, from its card; book, of 26, has been withdrawn.
SHARES = {"common_crawl": 878, "c4": 175, "github": 59, "arxiv": 28, "wikipedia": 24, "stackexchange": 20, "book": 0}
# About how many bytes of a file make a token: what to download is chosen by it, and what was chosen is said.
BYTES_PER_TOKEN = {".jsonl": 5, ".gz": 2, ".zst": 2, ".parquet": 3}


def quotas(tokens: int, shares: dict | None) -> dict[str, int]:
    """How many tokens each group is to give; 0: all it has."""
    if shares is None:
        return {"": tokens}
    total = sum(shares.values())
    return {group: math.ceil(tokens * weight / total) for group, weight in shares.items() if weight}


def corpus(name: str, cache: Path, out: Path, tokens=0, urls="", shares: dict | None = None, field="text") -> list[Part]:
    """The Parts of a public corpus; its files are downloaded into `cache` as they are read. Says how much that will be, and
    how much the bins will be in `out`.

    tokens: about how many are wanted, 0 for all; urls: a file or URL with other URLs, one a line; shares: {source: weight} of
    redpajama, whose sources are folders in its URLs. Files of a source come by the hash of their URLs, so that a few of many
    are spread over all. Raises UserError where the disk has not the room.
    """
    listed = _listed(urls or CORPORA[name], cache)
    parts, missing, total, thought = [], 0, 0, 0
    for group, wanted in quotas(tokens, shares).items():
        files = listed if shares is None else _of(group, listed)
        need = 1.2 * wanted * BYTES_PER_TOKEN[_suffix(files[0])] or math.inf
        for url in files:
            if need <= 0:  # to go on with, should the others hold fewer tokens than thought
                parts.append(Part(url, 0, functools.partial(_remote, url, None, cache, None, field), group))
                continue
            remote = download.look(url, cache)
            size = remote.size or 0
            # Of a plain file much larger than needed the beginning will do.
            limit = math.ceil(need) if _suffix(url) == ".jsonl" and size > 2 * need else None
            missing += download.missing(remote, cache, limit) or 0
            total += limit or size
            thought += (limit or size) / BYTES_PER_TOKEN[_suffix(url)]
            need -= limit or size or math.inf
            read = functools.partial(_remote, url, remote, cache, limit, field)
            parts.append(Part(url, limit or size, read, group))
    many, size = sum(part.size > 0 for part in parts), 2 * (tokens or int(thought))
    print(
        f"{name}: {many} files of {total / 1e9:,.2f} GB; {missing / 1e9:,.2f} GB to download to {cache}, "
        f"about {size / 1e9:,.2f} GB of bins in {out}"
    )
    _check_room({cache: missing, out: size})
    return parts


def _check_room(needs: dict[Path, int]):
    """Raises UserError where a disk has less than the bytes needed in the folders on it."""
    disks = {}
    for folder, n in needs.items():
        there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
        on = disks.setdefault(there.stat().st_dev, [there, 0])
        on[1] += n
    for there, n in disks.values():
        if n > (free := shutil.disk_usage(there).free):
            raise UserError(
                f"{there}: {free / 1e9:,.1f} GB free, but about {n / 1e9:,.1f} GB are needed; pass --cache or --out on another "
                "disk, or --tokens=N"
            )


def _listed(urls, cache: Path) -> list[str]:
    """The URLs: a list as it is, or the lines of a file or of what a URL gives."""
    if isinstance(urls, list):
        return urls
    path = Path(urls)
    if "://" in urls:
        path = download.fetch(download.look(urls, cache), cache)
    elif not path.is_file():
        raise UserError(f"--urls={urls}: no such file")
    found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    for url in found:
        if "://" not in url or _suffix(url) not in BYTES_PER_TOKEN:
            raise UserError(f"{urls}: {url[:200]!r} is no URL of a {', '.join(readers.SUFFIXES)} file")
    if not found:
        raise UserError(f"{urls}: has no URLs")
    return found


def _of(group: str, urls: list[str]) -> list[str]:
    found = [url for url in urls if f"/{group}/" in url]
    if not found:
        raise UserError(f"no file of {group!r} among {len(urls)} URLs; pass --share {group}=0")
    return sorted(found, key=lambda url: hashlib.blake2b(url.encode()).digest())


def _suffix(url: str) -> str:
    return Path(url.split("?")[0]).suffix


def _remote(url, remote, cache, limit, field) -> Iterator[Document]:
    remote = remote or download.look(url, cache)
    path = download.fetch(remote, cache, limit, _Progress(url, limit or remote.size))
    try:
        yield from readers.read(path, field, url.split("?")[0], cut=limit is not None and limit < (remote.size or math.inf))
    except readers.Damaged:
        path.unlink(missing_ok=True)  # it came as it was sent, so that another try may bring another
        raise


class _Progress:
    """A line every 10 s of a download."""

    def __init__(self, url, size):
        self.name, self.of, self.shown = url.split("/")[-1], f" of {size / 1e6:,.0f}" if size else "", time.monotonic()

    def __call__(self, done):
        if time.monotonic() - self.shown >= 10:
            self.shown = time.monotonic()
            print(f"downloading {self.name}: {done / 1e6:,.0f}{self.of} MB", flush=True)


def repeats(alphabet=64, length=128, rows=90000, span_min=32, span_max=64, tiled=0.85, seed=0) -> list[Part]:
    """Synthetic rows in which earlier spans come again, so that a model must learn to copy to lower its loss.

    A row is one document of length - 1 characters: with bos before it, exactly one window of seq_len=length.
    See repeat_row for the other knobs; alphabet and seed are those of its symbols and of its random stream.
    """
    for ok, knob in (
        (length >= 2, f"--length={length}: a row needs bos and at least one character"),
        (rows >= 1, f"--rows={rows}: expected at least 1"),
        (1 <= span_min <= span_max, f"--span_min={span_min} --span_max={span_max}: expected 1 <= span_min <= span_max"),
        (0 <= tiled <= 1, f"--tiled={tiled}: a share of the rows, 0 to 1"),
    ):
        if not ok:
            raise UserError(knob)
    codes = np.array([ord(c) for c in Chars(alphabet).alphabet], dtype="<u4")

    def read():
        rng = np.random.default_rng(seed)
        for row in range(rows):
            symbols = repeat_row(rng, length - 1, alphabet, span_min, span_max, tiled)
            yield Document(str(row), codes[symbols].tobytes().decode("utf-32-le"), read=(row + 1) * length)

    return [Part("rows", rows * length, read)]


def repeat_row(rng, n, alphabet, span_min, span_max, tiled):
    """One row: n symbols (n,) of 0..alphabet-1, all but the first span_min..span_max of them repeated.

    A random segment comes first. With probability `tiled` it then goes round and round: one match tells the period, and
    with it all the rest. Otherwise pieces of it of 12 to 40 symbols follow that begin anywhere: each must be matched anew.
    """
    segment = rng.integers(alphabet, size=rng.integers(span_min, span_max + 1))
    if rng.random() < tiled:
        return np.resize(segment, n)
    pieces = [segment]
    while sum(map(len, pieces)) < n:
        pieces.append(np.roll(segment, -rng.integers(len(segment)))[: rng.integers(12, 41)])
    return np.concatenate(pieces)[:n]
