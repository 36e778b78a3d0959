"""Documents out of files of text and of JSON lines, compressed (.gz, .zst) or not.

A damaged file raises UserError. A damaged record, or one without its text, is yielded with text=None and the reason, so that
it is counted and named. The loaders of `datasets` are not used here: they stop at the first bad line, and take a .zst file
that was cut off for a whole one.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from errors import UserError

LONG = 65536  # bytes; a longer file of plain text is cut into documents of about this length
BLOCK = 2**16  # bytes read at a time, so that memory stays small even where a file is compressed a thousandfold
MAX_RECORD = 2**25  # bytes; a longer record is dropped, as its ids would fill the memory
TOO_LONG = f"longer than {MAX_RECORD // 2**20} MiB"
PROBED = 100  # records; if none of so many has the field, its name is wrong


OpenFile = Callable[[], BinaryIO]


class Document(NamedTuple):
    """
    id: names the document in messages
    text: None if the document is dropped, and then `dropped` says why
    read: bytes of its file that were read by then
    state: set on a document at which reading can resume: Part.read(state) yields this document first
    """

    id: str
    text: str | None
    dropped: str = ""
    read: int = 0
    state: dict | None = None


class Part(NamedTuple):
    """A file of a source, or what takes the place of one.

    size: in bytes; None if unknown
    read: read(state) yields the documents, from the first one for state=None
    group, weight: of --tokens, each group gets a share proportional to its weight
    """

    name: str
    size: int | None
    read: Callable[[dict | None], Iterator[Document]]
    group: str = ""
    weight: float = 1.0


def decoded(id: str, data: bytes, read: int = 0) -> Document:
    """Returns the document whose text is `data` in UTF-8."""
    try:
        return Document(id, data.decode(), read=read)
    except UnicodeDecodeError:
        return Document(id, None, "undecodable", read)


def plain_text(open_file: OpenFile, name: str) -> Iterator[Document]:
    """Yields a text file as one document, or cut at line ends into several of about LONG bytes.

    This way even a single file has parts to train on and parts to validate on.
    """
    data = b""
    start = 0  # of `data` in the text
    read = 0
    for block, read in _blocks(open_file, name):
        data += block
        while len(data) > LONG:
            end = _boundary(data[:LONG])
            yield decoded(f"{name}:{start}", data[:end], read)
            data = data[end:]
            start += end
    yield decoded(f"{name}:{start}", data, read)


def _boundary(data: bytes) -> int:
    """Returns where to cut: after the last line end, else before the last character, which may be incomplete."""
    end = data.rfind(b"\n") + 1
    if end:
        return end
    for i in range(len(data) - 1, max(len(data) - 4, 0), -1):
        if data[i] & 0xC0 != 0x80:  # the first byte of the last character
            return i if data[i] >= 0xC0 else len(data)
    return len(data)


def json_lines(open_file: OpenFile, name: str, field: str) -> Iterator[Document]:
    """Yields a document for each line of a .jsonl file that is not blank: the text under the key `field`.

    Raises UserError if the file is damaged, or if none of its first records has the key.
    """
    found = False
    for number, (line, read) in enumerate(_lines(_blocks(open_file, name)), 1):
        if line is not None and not line.strip():
            continue
        text, dropped, keys = _parse(line, field)
        found = found or dropped != f"without {field}"
        if number == PROBED and not found:
            raise UserError(
                f"{name}: none of its first {PROBED} records has the field {field!r}; "
                f"the last has: {', '.join(keys[:20]) or 'none'}; pass --field=NAME"
            )
        yield Document(f"{name}:{number}", text, dropped, read)


def _parse(line: bytes | None, field: str) -> tuple[str | None, str, list[str]]:
    """Returns the text of a record, or None and why it has none; and the record's keys."""
    if line is None:
        return None, TOO_LONG, []
    try:
        record = json.loads(line.decode())
        keys = list(record) if isinstance(record, dict) else []
        text = record[field] if field in keys else None
        if not isinstance(text, str):
            return None, f"without {field}", keys
        if b"\\u" in line:
            text.encode()  # JSON can spell half of a surrogate pair
        return text, "", keys
    except UnicodeError:
        return None, "undecodable", []
    except (ValueError, RecursionError):
        return None, "not JSON", []


def _blocks(open_file: OpenFile, name: str) -> Iterator[tuple[bytes, int]]:
    """Yields the file's bytes in blocks, decompressed if its name ends in .gz or .zst; each with the bytes read by then."""
    if name.endswith(".gz"):
        return _decompress(_read(open_file), name, lambda: zlib.decompressobj(wbits=31), zlib.error)
    if name.endswith(".zst"):
        zstandard = require("zstandard", name)
        return _decompress(_read(open_file), name, lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)
    return _read(open_file)


def _read(open_file: OpenFile) -> Iterator[tuple[bytes, int]]:
    read = 0
    with open_file() as file:
        while block := file.read(BLOCK):
            read += len(block)
            yield block, read


def _decompress(blocks, name: str, new, error: type[Exception]) -> Iterator[tuple[bytes, int]]:
    """Decompresses blocks. new() returns a decompressor for one gzip member or zstd frame; a file may have several.

    Raises UserError if one is damaged or cut off.
    """
    member = None
    read = 0
    try:
        for block, read in blocks:
            while block:
                if member is None or member.eof:
                    member = new()
                yield member.decompress(block), read
                block = member.unused_data
    except error as e:
        raise UserError(f"{name}: damaged at about byte {read} ({e}); get the file again") from None
    if member and not member.eof:
        raise UserError(f"{name}: damaged: it is cut off after byte {read}; get the file again")


def _lines(blocks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes | None, int]]:
    """Yields lines without their ends; None in place of one longer than MAX_RECORD."""
    parts = []  # of the current line
    length = read = 0
    for block, read in blocks:
        for i, piece in enumerate(block.split(b"\n")):
            if i > 0:
                yield None if length > MAX_RECORD else b"".join(parts), read
                parts = []
                length = 0
            length += len(piece)
            parts = [] if length > MAX_RECORD else [*parts, piece]
    if length:
        yield None if length > MAX_RECORD else b"".join(parts), read


def require(package: str, name: str):
    """Imports a package of the extra [data]. Raises UserError, naming what needs it, if it is not installed."""
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise UserError(f"{name}: reading it needs {package}: pip install '.[data]'") from None
