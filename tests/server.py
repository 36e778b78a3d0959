"""A web server on the loopback that serves bytes from memory, with ranges, and fails as it is told to.

with Server({"/a.bin": b"..."}) as server:
    server.faults["/a.bin"] = [cut(100)]     # of the first GET
    ... server.url("/a.bin") ...
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading


class Server:
    """
    files: {path: bytes}
    headers: of every answer
    faults: {path: [functions of the Handler, each of which answers one of the next GETs]}
    """

    def __init__(self, files, headers=None):
        self.files = dict(files)
        self.headers = headers or {}
        self.faults = {}

    def __enter__(self):
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": self}))
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def url(self, path) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    web: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        faults = self.web.faults.get(self.path)
        faults.pop(0)(self) if faults else self.answer()

    def answer(self, stop=None):
        """Answers with the file or the range of it asked for; ends the body after `stop` bytes."""
        data = self.web.files.get(self.path.split("?")[0])
        if data is None:
            self.head(404, {"Content-Length": 0, "X-Error-Code": "EntryNotFound"})  # the hub's word for it
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        start = int(span[1]) if span else 0
        end = min(int(span[2] or len(data)), len(data) - 1) + 1 if span else len(data)
        if start > len(data):
            self.head(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0})
            return
        about = {"Content-Length": end - start, "Accept-Ranges": "bytes", "ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if span else {}
        self.head(206 if span else 200, about | where)
        if self.command == "GET":
            with contextlib.suppress(OSError):  # the client has enough
                self.wfile.write(data[start:end][:stop])

    def head(self, code, headers):
        self.send_response(code)
        for name, value in (self.web.headers | headers).items():
            self.send_header(name, str(value))
        self.end_headers()


def cut(after):
    """Ends the body after that many bytes."""
    return lambda handler: handler.answer(stop=after)


def hub(repository: str, files: dict[str, bytes]) -> Server:
    """Returns a server that answers as the Hugging Face hub does for a dataset with these files; HF_ENDPOINT leads to it."""
    sha = "a" * 40
    about = json.dumps({"id": repository, "sha": sha}).encode()
    served = {f"/api/datasets/{repository}": about}
    for revision in ("main", sha):
        served[f"/api/datasets/{repository}/revision/{revision}"] = about
        trees = {}
        for name, data in files.items():
            served[f"/datasets/{repository}/resolve/{revision}/{name}"] = data
            folder, _, _ = name.rpartition("/")
            trees.setdefault(folder, []).append({"type": "file", "path": name, "size": len(data), "oid": "b" * 40})
        trees[""] = trees.get("", []) + [{"type": "directory", "path": name, "oid": "c" * 40} for name in trees if name]
        for folder, entries in trees.items():
            served[f"/api/datasets/{repository}/tree/{revision}/{folder}".rstrip("/")] = json.dumps(entries).encode()
    return Server(served, {"X-Repo-Commit": sha})
