"""Where documents come from. Each source is a generator of Documents, the same ones in the same order every time."""

import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.bins import DataError
from data.vocab import Chars

LONG = 65536  # characters; a longer file of the user's is cut into documents of about this length


class Document(NamedTuple):
    id: str
    text: str | None  # None: the file is not UTF-8


def python_stdlib():
    """The .py files of the standard library of the Python that runs this, by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _files(root, skip=("site-packages", "dist-packages", "__pycache__")):
        if path.suffix == ".py":
            yield Document(path.relative_to(root).as_posix(), _read(path))


def text(paths):
    """The files named, and every regular file below the folders named, hidden ones left out.

    A file is one document, but a long one is cut at line ends: a single file of any size still has parts to
    train on and parts to validate on. Raises DataError for a path that does not exist.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        for file in _files(path) if path.is_dir() else [path]:
            whole = _read(file)
            for part in _parts(whole) if whole else [whole]:
                yield Document(str(file), part)


def _files(folder, skip=()):
    """The regular files below a folder by relative path, without those that are hidden or in a folder named in skip."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(top, name) for name in names if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda path: path.relative_to(folder).as_posix())


def _read(path):
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None


def _parts(whole):
    start = 0
    while start < len(whole):
        end = start + LONG
        if end < len(whole):
            end = whole.rfind("\n", start, end) + 1 or end
        yield whole[start:end]
        start = end


def repeats(alphabet=64, length=128, rows=90000, span_min=32, span_max=64, tiled=0.85, seed=0):
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
            raise DataError(knob)
    codes = np.array([ord(c) for c in Chars(alphabet).alphabet], dtype="<u4")
    rng = np.random.default_rng(seed)
    for row in range(rows):
        symbols = repeat_row(rng, length - 1, alphabet, span_min, span_max, tiled)
        yield Document(str(row), codes[symbols].tobytes().decode("utf-32-le"))


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
