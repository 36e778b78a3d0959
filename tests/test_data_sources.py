import gzip
import hashlib
import itertools
import json
import shutil
from collections import namedtuple

import pytest

from data import download, sources
from data.meta import load_meta
from data.prepare import prepare
from errors import UserError
from tests.server import Server, cut, instead, status
from tests.test_data_prepare import documents, texts
from tests.test_data_readers import write_parquet, zstd


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with Server({}) as server:
        yield server


def lines(name, n=40, words=20):
    """A file of RedPajama: text, and meta as an object, as a string, or not at all."""
    texts = [f"{name} {i} " + " ".join(f"word{i * j % 97}" for j in range(words)) for i in range(n)]
    metas = [{"meta": {"url": "u", "language": "en"}}, {"meta": "{'timestamp': ''}"}, {}]
    return texts, "".join(json.dumps({"text": t} | metas[i % 3]) + "\n" for i, t in enumerate(texts)).encode()


@pytest.fixture
def sample(server, monkeypatch):
    """The 11 files of RedPajama's sample, small, where its URLs lead here; their texts."""
    monkeypatch.setitem(sources.CORPORA, "redpajama-sample", [
        server.url(url.removeprefix("https://huggingface.co")) for url in sources.CORPORA["redpajama-sample"]
    ])  # fmt: skip
    found = []
    for url in sources.CORPORA["redpajama-sample"]:
        path = url.removeprefix(server.url(""))
        texts, data = lines(path.split("/")[-1])
        # Large files of Hugging Face are elsewhere; the redirect says how large they are and their hash.
        server.redirects[path] = (302, server.url("/storage" + path), {"X-Linked-Size": len(data)})
        server.files["/storage" + path] = data
        found += texts
    return found


def command(name, tmp_path, *options):
    return [name, f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}", "--val_fraction=0.2", *options]


def test_redpajama_sample_is_its_eleven_files(tmp_path, server, sample, capsys):
    assert len(sources.CORPORA["redpajama-sample"]) == 11 == len(set(sources.CORPORA["redpajama-sample"]))
    out = prepare(command("redpajama-sample", tmp_path))
    found = documents(out)
    assert sorted(found["train"] + found["val"]) == sorted(sample)
    size = sum(len(data) for path, data in server.files.items()) / 1e9
    said = capsys.readouterr().out
    assert f"redpajama-sample: 11 files of {size:,.2f} GB; {size:,.2f} GB to download to {tmp_path / 'cache'}" in said
    assert load_meta(out)["dropped"] == {"empty": 0, "undecodable": 0}


def test_what_is_in_the_cache_needs_no_network(tmp_path, server, sample):
    first = prepare(command("redpajama-sample", tmp_path))
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    shutil.rmtree(first)
    server.asked.clear()
    prepare(command("redpajama-sample", tmp_path))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == before and server.asked == []


def test_without_a_network_it_is_one_line_and_the_cache_stays(tmp_path, server, sample):
    path = "/storage/datasets/togethercomputer/RedPajama-Data-1T-Sample/resolve/main/c4_sample.jsonl"
    server.faults[path] = [cut(1000), *[status(503)] * 20]
    with pytest.raises(UserError, match="c4_sample.jsonl: 503.*at 5 tries in a row; run the same command again") as e:
        prepare(command("redpajama-sample", tmp_path))
    assert "\n" not in str(e.value) and not (tmp_path / "out/train.bin").exists()
    kept = {p.name.split("-", 1)[1]: p.stat().st_size for p in (tmp_path / "cache").iterdir()}
    assert kept["arxiv_sample.jsonl"] == len(server.files[path.replace("c4", "arxiv")])
    assert kept["c4_sample.jsonl.part"] == 1000
    server.faults.clear()
    out = prepare(command("redpajama-sample", tmp_path))
    assert sorted(sum(documents(out).values(), [])) == sorted(sample)


def test_a_server_that_is_not_there_is_one_line(tmp_path, sample, server):
    server.__exit__()
    with pytest.raises(UserError, match="arxiv_sample.jsonl: .*refused.*at 5 tries in a row") as e:
        prepare(command("redpajama-sample", tmp_path))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    server.__enter__()


def listed(tmp_path, *urls):
    path = tmp_path / "urls.txt"
    path.write_text("\n".join(urls) + "\n\n")
    return f"--urls={path}"


@pytest.fixture
def redpajama(server):
    """Two files of each source in its own format, and two much longer ones; the URL of their list."""
    pytest.importorskip("zstandard", reason="reads .zst files; an extra")
    for source in ("arxiv", "github", "stackexchange", "wikipedia"):
        for i in range(2):
            server.files[f"/v1/{source}/{source}_{i}.jsonl"] = lines(f"{source}{i}", 100)[1]
    for i in range(4):
        server.files[f"/v1/common_crawl/2019-30/en_head_{i:04}.jsonl.zst"] = zstd(lines(f"crawl{i}", 1500)[1])
        server.files[f"/v1/c4/c4-train.{i}.jsonl"] = lines(f"c4{i}", 3000)[1]
    server.files["/v1/urls.txt"] = "\n".join(server.url(p) for p in server.files).encode()
    return server.url("/v1/urls.txt")


def by_source(out):
    found = {}
    for text in sum(documents(out).values(), []):
        name = text.split()[0].rstrip("0123456789") if not text.startswith("c4") else "c4"
        found.setdefault(name, []).append(len(text.encode()) + 1)
    return {name: sum(sizes) for name, sizes in found.items()}


def test_redpajama_gives_each_source_its_share_of_the_tokens(tmp_path, server, redpajama, monkeypatch):
    monkeypatch.setattr("data.encode.BATCH", 2000)
    argv = command("redpajama", tmp_path, f"--urls={redpajama}", "--tokens=4e5")
    out = prepare(argv)
    tokens = by_source(out)
    total = sum(sources.SHARES.values())
    for source, name in (("c4", "c4"), ("github", "github"), ("common_crawl", "crawl")):
        wanted = 4e5 * sources.SHARES[source] / total
        assert wanted - 2500 <= tokens[name] <= wanted + 2500, (source, tokens[name], wanted)
    asked = {a.path for a in server.asked if a.method == "GET"}
    assert 1 <= sum("/c4/" in path for path in asked) <= 2 and not [path for path in asked if "book" in path]


def test_of_a_file_much_longer_than_needed_only_the_beginning_is_downloaded(tmp_path, server, redpajama):
    parts = sources.corpus("redpajama", tmp_path, tmp_path, 20_000, redpajama, {"c4": 1})
    limit = parts[0].size
    assert limit < len(server.files["/v1/c4/c4-train.0.jsonl"]) / 2
    found = texts(parts[:1])
    path = parts[0].name.removeprefix(server.url(""))
    assert server.gets(path) == [f"bytes=0-{limit - 1}"]
    assert found == [json.loads(line)["text"] for line in server.files[path][:limit].split(b"\n")[:-1]]


def test_shares_leave_sources_out_and_what_a_list_lacks_is_said(tmp_path, redpajama):
    argv = command("redpajama", tmp_path, f"--urls={redpajama}", "--tokens=3e4", "--share=common_crawl=0", "--share=c4=28")
    tokens = by_source(prepare(argv))
    assert "crawl" not in tokens and tokens["arxiv"] > 1000
    for wrong, message in (
        (["--share=book=1"], "no file of 'book' among .* URLs; pass --share book=0"),
        (["--share=books=1"], "--share"),
        (["--share=c4=-1"], "--share"),
        (["--tokens=0"], "--tokens=0"),
        (["--tokens=-5"], "--tokens=-5"),
        ([f"--share={name}=0" for name in sources.SHARES], "every source has weight 0"),
    ):
        with pytest.raises(UserError, match=message) as e:
            prepare([*argv[:1], f"--out={tmp_path / 'other'}", f"--cache={tmp_path / 'cache'}", f"--urls={redpajama}", *wrong])
        assert "\n" not in str(e.value) and not (tmp_path / "other").exists()


def test_files_that_hold_too_few_tokens_are_followed_by_others_and_a_shortage_is_said(tmp_path, redpajama, monkeypatch, capsys):
    monkeypatch.setitem(sources.BYTES_PER_TOKEN, ".zst", 0.001)  # far too little: one file is thought to be enough
    shares = [f"--share={name}={int(name == 'common_crawl')}" for name in sources.SHARES]
    one = len(lines("crawl0", 1500)[1])
    tokens = by_source(prepare(command("redpajama", tmp_path, f"--urls={redpajama}", f"--tokens={2 * one}", *shares)))
    assert tokens["crawl"] > 1.5 * one
    capsys.readouterr()
    prepare(command("redpajama", tmp_path / "all", f"--urls={redpajama}", "--tokens=1e9", *shares))
    assert "note: common_crawl has " in capsys.readouterr().out


def test_fineweb_edu_is_parquet_by_url(tmp_path, server):
    assert len(sources.CORPORA["fineweb-edu"]) == 14 and sources.CORPORA["fineweb-edu"][13].endswith("/013_00000.parquet")
    rows = [f"row {i} of the web 🙂" for i in range(100)]
    for i in range(2):
        server.files[f"/{i:03}_00000.parquet"] = write_parquet(tmp_path / "rows", rows[i::2]).read_bytes()
    out = prepare(command("fineweb-edu", tmp_path, listed(tmp_path, *map(server.url, server.files))))
    assert sorted(sum(documents(out).values(), [])) == sorted(rows)


BAD = {
    "a short file": (lambda s, p: s.faults.update({p: itertools.repeat(instead(s.files[p][:500]))}), "500 bytes, expected"),
    "another file": (lambda s, p: s.faults.update({p: itertools.repeat(instead(b"x" * len(s.files[p])))}), "sha256"),
    "a broken gzip": (lambda s, p: s.files.update({p: s.files[p][:500]}), "a.jsonl.gz: damaged at about byte 500"),
    "an empty file": (lambda s, p: s.files.update({p: b""}), "no documents"),
    "no such file": (lambda s, p: s.files.pop(p), "404"),
    "no such field": (lambda s, p: s.files.update({p: gzip.compress(b'{"a": 1}\n' * 200)}), "pass --field=NAME"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_corpus_that_misbehaves_is_one_line_and_leaves_no_bin(tmp_path, server, bad):
    act, message = BAD[bad]
    path = "/files/a.jsonl.gz"
    server.files[path] = gzip.compress(lines("a", 500)[1])
    sha = hashlib.sha256(server.files[path]).hexdigest() if bad == "another file" else ""
    if bad in ("a short file", "another file"):
        server.redirects["/a.jsonl.gz"] = (302, path, {"X-Linked-Size": len(server.files[path]), "X-Linked-ETag": f'"{sha}"'})
        url = server.url("/a.jsonl.gz")
    else:
        url = server.url(path)
    act(server, path)
    with pytest.raises(UserError, match=message) as e:
        prepare(command("fineweb-edu", tmp_path, listed(tmp_path, url)))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    kept = [p for p in tmp_path.glob("cache/*") if p.suffix == ".gz"]
    assert len(kept) == (bad in ("an empty file", "no such field"))  # which are what the server has


def test_a_list_that_is_none_is_refused(tmp_path):
    for content, message in (
        ("", "has no URLs"),
        ("a.jsonl\n", "'a.jsonl' is no URL"),
        ("http://h/a.zip\n", "is no URL of a .jsonl"),
    ):
        path = tmp_path / "urls.txt"
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            prepare(command("fineweb-edu", tmp_path, f"--urls={path}"))
    with pytest.raises(UserError, match="no such file"):
        prepare(command("fineweb-edu", tmp_path, "--urls=nowhere.txt"))


def test_a_disk_too_small_is_said_before_anything_is_downloaded(tmp_path, server, sample, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5, 5))
    with pytest.raises(UserError, match="0.0 GB free, but about .* GB are needed; pass --cache"):
        prepare(command("redpajama-sample", tmp_path))
    assert not [a for a in server.asked if a.method == "GET"]
