"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_writer(path) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` when the block ends; if the block raises or the process dies, `path` stays as it was.

    The data is on the disk before the rename, and the rename before the block ends.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
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
    """Replaces the file at `path` by `data`; text is written as UTF-8."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)
