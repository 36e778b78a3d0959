import gzip
import json
import sys

import pytest

from data import documents
from data.documents import json_lines, plain_text
from errors import UserError

TEXTS = ["first\ndocument", "", "you 你好 🙂 \0 \u2028 \r\n", " spaces  ", "last"]
LINES = b"".join(json.dumps({"text": text, "meta": {"n": i}}).encode() + b"\n" for i, text in enumerate(TEXTS))


def zstd(data):
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed: .zst files need it").compress(
        data, "zstd", asbytes=True
    )


def read(path, field="text"):
    return list(json_lines(str(path), field))


def read_text(path):
    return list(plain_text(str(path)))


def texts(path):
    return [d.text for d in read(path)]


COMPRESS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_line_is_a_document(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    found = read(path)
    assert [d.text for d in found] == TEXTS
    assert [d.id for d in found] == [f"{path}:{i}" for i in range(1, 6)]
    path.write_bytes(COMPRESS[suffix](LINES + b"\n  \n" + LINES.rstrip(b"\n")))
    assert texts(path) == TEXTS * 2


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES)
    assert texts(path) == TEXTS
    for text in ("", "x", "text\n" * 20_000):
        path.write_text(text, encoding="utf-8-sig", newline="")
        assert "".join(d.text for d in read_text(path)) == text


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_members_and_frames_follow_one_another(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES[:30]) + COMPRESS[suffix](LINES[30:]))
    assert texts(path) == TEXTS


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".txt.gz", ".txt.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_named_and_never_taken_for_a_whole_one(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    data = bytearray(COMPRESS[suffix.replace("txt", "jsonl")](LINES * 50))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        for i in range(4, 40):
            data[i] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="end-of-stream|zlib|decompress|Truncated") as e:
        read_text(path) if "txt" in suffix else read(path)
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
    found = read(path)
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
    with pytest.raises(UserError, match="none of its first 100 records has the field 'text': .*content.*; pass --field=NAME"):
        read(path)
    path.write_bytes(b'{"content": "a"}\n\n' * 300)
    with pytest.raises(UserError, match="none of its first 100 records"):
        read(path)
    path.write_bytes(b'{"content": "a"}\n' * 99 + LINES)
    assert [d.dropped for d in read(path)] == ["without text"] * 99 + [""] * 5


def test_a_record_that_would_fill_the_memory_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD", 100)
    path = tmp_path / "a.jsonl"
    rows = ["a", "x" * 200, "b", "y" * 101, "z" * 5000, "c" * 80, "w" * 101]
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows))
    found = read(path)
    assert [d.text for d in found] == ["a", None, "b", None, None, "c" * 80, None]
    assert {d.dropped for d in found if d.text is None} == {"longer than 32 MiB"}


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"needs pyarrow, which is not installed: pip install '\.\[data\]'") as e:
        read(tmp_path / "a.jsonl.zst")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_cut_like_the_text_itself(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "LONG", 1000)
    whole = "a line of text, \u4f60\u597d\r\n" * 400
    (tmp_path / "a.txt").write_bytes(whole.encode())
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[f".jsonl{suffix}"](whole.encode()))
    found = [d.text for d in read_text(tmp_path / "a.txt")]
    assert found == [d.text for d in read_text(tmp_path / f"a.txt{suffix}")] and "".join(found) == whole and len(found) > 8


@pytest.mark.parametrize("unit", ["a line of text\n", "x", "é", "🙂", "\n", "你好\r\n"])
@pytest.mark.parametrize("size", [10, 999, 1000, 1001, 5000])
def test_a_long_text_is_cut_where_no_character_is_and_stays_whole(tmp_path, monkeypatch, unit, size):
    monkeypatch.setattr(documents, "LONG", 1000)
    whole = (unit * size)[:size] if unit.isascii() else unit * (size // len(unit.encode()))
    path = tmp_path / "a.txt"
    path.write_bytes(whole.encode())
    found = read_text(path)
    assert "".join(d.text for d in found) == whole and not [d for d in found if d.dropped]
    assert max(len(d.text.encode()) for d in found) <= 1000 and len({d.id for d in found}) == len(found)
    assert all(d.text.endswith("\n") for d in found[:-1]) or "\n" not in unit


def test_a_text_that_is_empty_or_not_utf8_is_a_document_without_text(tmp_path):
    for name, data, text, dropped in (("a", b"", "", ""), ("b", "é".encode("latin-1"), None, "undecodable")):
        (tmp_path / name).write_bytes(data)
        assert [(d.text, d.dropped) for d in read_text(tmp_path / name)] == [(text, dropped)]
