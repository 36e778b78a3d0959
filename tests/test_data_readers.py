import gzip
import json
import sys

import pytest

from data import readers
from data.readers import read
from errors import UserError

TEXTS = ["first\ndocument", "", "you 你好 🙂 \0 \u2028 \r\n", " spaces  ", "last"]
LINES = b"".join(json.dumps({"text": text, "meta": {"n": i}}).encode() + b"\n" for i, text in enumerate(TEXTS))


def zstd(data):
    return pytest.importorskip("zstandard", reason="reads .zst files; an extra").ZstdCompressor().compress(data)


def write_parquet(path, texts, column="text", **options):
    pyarrow = pytest.importorskip("pyarrow", reason="reads .parquet files; an extra")
    from pyarrow import parquet

    table = pyarrow.table({column: pyarrow.array(texts, pyarrow.string()), "id": list(range(len(texts)))})
    parquet.write_table(table, path, **options)
    return path


def texts(path, **options):
    return [d.text for d in read(path, "text", **options)]


COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("block", [1, 7, 2**16])
def test_every_line_is_a_document_however_the_file_is_read(tmp_path, monkeypatch, suffix, block):
    monkeypatch.setattr(readers, "BLOCK", block)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    found = list(read(path, "text"))
    assert [d.text for d in found] == TEXTS
    assert [d.id for d in found] == [f"{path}:{i}" for i in range(1, 6)]
    assert [d.read for d in found] == sorted(d.read for d in found) and found[-1].read <= path.stat().st_size
    path.write_bytes(COMPRESS[suffix](LINES + b"\n  \n" + LINES.rstrip(b"\n")))
    assert texts(path) == TEXTS * 2


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_members_and_frames_follow_one_another(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES[:30]) + COMPRESS[suffix](LINES[30:]))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_named_and_never_taken_for_a_whole_one(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(path, TEXTS * 50)
    else:
        path.write_bytes(COMPRESS[suffix](LINES * 50))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        for i in range(4, 40):
            data[i] ^= 0xFF
        if suffix == ".parquet":
            data[-9] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(readers.Damaged, match="damaged") as e:
        list(read(path, "text"))
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_bad_lines_are_left_out_one_by_one_with_the_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        b"not json",
        b'{"text": "cut',
        b'{"other": 1}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "a\\udc00"}',
        b"[1]",
        b'"text"',
        b"[" * 5000,
    ]
    path.write_bytes(LINES + b"\n".join(bad) + b"\n" + LINES)
    found = list(read(path, "text"))
    assert [d.text for d in found if not d.dropped] == TEXTS * 2
    assert [d.dropped for d in found if d.dropped] == [
        "not JSON", "not JSON", "without text", "without text", "undecodable", "undecodable", "without text", "without text",
        "not JSON",
    ]  # fmt: skip
    assert all(d.text is None for d in found if d.dropped)
    assert [d.id for d in found if d.dropped] == [f"{path}:{i}" for i in range(6, 15)]


def test_another_field_and_one_that_no_record_has(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"content": "a", "url": "u"}\n' * 300)
    assert [d.text for d in read(path, "content")] == ["a"] * 300
    with pytest.raises(UserError, match="none of its first 100 records .* 'text'; they have: content, url; pass --field=NAME"):
        list(read(path, "text"))
    path.write_bytes(b'{"content": "a"}\n' * 99 + LINES)
    assert [d.dropped for d in read(path, "text")] == ["without text"] * 99 + [""] * 5


def test_the_beginning_of_a_longer_file_ends_before_its_half_line(tmp_path):
    path = tmp_path / "first 100 bytes"
    path.write_bytes(LINES[:-10])
    assert texts(path, name="http://host/a.jsonl", cut=True) == TEXTS[:-1]
    assert [d.dropped for d in read(path, "text", name="a.jsonl")][-1] == "not JSON"


@pytest.mark.parametrize("block", [7, 100, 2**16])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_record_that_would_fill_the_memory_is_left_out(tmp_path, monkeypatch, block, suffix):
    monkeypatch.setattr(readers, "BLOCK", block)
    monkeypatch.setattr(readers, "LONGEST", 100)
    path, rows = tmp_path / f"a{suffix}", ["a", "x" * 200, "b", "y" * 101, "z" * 5000, "c" * 80, "w" * 101]
    if suffix == ".parquet":
        write_parquet(path, rows)
    else:
        path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    found = list(read(path, "text"))
    assert [d.text for d in found] == ["a", None, "b", None, None, "c" * 80, None]
    assert {d.dropped for d in found if d.text is None} == {"longer than 32 MiB"}


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_parquet_gives_each_row_and_says_what_is_missing(tmp_path, groups):
    rows = [*TEXTS, None] * 100
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=groups)
    found = list(read(path, "text"))
    assert [d.text for d in found] == rows
    assert {d.dropped for d in found if d.text is None} == {"without text"}
    assert found[-1].read == path.stat().st_size and found[6].id == f"{path}:7"
    with pytest.raises(UserError, match="has no column 'body'; it has: text, id"):
        list(read(path, "body"))


@pytest.mark.parametrize("module, name", [("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")])
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"needs {module}: pip install '\.\[data\]'") as e:
        list(read(tmp_path / name, "text"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("unit", ["a line of text\n", "x", "é", "🙂", "\n", "你好\r\n"])
@pytest.mark.parametrize("size", [10, 999, 1000, 1001, 5000])
def test_a_long_text_is_cut_where_no_character_is_and_stays_whole(tmp_path, monkeypatch, unit, size):
    monkeypatch.setattr(readers, "LONG", 1000)
    whole = (unit * size)[:size] if unit.isascii() else unit * (size // len(unit.encode()))
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    found = list(read(path, "text"))
    assert "".join(d.text for d in found) == whole and not [d for d in found if d.dropped]
    assert max(len(d.text.encode()) for d in found) <= 1000 and len({d.id for d in found}) == len(found)
    assert all(d.text.endswith("\n") for d in found[:-1]) or "\n" not in unit
    assert found[-1].read == path.stat().st_size


def test_a_text_that_is_empty_or_not_utf8_is_a_document_without_text(tmp_path):
    for name, data, text, dropped in (("a", b"", "", ""), ("b", "é".encode("latin-1"), None, "undecodable")):
        (tmp_path / name).write_bytes(data)
        assert [(d.text, d.dropped) for d in read(tmp_path / name, "text")] == [(text, dropped)]
