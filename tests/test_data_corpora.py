"""Corpora through `datasets`: files on this machine, and a web server on the loopback. The hub itself is not asked."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from config import ROOT
from data import documents as reading
from data import sources
from data.meta import load_meta
from data.prepare import prepare
from errors import UserError
from tests.server import Server, cut, hub
from tests.test_data_documents import LINES, TEXTS, zstd
from tests.test_data_prepare import KILLED, documents

pytest.importorskip("datasets", reason="datasets is not installed: public corpora need it")


def write_parquet(path, texts, column="text", **options):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({column: pyarrow.array(texts, pyarrow.string()), "id": list(range(len(texts)))})
    parquet.write_table(table, path, **options)
    return str(path)


def all_texts(out):
    return sorted(sum(documents(out).values(), []))


def read(path, state=None, field="text"):
    (part,) = sources.hf([str(path)], field=field)
    return [document for document, _ in part.read(state)]


@pytest.mark.parametrize("groups", [1, 3, 1000])
def test_parquet_gives_each_row_and_reports_what_is_missing(tmp_path, groups):
    rows = [*TEXTS, None] * 100
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=groups)
    found = read(path)
    assert [d.text for d in found] == rows
    assert {d.dropped for d in found if d.text is None} == {"without text"}
    assert found[6].id == f"{path}:7"
    with pytest.raises(UserError, match="has no column 'body'; it has: text, id; pass --field=NAME"):
        read(path, field="body")
    with pytest.raises(UserError, match="column 'id' is int64, not text"):
        read(path, field="id")


def test_a_record_of_parquet_that_is_too_long_or_not_utf8_is_left_out_alone(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(reading, "MAX_RECORD", 100)
    rows = [b"a", b"x" * 101, b"b", b"\xff", b"c"]
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.binary()).view(pyarrow.string())})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert [d.text for d in found] == ["a", None, "b", None, "c"]
    assert [d.dropped for d in found if d.text is None] == ["longer than 32 MiB", "undecodable"]


@pytest.mark.parametrize("groups", [7, 100, 1000])
def test_reading_resumes_at_each_state_again_and_again(tmp_path, groups):
    """Resuming from a state that was itself reached by resuming, too: older versions of `datasets` restarted there."""
    rows = [f"row {i}" for i in range(500)]
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=groups)
    (part,) = sources.hf([path])
    whole = [document for document, _ in part.read(None)]
    assert [d.text for d in whole] == rows
    at, state = 0, None
    while at < len(rows):
        found = list(part.read(state))
        assert [document for document, _ in found] == whole[at:]
        at, state = at + len(found[:61]), json.loads(json.dumps(found[:61][-1][1]))


def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS * 50)
    data = open(path, "rb").read()
    for damaged in (data[: len(data) // 2], b"x" * 300, b"", data[:20] + b"\xff" * 60 + data[80:]):
        open(path, "wb").write(damaged)
        with pytest.raises(UserError, match="a.parquet: .*; fix this, then run") as e:
            read(path)
        assert "\n" not in str(e.value)


def test_any_mixture_of_files_is_one_dataset(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(LINES))
    (tmp_path / "c.json").write_text(json.dumps([{"text": f"json {i}"} for i in range(20)]))
    (tmp_path / "d.csv").write_text("text,n\n" + "".join(f"csv {i},{i}\n" for i in range(20)))
    (tmp_path / "e.txt.zst").write_bytes(zstd(b"plain text"))
    write_parquet(tmp_path / "f.parquet", [f"parquet {i}" for i in range(20)])
    paths = sorted(map(str, tmp_path.iterdir()))
    kept = [text for text in TEXTS if text] * 2
    tables = [f"{kind} {i}" for kind in ("json", "csv", "parquet") for i in range(20)]
    out = prepare(["hf", *paths, "--val_fraction=0.2", "--out", str(tmp_path / "out")])
    assert all_texts(out) == sorted([*kept, *tables, "plain text"])
    text = [path for path in paths if not path.endswith(("json", "csv"))]
    out = prepare(["text", *text, "--val_fraction=0.2", f"--out={tmp_path / 'text'}"])
    assert all_texts(out) == sorted([*kept, *tables[-20:], "plain text"])


def test_a_local_dataset_is_read_by_its_folder_and_configuration(tmp_path):
    """A repository of the hub, as it would be laid out there, with two configurations."""
    for name in ("one", "two"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(2):
            write_parquet(tmp_path / f"set/{name}/train-{i}.parquet", [f"{name} {i} {j}" for j in range(30)])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("one", "two"))
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    argv = ["hf", str(tmp_path / "set"), "--val_fraction=0.2"]
    out = prepare([*argv, "--name=two", f"--out={tmp_path / 'out'}"])
    assert all_texts(out) == sorted(f"two {i} {j}" for i in range(2) for j in range(30))
    with pytest.raises(UserError, match="Config name is missing|one.*two"):
        prepare([*argv, f"--out={tmp_path / 'none'}"])


def test_reading_ends_after_tokens_and_a_shortage_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.encode.BATCH", 1000)
    path = write_parquet(tmp_path / "a.parquet", [f"{i} " + "x" * 98 for i in range(500)])
    out = prepare(["hf", path, "--tokens=1e4", "--val_fraction=0.2", f"--out={tmp_path / 'out'}"])
    assert 1e4 <= sum(split["tokens"] for split in load_meta(out)["splits"].values()) < 1.2e4
    prepare(["hf", path, "--tokens=1e6", "--val_fraction=0.2", f"--out={tmp_path / 'more'}"])
    assert "tokens of the 1,000,000 asked for" in capsys.readouterr().out


def test_a_corpus_killed_repeatedly_gives_the_bytes_of_an_uninterrupted_one(tmp_path):
    paths = [write_parquet(tmp_path / f"{n}.parquet", [f"{n} {i} 🙂" * (i % 50) for i in range(400)]) for n in "ab"]
    (tmp_path / "c.jsonl.zst").write_bytes(zstd(LINES * 300))
    argv = ["hf", *paths, str(tmp_path / "c.jsonl.zst"), "--val_fraction=0.2"]
    whole = prepare([*argv, f"--out={tmp_path / 'whole'}"])
    for left in (3, 1, 4):
        command = [sys.executable, "-c", KILLED, str(left), *argv, f"--out={tmp_path / 'killed'}", "--processes=1"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed/train.bin").exists()
    killed = prepare([*argv, f"--out={tmp_path / 'killed'}"])
    assert {p.name: p.read_bytes() for p in killed.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def run_with_hub(server, tmp_path, *argv):
    environment = os.environ | {"HF_ENDPOINT": server.url(""), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "data.prepare", *argv, "--val_fraction=0.2", "--processes=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done


def test_a_dataset_is_read_from_a_hub_by_its_name(tmp_path):
    rows = [[f"part {i} row {j} 🙂" for j in range(100)] for i in range(2)]
    files = {f"sample/{i}.parquet": open(write_parquet(tmp_path / "rows", rows[i]), "rb").read() for i in range(2)}
    files["README.md"] = b"---\nconfigs:\n- config_name: sample-10BT\n  data_files: sample/*\n---\n"
    with hub("HuggingFaceFW/fineweb-edu", files) as server:
        run_with_hub(server, tmp_path, "fineweb-edu", f"--out={tmp_path / 'out'}")
    assert all_texts(tmp_path / "out") == sorted(sum(rows, []))


def test_files_are_read_from_a_hub(tmp_path):
    files = {f"{name}_sample.jsonl": lines(name) for name in sources.RED_PAJAMA_SAMPLES}
    assert len(files) == 11
    with hub("togethercomputer/RedPajama-Data-1T-Sample", files) as server:
        run_with_hub(server, tmp_path, "redpajama-sample", f"--out={tmp_path / 'out'}")
    texts = [json.loads(line)["text"] for data in files.values() for line in data.splitlines()]
    assert all_texts(tmp_path / "out") == sorted(texts)


def test_an_unreachable_hub_is_reported_in_one_line(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    for source in ("fineweb-edu", "redpajama-sample"):
        command = [sys.executable, "-m", "data.prepare", source, f"--out={tmp_path / 'out'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert "run the same command again to resume" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["hf", "text"])
def test_without_datasets_the_extra_is_named_and_plain_files_need_none(tmp_path, monkeypatch, source):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    (tmp_path / "b.jsonl").write_bytes(LINES * 10)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"a.parquet: reading it needs datasets, which .*: pip install '\.\[data\]'"):
        prepare([source, path, f"--out={tmp_path / 'out'}"])
    prepare([source, str(tmp_path / "b.jsonl"), "--val_fraction=0.2", f"--out={tmp_path / 'out'}"])


def test_names_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    for argv, message in (
        (["hf", str(tmp_path / "b.jsonl")], "b.jsonl: no such file"),
        (["hf", str(tmp_path / "a.zip")], "a.zip: expected one dataset of the hub, or names that end in .jsonl"),
        (["hf", "http://host/a"], "http://host/a: expected one dataset of the hub, or names that end in .jsonl"),
        (["hf", "a/b", "c/d"], "a/b: expected one dataset of the hub, or names that end in .jsonl"),
        (["hf", str(tmp_path / "a.jsonl"), "--name=x"], "--name: .*a.jsonl is a file"),
        (["redpajama"], "--tokens=0: all of RedPajama is 2.7 TB"),
        (["redpajama", "--tokens=-5"], "--tokens"),
        (["redpajama", "--tokens=1", "--urls=nowhere.txt"], "nowhere.txt"),
    ):
        with pytest.raises((UserError, OSError), match=message) as e:
            prepare([*argv, f"--out={tmp_path / 'out'}"])
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def lines(name, n=40, words=20):
    """The records of a file of RedPajama: text, and meta as an object, as a string, or not at all."""
    texts = [f"{name} {i} " + " ".join(f"word{i * j % 97}" for j in range(words)) for i in range(n)]
    metas = [{"meta": {"url": "u", "language": "en"}}, {"meta": "{'timestamp': ''}"}, {}]
    return "".join(json.dumps({"text": t} | metas[i % 3]) + "\n" for i, t in enumerate(texts)).encode()


@pytest.fixture
def redpajama(tmp_path):
    """Two files of each source in its own format, four of the two large ones; the file that lists them."""
    paths = []
    for source in sources.SHARES:
        for i in range(4 if source in ("c4", "common_crawl") else 2):
            data = lines(f"{source}{i}", 1500 if source == "common_crawl" else 600)
            path = tmp_path / "v1" / source / (f"{i}.jsonl.zst" if source == "common_crawl" else f"{i}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(zstd(data) if source == "common_crawl" else data)
            paths.append(str(path))
    listing = tmp_path / "urls.txt"
    listing.write_text("\n".join(paths) + "\n\n")
    return f"--urls={listing}"


def by_source(out):
    found = {}
    for text in all_texts(out):
        name = text.split()[0][:-1]
        found[name] = found.get(name, 0) + len(text.encode()) + 1
    return found


def test_redpajama_gives_each_source_its_share_of_the_tokens(tmp_path, redpajama, monkeypatch):
    monkeypatch.setattr("data.encode.BATCH", 2000)
    tokens = by_source(prepare(["redpajama", redpajama, "--tokens=4e5", "--val_fraction=0.2", f"--out={tmp_path / 'out'}"]))
    for source, weight in sources.SHARES.items():
        wanted = 4e5 * weight / sum(sources.SHARES.values())
        assert wanted - 2500 <= tokens.get(source, 0) <= wanted + 2500, source
    (tmp_path / "none.txt").write_text("http://host/v1/c4/0.jsonl\n")
    with pytest.raises(UserError, match="none.txt: no file of 'common_crawl' among 1 URLs"):
        prepare(["redpajama", f"--urls={tmp_path / 'none.txt'}", "--tokens=3e4", f"--out={tmp_path / 'none'}"])


@pytest.fixture
def server(monkeypatch, tmp_path):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: `datasets` opens http URLs with it")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    import datasets

    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0.01)
    with Server({}) as server:
        yield server


def test_files_are_read_by_url(tmp_path, server):
    rows = [f"row {i} of the web 🙂" for i in range(100)]
    server.files["/a.jsonl.zst"] = zstd(LINES)
    server.files["/b.parquet"] = open(write_parquet(tmp_path / "rows", rows), "rb").read()
    server.files["/c.txt"] = b"plain text"
    server.files["/bad.jsonl"] = b'not json\n{"text": "good"}\n'
    urls = list(map(server.url, server.files))
    out = prepare(["hf", *urls, "--val_fraction=0.2", f"--out={tmp_path / 'out'}"])
    assert all_texts(out) == sorted([*rows, *filter(None, TEXTS), "plain text", "good"])
    assert load_meta(out)["dropped"] == {"empty": 1, "undecodable": 0, "not JSON": 1}


def test_a_connection_that_is_cut_is_tried_again(tmp_path, server):
    server.files["/a.jsonl"] = lines("a", 3000)
    server.faults["/a.jsonl"] = [cut(100_000)]
    out = prepare(["hf", server.url("/a.jsonl"), "--val_fraction=0.2", f"--out={tmp_path / 'out'}"])
    assert sum(split["docs"] for split in load_meta(out)["splits"].values()) == 3000


def test_a_misbehaving_server_is_reported_in_one_line_and_leaves_no_bin(tmp_path, server):
    server.files["/a.jsonl.gz"] = gzip.compress(lines("a", 500))[:500]
    server.files["/empty.jsonl"] = b""
    server.files["/field.jsonl"] = b'{"a": 1}\n' * 200
    for path, message in (
        ("/a.jsonl.gz", "a.jsonl.gz: EOFError: Compressed file ended before the end-of-stream marker"),
        ("/empty.jsonl", "found 0 documents"),
        ("/field.jsonl", "pass --field=NAME"),
        ("/missing.jsonl", "missing.jsonl: FileNotFoundError"),
        ("/missing.parquet", "missing.parquet: FileNotFoundError"),
    ):
        with pytest.raises(UserError, match=message) as e:
            prepare(["hf", server.url(path), f"--out={tmp_path / 'out'}"])
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    server.http.server_close()
    with pytest.raises(UserError, match="run the same command again to resume"):
        prepare(["hf", server.url("/empty.jsonl"), f"--out={tmp_path / 'out'}"])
