"""A web server on the loopback that serves bytes from memory, with ranges, and fails as it is told to.

with Server({"/a.bin": b"..."}) as server:
    server.faults["/a.bin"] = [cut(100)]     # of the first GET
    ... server.url("/a.bin") ...
"""

import contextlib
import http.server
import re
import threading


class Server:
    """files: {path: bytes}; faults: {path: [functions of the Handler, each of which answers one of the next GETs]}."""

    def __init__(self, files):
        self.files = dict(files)
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
        data = self.web.files.get(self.path)
        if data is None:
            self.head(404, {"Content-Length": 0})
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        start = int(span[1]) if span else 0
        end = min(int(span[2] or len(data)), len(data) - 1) + 1 if span else len(data)
        if start > len(data):
            self.head(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": 0})
            return
        where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if span else {}
        self.head(206 if span else 200, {"Content-Length": end - start, "Accept-Ranges": "bytes"} | where)
        if self.command == "GET":
            with contextlib.suppress(OSError):  # the client has enough
                self.wfile.write(data[start:end][:stop])

    def head(self, code, headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


def cut(after):
    """Ends the body after that many bytes."""
    return lambda handler: handler.answer(stop=after)
