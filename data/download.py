"""Files by URL, into a cache folder, whole or not at all.

A file is written to <name>.part, and gets its name once it is whole and what the server said it would be. What a cut
connection or a killed process leaves is gone on with, as long as the server still has that very file: <name>.etag beside
the .part says which one it was.
"""

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

from errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes with one cache are not kept apart
    fcntl = None

RETRIES = 5  # tries that bring nothing new
BACKOFF = 1.0  # seconds before the second try, doubled for each further one
TIMEOUT = 30  # seconds of silence
LONGEST_WAIT = 60  # seconds; a server that asks for more is asked again at our own pace
CHUNK = 1 << 18  # bytes
HEADERS = {"User-Agent": "copyllama", "Accept-Encoding": "identity"}
AGAIN = "run the same command again: what was downloaded is kept"


class Remote(NamedTuple):
    url: str
    size: int | None  # bytes; None, as sha256, where the server does not say
    sha256: str | None


class Place(NamedTuple):
    """A file of the cache and what it must be: its bytes and its hash, as far as known."""

    path: Path
    limit: int | None
    size: int | None
    sha256: str | None


class Trouble(Exception):
    """What may be over at the next try. wait: the seconds that the server asks for, if it does."""

    def __init__(self, what, wait=None):
        super().__init__(what)
        self.wait = wait


class Wrong(Exception):
    """A file that is not the one announced: what it is, and what was expected."""


def look(url: str, cache: Path | None = None) -> Remote:
    """Asks the server what it has, without the bytes; a file that is whole in `cache` needs no server.

    Raises UserError where the server has nothing or cannot be reached.
    """
    if cache and (path := _place(Remote(url, None, None), cache, None).path).is_file():
        return Remote(url, path.stat().st_size, None)

    def ask():
        with _open(url, "HEAD") as response:
            return response.status, response.headers

    status, headers = _patiently(url, ask)
    size = headers.get("X-Linked-Size") or (headers.get("Content-Length") if status == 200 else None)
    # Hugging Face names the small files, those in git itself, by git's hash there: 40 digits.
    sha256 = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
    return Remote(url, _number(size), sha256 and sha256[1])


def missing(remote: Remote, cache: Path, limit: int | None = None) -> int | None:
    """The bytes that fetch has still to download: 0 of a file in the cache, None where the server does not say.

    Goes by sizes alone. Where only the limit is known, it is that: the file may turn out shorter.
    """
    place = _place(remote, cache, limit)
    if place.path.is_file() and place.size in (None, place.path.stat().st_size):
        return 0
    part, note = _beside(place.path)
    whole = place.size if place.limit is None else place.limit
    kept = part.stat().st_size if part.exists() and note.exists() and note.read_text() else 0
    return None if whole is None else max(whole - kept, 0)


def fetch(remote: Remote, cache: Path, limit: int | None = None, progress=None) -> Path:
    """The path of the file in `cache`, downloaded where it is not there, or not with the size and hash of `remote`.

    limit: only that many first bytes are wanted, and no hash can be checked. progress(n) is called now and then: n bytes are
    there.
    Raises UserError, after RETRIES tries that brought nothing, for what cannot be had; OSErrors of the disk pass.
    """
    place, progress = _place(remote, cache, limit), progress or (lambda n: None)
    if _is_there(place):
        return place.path
    part, note = _beside(place.path)
    part.parent.mkdir(parents=True, exist_ok=True)
    with _alone(part):
        if _is_there(place):  # another process brought it meanwhile
            return place.path
        for _ in range(2):
            try:
                _patiently(remote.url, lambda: _go_on(remote, place, progress), lambda: part.stat().st_size)
                _check(part, place.size, place.sha256)
            except Wrong as e:
                wrong = e
                os.truncate(part, 0)  # not removed: it carries the lock
                note.unlink(missing_ok=True)
                continue
            with open(part, "ab") as file:
                os.fsync(file.fileno())
            os.replace(part, place.path)
            note.unlink(missing_ok=True)
            return place.path
    raise UserError(f"{remote.url}: {wrong}, twice; the server's file is damaged, or changes: try later, or pass other --urls")


def _place(remote, cache, limit) -> Place:
    key = hashlib.blake2b(remote.url.encode()).hexdigest()[:8]
    last = urllib.parse.unquote(re.split("[?#]", remote.url)[0]).split("/")[-1]
    name = re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-100:]
    whole = Place(Path(cache) / f"{key}-{name}", None, remote.size, remote.sha256)
    if limit is None or (remote.size is not None and remote.size <= limit):
        return whole
    # Before the name, which so keeps its suffix.
    first = Path(cache) / f"{key}-first{limit}-{name}"
    return Place(first, limit, None if remote.size is None else limit, None)


def _beside(path):
    return path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.etag")


def _is_there(place) -> bool:
    with contextlib.suppress(Wrong, FileNotFoundError):
        _check(place.path, place.size, place.sha256)
        return True
    return False


def _check(path, size, sha256):
    """Raises Wrong unless the file is that long and has that hash, as far as they are known."""
    found = path.stat().st_size
    if size not in (None, found):
        raise Wrong(f"{found} bytes, expected {size}")
    if sha256:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise Wrong(f"sha256 {digest.hexdigest()}, expected {sha256}")


@contextlib.contextmanager
def _alone(part):
    """Waits until no other process writes `part`, then keeps others out. An empty one is not left behind."""

    def held():  # or has whoever held it before renamed or removed the file?
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), part.stat())

    while fcntl:
        with open(part, "ab") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not held():
                continue
            try:
                yield
            finally:
                if held() and part.stat().st_size == 0:
                    part.unlink()
            return
    part.touch()
    yield


def _patiently(url, attempt, done=lambda: 0):
    """attempt(), again after each Trouble, until RETRIES in a row have left done() no larger than it ever was."""
    failures, most = 0, done()
    while True:
        try:
            return attempt()
        except Trouble as e:
            trouble = e
        failures = 0 if done() > most else failures + 1
        most = max(most, done())
        if failures == RETRIES:
            raise UserError(f"{url}: {trouble}, at {RETRIES} tries in a row; {AGAIN}")
        time.sleep(trouble.wait or BACKOFF * 2 ** max(failures - 1, 0))


def _go_on(remote, place, progress):
    """Asks once for what the .part lacks, and appends what comes. Raises Trouble where that was not all of it."""
    part, note = _beside(place.path)
    with open(part, "ab") as file:
        version = note.read_text() if note.exists() else ""
        if not version:
            file.truncate(0)
        have, headers = file.seek(0, os.SEEK_END), {}
        if have and have in (place.size, place.limit):
            return
        if have or place.limit:
            headers["Range"] = f"bytes={have}-{'' if place.limit is None else place.limit - 1}"
        if have:
            headers["If-Range"] = version
        with _open(remote.url, "GET", headers) as response:
            start, total = 0, _number(response.headers.get("Content-Length"))
            if response.status in (206, 416):
                span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
                start, total = map(_number, span.groups()) if span else (None, None)
            if response.status == 416 and total == have:  # it was whole, and nobody knew
                return
            # If-Range is not known to every server: the answer may be a part of another file.
            if start not in (0, have) or (start and _version(response.headers) not in ("", version)):
                note.unlink(missing_ok=True)
                raise Trouble("the server sent other bytes than those asked for")
            if place.limit is None and None not in (total, place.size) and total != place.size:
                raise Wrong(f"{total} bytes, expected {place.size}")
            if start == 0:
                file.truncate(0)
                note.write_text(_version(response.headers))
            have, whole = start, remote.size if total is None else total
            due = min((n for n in (whole, place.limit) if n is not None), default=None)
            for block in _blocks(response):
                block = block if place.limit is None else block[: place.limit - have]
                file.write(block)
                have += len(block)
                progress(have)
                if have == place.limit:  # a server without ranges goes on
                    break
    if due is not None and have < due:
        raise Trouble(f"the connection was cut after {have} of {due} bytes")


def _version(headers) -> str:
    """What If-Range takes: an ETag that is not weak, or the date; "" where the server gives neither."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _number(text) -> int | None:
    return int(text) if text and text.isdecimal() else None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows every redirect with the method and the headers of the request: urllib makes a GET of HEAD, and of 308 an error.

    But a HEAD goes no further than Hugging Face's redirect that says all of a large file: the storage behind it is signed
    for GET, and knows no sha256.
    """

    def http_error_302(self, req, fp, code, msg, headers):
        if req.get_method() == "HEAD" and "X-Linked-Size" in headers:
            return fp
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return urllib.request.Request(newurl, headers=req.headers, method=req.get_method())


def _open(url, method, headers=None):
    """The response, redirects followed. Raises Trouble for what may be over at the next try, and UserError for the rest."""
    try:
        request = urllib.request.Request(url, headers=HEADERS | (headers or {}), method=method)
        return urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and method == "GET" or e.code in (405, 501) and method == "HEAD":
            return e  # an answer too: nothing from there on; nothing to say
        e.close()
        what = " ".join(f"{e.code} {e.reason}".split())
        if e.code in (408, 429) or e.code >= 500:
            wait = _number(e.headers.get("Retry-After"))
            raise Trouble(what, wait if wait is not None and wait <= LONGEST_WAIT else None) from None
        remedy = "check the name" if e.code == 404 else "open it in a browser to see why"
        raise UserError(f"{url}: {what}; {remedy}, or pass other --urls") from None
    except urllib.error.URLError as e:
        # A certificate that does not hold is an OSError and a ValueError at once.
        if not isinstance(e.reason, OSError) or isinstance(e.reason, ValueError):
            raise UserError(f"{url}: {e.reason}; mend the address or the connection") from None
        raise Trouble(_words(e.reason)) from None
    except (ValueError, http.client.InvalidURL) as e:
        raise UserError(f"{url}: {e}; expected an address such as https://host/path") from None
    except (OSError, http.client.HTTPException) as e:
        raise Trouble(_words(e)) from None


def _blocks(response):
    """The body as it comes. read1, because read() throws away what it has when the connection breaks."""
    while True:
        try:
            block = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as e:
            raise Trouble(_words(e)) from None
        if not block:
            return
        yield block


def _words(error) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
