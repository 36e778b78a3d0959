"""Writes files completely or not at all, and never over a file of another kind."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from errors import UserError

# First bytes of each kind of output file. An existing file is replaced only if it begins with them, or is empty.
BEGINNINGS = {
    ".json": b'[\n {\n  "path"', ".html": b"<!doctype html>", ".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"
}  # fmt: skip


@contextlib.contextmanager
def naming(path):
    """Adds `path` to an OSError that the block raises without one, as a write to a full disk does."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_writer(path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends; if the block raises or the process dies, `path` stays as it was.

    The data is on the disk before the rename, and the rename before the block ends.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write(path, data: bytes | str):
    """Replaces the file at `path` with `data`; text is written as UTF-8."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def check_output(option: str, file: str | Path, *suffixes: str, begins: bytes | None = None):
    """Raises UserError if `file` cannot be written or would replace a file of another kind; called before long work.

    begins: the first bytes of files of this kind (default: those in BEGINNINGS)
    """
    path = Path(file)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{option}={file}: expected a name that ends in {', '.join(suffixes)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{option}={file}: cannot be written; name a file in a folder that exists and is writable")
    if path.exists():
        beginning = begins or BEGINNINGS[path.suffix.lower()]
        with path.open("rb") as old:
            if old.read(len(beginning)) not in (b"", beginning):
                raise UserError(f"{option}={file}: exists and was not written by {option}; name another file, or remove it")
