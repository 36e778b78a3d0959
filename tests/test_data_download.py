import errno
import fcntl
import hashlib
import io
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from data import download
from data.download import Remote, fetch, look, missing
from data.prepare import ROOT
from errors import UserError
from tests.server import (
    Server,
    blind_to_if_range,
    change,
    cut,
    etag,
    hang,
    instead,
    pause,
    reset,
    slowly,
    status,
    without_ranges,
)

N = 1_000_000
DATA = random.Random(0).randbytes(N)
OTHER = random.Random(1).randbytes(N)
SHA = hashlib.sha256(DATA).hexdigest()
PATH = "/files/a.jsonl.gz"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Waits of milliseconds, and no proxy between this machine and itself."""
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server():
    with Server({PATH: DATA}) as server:
        yield server


@pytest.fixture
def remote(server):
    return Remote(server.url(PATH), N, SHA)


@pytest.fixture
def waits(monkeypatch):
    """The seconds slept, in order, without sleeping them."""
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    return waits


def names(cache):
    return sorted(p.name.split("-", 1)[-1] for p in cache.iterdir()) if cache.exists() else []


def refused(*args, **kwargs) -> str:
    """What fetch says of what cannot be had."""
    with pytest.raises(UserError) as e:
        fetch(*args, **kwargs)
    assert "\n" not in str(e.value) and "\n" not in repr(e.value.args)
    assert str(e.value).startswith(args[0].url)
    return str(e.value)


def in_another_process(remote, cache):
    code = f"from data import download as d; from pathlib import Path; d.fetch(d.{remote!r}, Path({str(cache)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)


def leave(remote, cache, data, version=DATA):
    """A .part of these bytes, as a process leaves it that was killed while it downloaded that version of the file."""
    cache.mkdir(exist_ok=True)
    part, note = download._beside(download._place(remote, cache, None).path)
    part.write_bytes(data)
    note.write_text(etag(version))


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def unannounced(data):
    """A body that ends with the connection."""

    def act(h):
        have = int((h.headers["Range"] or "bytes=0-")[6:-1])
        h.head(206 if have else 200, {"ETag": etag(DATA)} | ({"Content-Range": f"bytes {have}-{N - 1}/*"} if have else {}))
        h.wfile.write(data[have:])

    return act


def test_a_file_comes_whole_and_asking_again_asks_nobody(server, remote, tmp_path):
    cache, shown = tmp_path / "deep" / "cache", []
    assert missing(remote, cache) == N and not cache.exists()
    path = fetch(remote, cache, progress=shown.append)
    assert path.read_bytes() == DATA and path.parent == cache and names(cache) == ["a.jsonl.gz"]
    assert shown == sorted(shown) and shown[-1] == N
    assert missing(remote, cache) == 0 and fetch(remote, cache) == path
    assert server.gets(PATH) == [None]
    assert server.agents == {("copyllama", "identity")}


def test_the_same_name_at_two_urls_is_two_files(server, tmp_path):
    server.files |= {"/a/x.txt": b"a", "/b/x.txt": b"b", "/a/x.txt?v=2": b"c", "/": b"d", "/%2e%2e%2fup": b"e"}
    paths = [fetch(look(server.url(p)), tmp_path) for p in list(server.files)]
    assert [p.read_bytes() for p in paths] == list(server.files.values()) and len(set(paths)) == len(paths)
    assert all(p.parent == tmp_path for p in paths)


def test_an_empty_file_is_a_file(server, tmp_path):
    server.files["/empty"] = b""
    for cache, limit in ((tmp_path / "whole", None), (tmp_path / "first", 10)):
        for size in (0, None):
            path = fetch(Remote(server.url("/empty"), size, None), cache, limit)
            assert path.read_bytes() == b"" and not [name for name in names(cache) if name.endswith((".part", ".etag"))]


# What look finds


def test_look_states_the_length_and_no_hash_where_the_server_has_none(server):
    assert look(server.url(PATH)) == Remote(server.url(PATH), N, None)
    assert [a.method for a in server.asked] == ["HEAD"]


def test_look_reads_size_and_hash_off_hugging_faces_redirect_and_does_not_ask_behind_it(server, tmp_path):
    linked = {"X-Linked-Size": N, "X-Linked-ETag": f'"{SHA}"', "ETag": f'"{SHA}"'}
    server.redirects["/resolve/old/a"] = (307, "/resolve/main/a", {})
    server.redirects["/resolve/main/a"] = (302, server.url(PATH), linked)
    remote = look(server.url("/resolve/old/a"))
    assert remote == Remote(server.url("/resolve/old/a"), N, SHA)
    assert [(a.method, a.path) for a in server.asked] == [("HEAD", "/resolve/old/a"), ("HEAD", "/resolve/main/a")]
    assert fetch(remote, tmp_path).read_bytes() == DATA


def test_gits_hash_of_a_small_file_is_no_sha256(server):
    server.redirects["/resolve/main/a"] = (307, PATH, {"X-Linked-Size": N, "X-Linked-ETag": f'"{"a" * 40}"'})
    assert look(server.url("/resolve/main/a")) == Remote(server.url("/resolve/main/a"), N, None)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_of_every_kind_are_followed_and_keep_method_and_range(server, tmp_path, code):
    server.redirects["/old"] = (code, PATH, {})
    remote = look(server.url("/old"))
    assert remote == Remote(server.url("/old"), N, None)
    assert [a.method for a in server.asked] == ["HEAD", "HEAD"]
    server.faults[PATH] = [cut(100)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, "bytes=100-"]


def test_a_server_that_answers_no_head_is_asked_all_the_same(server, tmp_path):
    server.redirects[PATH] = (405, "", {"Content-Length": 7})
    remote = look(server.url(PATH))
    assert remote == Remote(server.url(PATH), None, None) and missing(remote, tmp_path) is None
    del server.redirects[PATH]
    assert fetch(remote, tmp_path).read_bytes() == DATA and missing(remote, tmp_path) == 0


# Resuming


@pytest.mark.parametrize("size", [N, None])
def test_a_cut_connection_is_gone_on_with_where_it_broke(server, remote, tmp_path, size):
    server.faults[PATH] = [cut(600_000), cut(1000)]
    assert fetch(remote._replace(size=size), tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, "bytes=600000-", "bytes=601000-"]
    assert {a.if_range for a in server.asked[1:]} == {etag(DATA)}
    assert names(tmp_path) == ["a.jsonl.gz"]


def test_a_reset_connection_is_gone_on_with(server, remote, tmp_path):
    server.faults[PATH] = [reset(500_000), reset(100_000)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert len(server.gets(PATH)) == 3


def test_the_date_serves_where_there_is_no_strong_etag(server, remote, tmp_path):
    date = "Wed, 01 Jan 2025 00:00:00 GMT"
    server.headers[PATH] = {"ETag": 'W/"1"', "Last-Modified": date}
    server.faults[PATH] = [cut(1000)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.asked[1][2:] == ("bytes=1000-", date)


def test_without_etag_and_date_a_cut_file_begins_anew(server, remote, tmp_path):
    server.headers[PATH] = {}
    server.faults[PATH] = [cut(1000)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, None]


@pytest.mark.parametrize("sha256", [True, False])
@pytest.mark.parametrize("later", [[change(OTHER)], [lambda h: change(OTHER)(h) and blind_to_if_range(h)]])
def test_a_file_that_changed_between_cut_and_resume_is_not_glued_together(server, tmp_path, later, sha256):
    remote = Remote(server.url(PATH), N, hashlib.sha256(OTHER).hexdigest() if sha256 else None)
    server.faults[PATH] = [cut(600_000), *later]
    assert fetch(remote, tmp_path).read_bytes() == OTHER
    assert server.gets(PATH)[:2] == [None, "bytes=600000-"]


def test_a_server_that_ignores_ranges_starts_from_zero(server, remote, tmp_path):
    server.faults[PATH] = [without_ranges(600_000), without_ranges()]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, "bytes=600000-"]


def test_a_server_that_ignores_ranges_and_always_breaks_is_not_asked_for_ever(server, remote, tmp_path):
    server.faults[PATH] = [without_ranges(n) for n in (600_000, 300_000) * 5]
    assert "cut after 300000 of 1000000 bytes" in refused(remote, tmp_path)
    assert len(server.gets(PATH)) == 1 + download.RETRIES


def test_what_a_killed_process_leaves_is_gone_on_with(server, remote, tmp_path):
    server.faults[PATH] = [pause(400_000)]
    process = in_another_process(remote, tmp_path)
    wait_for(lambda: sum(p.stat().st_size for p in tmp_path.glob("*.part")) == 400_000)
    process.kill()
    process.wait()
    assert names(tmp_path) == ["a.jsonl.gz.etag", "a.jsonl.gz.part"] and missing(remote, tmp_path) == 600_000
    assert fetch(remote, tmp_path).read_bytes() == DATA and names(tmp_path) == ["a.jsonl.gz"]
    assert server.gets(PATH) == [None, "bytes=400000-"]


@pytest.mark.parametrize("size, asked", [(N, []), (None, [f"bytes={N}-"])])
def test_a_part_that_was_whole_when_its_process_died_is_not_downloaded_again(server, tmp_path, size, asked):
    remote = Remote(server.url(PATH), size, None)
    leave(remote, tmp_path, DATA)
    assert fetch(remote, tmp_path).read_bytes() == DATA and names(tmp_path) == ["a.jsonl.gz"]
    assert server.gets(PATH) == asked


def test_a_part_longer_than_the_file_is_dropped(server, remote, tmp_path):
    leave(remote, tmp_path, DATA + DATA)
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [f"bytes={2 * N}-", None]


# Tries


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_server_out_of_order_is_asked_again_with_growing_waits(server, remote, tmp_path, waits, code):
    server.faults[PATH] = [status(code)] * 3
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert len(server.gets(PATH)) == 4
    assert waits == [download.BACKOFF * 2**i for i in range(3)]


@pytest.mark.parametrize("after, waited", [("2", 2), ("60", 60), ("61", None), ("Wed, 01 Jan 2025 00:00:00 GMT", None)])
def test_a_short_retry_after_is_honoured(server, remote, tmp_path, waits, after, waited):
    server.faults[PATH] = [status(429, Retry_After=after)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert waits == [waited or download.BACKOFF]


def test_after_the_retries_one_line_says_what_happened_and_what_was_got_stays(server, remote, tmp_path):
    server.faults[PATH] = itertools.chain([cut(300_000)], itertools.repeat(status(503)))
    message = refused(remote, tmp_path)
    assert "503 Service Unavailable" in message and "run the same command again: what was downloaded is kept" in message
    assert len(server.gets(PATH)) == 1 + download.RETRIES
    assert missing(remote, tmp_path) == 700_000
    server.faults.clear()
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH)[-1] == "bytes=300000-"


def test_a_try_that_brings_bytes_sets_the_count_back(server, remote, tmp_path):
    useless = [status(503)] * (download.RETRIES - 1)
    server.faults[PATH] = [*useless, cut(1000), *useless, cut(1000), *useless]
    assert fetch(remote, tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_other_refusals_are_final_and_leave_nothing(server, remote, tmp_path, code):
    server.faults[PATH] = itertools.repeat(status(code))
    message = refused(remote, tmp_path)
    assert str(code) in message and "--urls" in message
    assert len(server.gets(PATH)) == 1 and names(tmp_path) == []


def test_look_retries_as_fetch_does(server, waits):
    server.redirects[PATH] = (503, "", {})
    with pytest.raises(UserError, match=f"{PATH}: 503 Service Unavailable, at 5 tries"):
        look(server.url(PATH))
    assert len(server.asked) == 5 and waits == [download.BACKOFF * 2**i for i in range(4)]
    with pytest.raises(UserError, match="/none: 404 Not Found; check the name"):
        look(server.url("/none"))
    assert len(server.asked) == 6


def test_redirects_in_a_circle_are_one_line(server, tmp_path):
    server.redirects["/round"] = (302, "/round", {})
    assert "302" in refused(Remote(server.url("/round"), None, None), tmp_path)


def test_a_silent_server_is_given_up_and_asked_again(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.faults[PATH] = [hang, pause(500_000)]
    started = time.monotonic()
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, None, "bytes=500000-"] and time.monotonic() - started < 4


def test_a_port_where_nobody_listens_is_tried_five_times(tmp_path, waits):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/a"
    assert "Connection refused" in refused(Remote(url, None, None), tmp_path)
    assert len(waits) == 4 and names(tmp_path) == []


def test_a_name_that_cannot_be_resolved_is_tried_five_times(tmp_path, waits, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in refused(Remote("http://nowhere.invalid/a", None, None), tmp_path)
    assert len(waits) == 4


@pytest.mark.parametrize("url", ["nowhere", "nowhere:/a", "http://127.0.0.1/a b", "http://[", "http:///a"])
def test_what_is_no_address_is_refused_at_once(tmp_path, waits, url):
    refused(Remote(url, None, None), tmp_path)
    assert waits == []


# What came is checked


@pytest.mark.parametrize("bad", [DATA[:-1], DATA + b"!", DATA[:-1] + b"!"])
def test_a_file_that_is_not_the_one_announced_is_downloaded_once_more(server, remote, tmp_path, bad):
    server.faults[PATH] = [instead(bad)]
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, None] and names(tmp_path) == ["a.jsonl.gz"]


@pytest.mark.parametrize(
    "bad, values",
    [(DATA[:-1], ["999999 bytes", "expected 1000000"]), (OTHER, [hashlib.sha256(OTHER).hexdigest(), f"expected {SHA}"])],
)
def test_wrong_twice_names_both_values_and_leaves_nothing(server, remote, tmp_path, bad, values):
    server.faults[PATH], shown = itertools.repeat(instead(bad)), []
    message = refused(remote, tmp_path, progress=shown.append)
    assert bool(shown) == (len(bad) == N)  # another length is announced, and not downloaded to see
    assert all(value in message for value in values)
    assert server.gets(PATH) == [None, None] and names(tmp_path) == []


def test_a_body_of_no_stated_length_is_checked_too(server, remote, tmp_path):
    server.faults[PATH] = [unannounced(DATA[:500_000]), unannounced(DATA + b"!"), unannounced(DATA)]
    assert fetch(remote._replace(sha256=None), tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, "bytes=500000-", None]


def test_a_file_in_the_cache_that_is_no_longer_the_servers_is_replaced(server, remote, tmp_path):
    path = fetch(remote, tmp_path)
    for data in (OTHER, OTHER + b"longer"):
        server.files[PATH] = data
        now = Remote(remote.url, len(data), hashlib.sha256(data).hexdigest())
        assert fetch(now, tmp_path) == path and path.read_bytes() == data
    assert len(server.gets(PATH)) == 3


# Prefixes


@pytest.mark.parametrize("size", [N, None])
def test_a_prefix_is_asked_for_by_range_and_gone_on_with(server, remote, tmp_path, size):
    remote = remote._replace(size=size)
    server.faults[PATH] = [cut(1000)]
    assert missing(remote, tmp_path, 5000) == 5000
    path = fetch(remote, tmp_path, 5000)
    assert path.read_bytes() == DATA[:5000] and path.name.endswith("-a.jsonl.gz")
    assert server.gets(PATH) == ["bytes=0-4999", "bytes=1000-4999"]
    assert missing(remote, tmp_path, 5000) == 0 and fetch(remote, tmp_path, 5000) == path
    assert missing(remote, tmp_path) == size and len(server.gets(PATH)) == 2


def test_a_prefix_of_a_server_without_ranges_ends_where_it_should(server, remote, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.faults[PATH] = itertools.repeat(pause(500_000, ranges=False))
    assert fetch(remote, tmp_path, 5000).read_bytes() == DATA[:5000]
    assert len(server.gets(PATH)) == 1 and waits == []


def test_a_prefix_does_not_pass_for_the_whole_file_nor_for_another_prefix(server, remote, tmp_path):
    paths = [fetch(remote, tmp_path, limit) for limit in (10, 20, None)]
    assert [p.read_bytes() for p in paths] == [DATA[:10], DATA[:20], DATA]


def test_a_whole_file_in_the_cache_is_known_without_asking(server, remote, tmp_path):
    path = fetch(remote, tmp_path)
    server.asked.clear()
    found = look(remote.url, tmp_path)
    assert found == (remote.url, N, None) and missing(found, tmp_path) == 0 and fetch(found, tmp_path) == path
    assert server.asked == []
    assert look(remote.url, tmp_path / "elsewhere").size == N and len(server.asked) == 1


def test_a_prefix_as_long_as_the_file_is_the_whole_file_and_is_checked(server, remote, tmp_path):
    server.faults[PATH] = [instead(OTHER)]
    assert fetch(remote, tmp_path, N) == fetch(remote, tmp_path) == fetch(remote, tmp_path, N + 1)
    assert server.gets(PATH) == [None, None]


def test_a_prefix_longer_than_a_file_of_unknown_size_is_the_file(server, remote, tmp_path):
    assert fetch(remote._replace(size=None), tmp_path, 2 * N).read_bytes() == DATA
    assert server.gets(PATH) == [f"bytes=0-{2 * N - 1}"]


# The disk, other processes, proxies


def test_a_full_disk_is_let_through_and_what_was_written_is_gone_on_with(server, remote, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 500_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    with monkeypatch.context() as m:
        m.setattr(download, "open", lambda path, mode: io.BufferedWriter(Full(path, mode.replace("b", ""))), raising=False)
        with pytest.raises(OSError) as e:
            fetch(remote, tmp_path)
    assert e.value.errno == errno.ENOSPC and len(server.gets(PATH)) == 1
    kept = N - missing(remote, tmp_path)
    assert 0 < kept <= 500_000
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert server.gets(PATH) == [None, f"bytes={kept}-"]


def test_two_processes_with_one_cache_download_a_file_once(server, remote, tmp_path):
    server.faults[PATH] = [slowly(500_000, 1.0)]
    processes = [in_another_process(remote, tmp_path) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    assert server.gets(PATH) == [None] and names(tmp_path) == ["a.jsonl.gz"]
    assert fetch(remote, tmp_path).read_bytes() == DATA


def test_who_waited_for_one_that_failed_goes_on_where_it_stopped(server, remote, tmp_path):
    server.faults[PATH] = [pause(400_000)]
    first = in_another_process(remote, tmp_path)
    wait_for(lambda: sum(p.stat().st_size for p in tmp_path.glob("*.part")) == 400_000)
    second = in_another_process(remote, tmp_path)
    time.sleep(0.5)
    assert second.poll() is None and server.gets(PATH) == [None]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait() == 0
    assert server.gets(PATH) == [None, "bytes=400000-"] and fetch(remote, tmp_path).read_bytes() == DATA


def test_who_waited_for_a_part_that_was_removed_locks_the_next_one(tmp_path):
    part, inside, leave = tmp_path / "a.part", threading.Event(), threading.Event()

    def wait():
        with download._alone(part):
            inside.set()
            leave.wait()

    with download._alone(part):
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        assert not inside.wait(0.1)
    assert inside.wait(5)
    with open(part) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    leave.set()
    thread.join()
    assert not part.exists()


def test_a_file_is_on_the_disk_before_it_has_its_name(remote, tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        act = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, act=act: done.append(name) or act(*args))
    fetch(remote, tmp_path)
    assert done == ["fsync", "replace"]


def test_without_file_locks_a_file_comes_all_the_same(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "fcntl", None)
    server.faults[PATH] = [cut(1000)]
    assert fetch(remote, tmp_path).read_bytes() == DATA and names(tmp_path) == ["a.jsonl.gz"]


def test_the_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url(""))
    server.files["http://nowhere.invalid/a"] = DATA
    assert fetch(look("http://nowhere.invalid/a"), tmp_path).read_bytes() == DATA
