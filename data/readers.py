"""Documents out of files: text, .jsonl (plain, .gz, .zst) and .parquet.

A damaged file is a UserError. A document that is damaged, or lacks its text, is handed on without it and with the reason.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from errors import UserError

LONG = 65536  # bytes; a longer file of plain text is cut into documents of about this length
BLOCK = 2**16  # bytes read at a time: memory stays small, also where they are compressed a thousandfold
LONGEST = 2**25  # bytes of a record; a longer one is left out, as its ids would fill the memory
TOO_LONG = f"longer than {LONGEST // 2**20} MiB"
FIRST = 100  # records: where none of so many has the field, it is the wrong field


class Damaged(UserError):
    """A file that is not what its writer wrote."""


class Document(NamedTuple):
    """id: stable, for messages; dropped: why there is no text; read: bytes of its file read by then, for an ETA."""

    id: str
    text: str | None
    dropped: str = ""
    read: int = 0


def read(path: Path, field: str, name: str | None = None, cut=False) -> Iterator[Document]:
    """The documents of one file. name: what its format is told by and what messages call it, where path is not that.

    field: the key or column that holds the text of a .jsonl or .parquet file.
    cut: the file is the beginning of a longer one, so that its last line may be half a line, and is left out.
    """
    name = name or str(path)
    if name.endswith(".parquet"):
        return _checked(_parquet(path, field, name), field, name)
    for suffix, blocks in FORMATS.items():
        if name.endswith(suffix):
            return _checked(_jsonl(_lines(blocks(path, name), cut), field, name), field, name)
    return plain(path)


def decoded(id: str, data: bytes, read: int = 0) -> Document:
    try:
        return Document(id, data.decode(), read=read)
    except UnicodeDecodeError:
        return Document(id, None, "undecodable", read)


def plain(path: Path) -> Iterator[Document]:
    """A file of text: one document, or several of about LONG bytes cut at line ends, so that a single file of any size
    still has parts to train on and parts to validate on.
    """
    with open(path, "rb") as file:
        data = file.read(LONG)
        yield from () if data else (Document(str(path), ""),)
        while data:
            rest = file.read(1)
            end = _boundary(data) if rest else len(data)
            yield decoded(f"{path}:{file.tell() - len(rest) - len(data)}", data[:end], file.tell())
            data = data[end:] + rest
            data += file.read(max(LONG - len(data), 0))


def _boundary(data: bytes) -> int:
    """Where to cut: after the last line end, else before the last character, half of which may be missing."""
    end = data.rfind(b"\n") + 1 or len(data)
    last = next((i for i in range(end - 1, max(end - 4, 0), -1) if data[i] & 0xC0 != 0x80), 0)  # the first byte of the last one
    return last if end == len(data) and last and data[last] >= 0xC0 else end


def _blocks(path: Path, name: str) -> Iterator[tuple[bytes, int]]:
    """Blocks of the file, and how many bytes of it were read by then."""
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block, file.tell()


def _decompressed(path: Path, name: str, new, errors) -> Iterator[tuple[bytes, int]]:
    """The same of what is compressed; new() decompresses one member or frame, and a file may have several.

    Raises UserError where one is damaged or cut: its beginning would pass for a whole file.
    """
    member, read = None, 0
    try:
        for block, read in _blocks(path, name):
            while block:
                member = new() if member is None or member.eof else member
                yield member.decompress(block), read
                block = member.unused_data
        if member and not member.eof:
            raise EOFError("it ends too soon")
    except errors as e:
        raise Damaged(f"{name}: damaged at about byte {read} ({e}); get the file again") from None


def _gzip(path, name):
    return _decompressed(path, name, lambda: zlib.decompressobj(wbits=31), (zlib.error, EOFError))


def _zstd(path, name):
    zstandard = _extra("zstandard", name)
    return _decompressed(path, name, lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError, EOFError))


FORMATS = {".jsonl": _blocks, ".jsonl.gz": _gzip, ".jsonl.zst": _zstd}
SUFFIXES = (*FORMATS, ".parquet")


def _lines(blocks: Iterable[tuple[bytes, int]], cut: bool) -> Iterator[tuple[bytes | None, int]]:
    """Lines without their ends; None in place of one that is longer than LONGEST."""
    rest, long, read = [], 0, 0  # the line begun so far, and its bytes
    for block, read in blocks:
        for i, line in enumerate(block.split(b"\n")):
            if i > 0:
                yield None if long > LONGEST else b"".join(rest), read
                rest, long = [], 0
            long += len(line)
            rest = [] if long > LONGEST else [*rest, line]
    if long and not cut:
        yield None if long > LONGEST else b"".join(rest), read


def _jsonl(lines: Iterable[tuple[bytes | None, int]], field: str, name: str) -> Iterator[tuple[Document, list]]:
    """A document for each line that is not empty, and the keys of its record."""
    for number, (line, read) in enumerate(lines, 1):
        if line is not None and not line.strip():
            continue
        text, dropped, keys = None, "", []
        try:
            record = {} if line is None else json.loads(line.decode())
            keys, text = (list(record), record.get(field)) if isinstance(record, dict) else ([], None)
            dropped = TOO_LONG if line is None else "" if isinstance(text, str) else f"without {field}"
            if not dropped and b"\\u" in line:
                text.encode()  # JSON can write half of a surrogate pair
        except UnicodeError:
            dropped = "undecodable"
        except (ValueError, RecursionError):
            dropped = "not JSON"
        yield Document(f"{name}:{number}", None if dropped else text, dropped, read), keys


def _parquet(path: Path, field: str, name: str) -> Iterator[tuple[Document, list]]:
    pyarrow = _extra("pyarrow", name)
    parquet = _extra("pyarrow.parquet", name)
    try:
        with parquet.ParquetFile(path, buffer_size=BLOCK, pre_buffer=False) as file:
            names, rows, size = file.schema_arrow.names, max(file.metadata.num_rows, 1), path.stat().st_size
            number = 0
            if field not in names:
                raise UserError(f"{name}: has no column {field!r}; it has: {', '.join(names)}; pass --field=NAME")
            for batch in file.iter_batches(batch_size=64, columns=[field]):
                for cell in batch.column(0).cast(pyarrow.large_binary()):
                    number, data = number + 1, cell.as_py()
                    document = decoded(f"{name}:{number}", data or b"", size * number // rows)
                    dropped = f"without {field}" if data is None else TOO_LONG if len(data) > LONGEST else ""
                    yield document._replace(text=None, dropped=dropped) if dropped else document, names
    except (pyarrow.ArrowException, OSError) as e:
        raise Damaged(f"{name}: damaged ({str(e).splitlines()[0]}); get the file again") from None


def _checked(documents: Iterator[tuple[Document, list]], field: str, name: str) -> Iterator[Document]:
    """The documents. Raises UserError where none of the first has its text: the field has another name there."""
    held, seen = [], set()
    for document, keys in documents:
        if held is not None:
            held.append(document)
            seen.update(keys)
            if document.dropped == f"without {field}" and len(held) < FIRST:
                continue
            if all(d.dropped == f"without {field}" for d in held):
                raise UserError(
                    f"{name}: none of its first {len(held)} records has the field {field!r}; "
                    f"they have: {', '.join(sorted(seen)[:20]) or 'none'}; pass --field=NAME"
                )
            yield from held
            held = None
        else:
            yield document
    yield from held or ()


def _extra(module: str, name: str):
    try:
        return __import__(module, fromlist=["_"])
    except ModuleNotFoundError:
        extra = module.split(".")[0]
        raise UserError(f"{name}: reading it needs {extra}: pip install '.[data]'") from None
