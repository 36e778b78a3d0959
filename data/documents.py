"""Reads documents from files and datasets: plain text, JSON lines, and whatever the library `datasets` reads.

A damaged file raises UserError. A damaged record, or one without its text, becomes a document with text=None and the reason, so
that it is counted and named. JSON lines are parsed here, since the loader of `datasets` stops at the first bad line and takes a
.zst file that was cut off for a complete one. Files at a URL are opened through `datasets`, which retries.
"""

import contextlib
import gzip
import io
import json
import logging
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from errors import UserError, require

BOM = b"\xef\xbb\xbf"  # which Windows puts before UTF-8
LONG = 65536  # bytes; a longer file of plain text is cut into documents of about this length
MAX_RECORD = 2**25  # bytes; a longer record is dropped, as its ids would fill the memory
TOO_LONG = f"longer than {MAX_RECORD // 2**20} MiB"
PROBED = 100  # records at the beginning of a file; if none of them has the field, its name is taken to be wrong
ROWS = 64  # of a table, read at a time


class Document(NamedTuple):
    """
    id: names the document in messages
    text: None if the document is left out, and then `dropped` says why
    """

    id: str
    text: str | None
    dropped: str = ""


class Part(NamedTuple):
    """A unit of a source that is read in order: a file, a dataset or a generator.

    read: read(state) yields pairs: a document, and the state, plain values, with which read() begins after that document.
        read(None) begins with the first.
    size: in bytes; None if unknown
    mtime: when a local file was last changed, in ns
    group, quota: the parts of a group yield about `quota` tokens together; 0 for all
    """

    name: str
    read: Callable[[Any], Iterator[tuple[Document, Any]]]
    size: int | None = None
    group: str = ""
    quota: int = 0
    mtime: int = 0


def numbered(read: Callable[[], Iterable[Document]]):
    """Returns Part.read for documents that can only be read from the first one: the state is how many of them to skip."""

    def resumable(state):
        for number, document in enumerate(read(), 1):
            if number > (state or 0):
                yield document, number

    return resumable


def decoded(id: str, data: bytes) -> Document:
    """Returns the document whose text is `data` in UTF-8."""
    if len(data) > MAX_RECORD:
        return Document(id, None, TOO_LONG)
    try:
        return Document(id, data.decode())
    except UnicodeDecodeError:
        return Document(id, None, "undecodable")


def plain_text(path: str) -> Iterator[Document]:
    """Yields a text file as one document, or cut at line ends into several of about LONG bytes.

    This way even a single file has parts to train on and parts to validate on.
    """
    with open_file(path) as file:
        data = file.read(len(BOM))
        start = len(BOM) if data == BOM else 0  # of `data` in the file
        data = data.removeprefix(BOM)
        while len(data := data + file.read(LONG + 1 - len(data))) > LONG:
            end = _boundary(data[:LONG])
            yield decoded(f"{file_name(path)}:{start}", data[:end])
            data = data[end:]
            start += end
    yield decoded(f"{file_name(path)}:{start}", data)


def _boundary(data: bytes) -> int:
    """Returns where to cut: after the last line end, else before a last character that may be incomplete."""
    incomplete = re.search(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z", data)
    return data.rfind(b"\n") + 1 or (incomplete.start() if incomplete else len(data))


def json_lines(path: str, field: str) -> Iterator[Document]:
    """Yields a document for each line that is not blank: the text under the key `field`.

    Raises UserError if the file is damaged, or if none of its first records has the key.
    """
    records = 0
    found = False
    with open_file(path) as file:
        for number, line in enumerate(_lines(file), 1):
            if line.isspace():
                continue
            records += 1
            text, dropped = _parse(line, field)
            found = found or dropped != f"without {field}"
            if records == PROBED and not found:
                raise UserError(
                    f"{path}: none of its first {PROBED} records has the field {field!r}: {line[:80]}; pass --field=NAME"
                )
            yield Document(f"{file_name(path)}:{number}", text, dropped)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file; of one longer than MAX_RECORD, only its first MAX_RECORD + 1 bytes."""
    while line := file.readline(MAX_RECORD + 1):
        yield line
        while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD)):
            pass


def _parse(line: bytes, field: str) -> tuple[str | None, str]:
    """Returns the text of a record, or None and why it has none."""
    if len(line.rstrip(b"\n")) > MAX_RECORD:
        return None, TOO_LONG
    try:
        text = json.loads(line.decode("utf-8-sig"))[field]
        text.encode()  # JSON can spell half of a surrogate pair
        return text, ""
    except UnicodeError:
        return None, "undecodable"
    except (LookupError, TypeError, AttributeError):
        return None, f"without {field}"
    except (ValueError, RecursionError):
        return None, "not JSON"


def rows(name: str, path: str, field: str, options: dict, state) -> Iterator[tuple[Document, Any]]:
    """Yields the rows of load_dataset(path, **options), streamed; a row's number counts from 1 within the dataset.

    state: of the dataset before a table of rows, the number of rows before it, and the number of rows of it to skip.
    """
    datasets = _datasets(name)
    position, row, skip = state or (None, 0, 0)
    with one_line_errors(name):
        import pyarrow

        columns = datasets.load_dataset(path, streaming=True, **options).column_names
        if columns and field not in columns:
            raise UserError(f"{name}: has no column {field!r}; it has: {', '.join(columns)}; pass --field=NAME")
        only = {"columns": [field]} if path == "parquet" else {}
        dataset = datasets.load_dataset(path, streaming=True, **options, **only)
        dataset = dataset.select_columns([field]).with_format("arrow")
        if position:
            dataset.load_state_dict(position)
        for table in dataset.iter(batch_size=ROWS):
            column = table.column(field)
            try:
                cells = column.cast(pyarrow.large_binary())
            except pyarrow.ArrowException:
                raise UserError(f"{name}: column {field!r} is {column.type}, not text; pass --field=NAME") from None
            for n, cell in enumerate(cells, 1):
                data = cell.as_py()
                id = f"{name}:{row + n}"
                if n > skip:
                    document = Document(id, None, f"without {field}") if data is None else decoded(id, data)
                    yield document, (position, row, n)
            row += len(cells)
            skip = 0
            position = dataset.state_dict()


def file_name(path: str) -> str:
    """Returns a path, or a URL without its query."""
    return path.split("?")[0] if "://" in path else path


@contextlib.contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Opens a file or URL, to be read decompressed if its name ends in .gz or .zst. Raises UserError if it is damaged."""
    with one_line_errors(path), _open(path) as file:
        if file_name(path).endswith(".gz"):
            yield gzip.GzipFile(fileobj=file)
        elif file_name(path).endswith(".zst"):
            pyarrow = require("pyarrow", f"{path}: reading it", "data")
            yield io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))
        else:
            yield file


def _open(path: str) -> BinaryIO:
    if "://" not in path:
        return open(path, "rb")
    _datasets(path)
    from datasets.utils.file_utils import xopen  # open() for URLs, which retries

    return io.BufferedReader(xopen(path, "rb"))


def _datasets(name: str):
    """Returns the package `datasets` with its logging and progress bars off; errors are reported in one line."""
    datasets = require("datasets", f"{name}: reading it", "data")
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    return datasets


@contextlib.contextmanager
def one_line_errors(name: str):
    """Turns whatever the libraries that read files raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f"{name}: {e}; pip install '.[data]'") from None
    except Exception as e:
        what = textwrap.shorten(f"{type(e).__name__}: {e}", 200, placeholder=" ...")
        raise UserError(f"{name}: {what}; fix this, then run the same command again to resume") from None
