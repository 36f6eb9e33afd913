"""A server that speaks the Hub's API on a free port of this machine: information, paged listings, files with ranges, refusals.

Large files (LFS) are redirected to a second server, as the Hub redirects to its storage.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "8d1f" * 10
REFUSALS = {  # (status, X-Error-Code, X-Error-Message)
    "missing": (404, "RepoNotFound", "Repository not found"),
    "private": (401, "RepoNotFound", "Repository not found"),
    "gated": (403, "GatedRepo", "Access to model is restricted"),
    "bad token": (401, None, "Invalid credentials in Authorization header"),
    "forbidden": (403, None, "This token has no read access"),
    "broken": (500, None, "Internal error"),
}


class Storage(ThreadingHTTPServer):
    """Serves `files`, {path: content}. `fail`: {name: what goes wrong with the next answers}. `log`: (method, path, headers)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.fail: dict[str, list[str]] = {}
        self.log: list[tuple[str, str, dict]] = []
        self.going_on = threading.Event()  # until it is set, a "stalled" answer waits
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        """A connection that broke is part of the test."""

    def ranges(self, name: str) -> list[str | None]:
        return [headers.get("Range") for method, path, headers in self.log if method == "GET" and path.endswith(name)]


class Hub(Storage):
    """A model O/N (data set too) of `files`. Those in `large` are LFS files, which `storage` serves; `listed` changes sizes.

    `refusal` is one of REFUSALS, or "gated files", which only the files answer with.
    """

    def __init__(self, files: dict[str, bytes], large: set[str], storage: Storage):
        super().__init__()
        self.files, self.large, self.storage = files, large, storage
        self.listed: dict[str, int] = {}
        self.refusal: str | None = None
        storage.files = {hashlib.sha256(files[name]).hexdigest(): files[name] for name in large}

    def entry(self, name: str) -> dict:
        content = self.files[name]
        size = self.listed.get(name, len(content))
        entry = {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        if name in self.large:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return entry


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append((self.command, path, dict(self.headers)))
        if not isinstance(self.server, Hub):
            return self.file(path[1:], path[1:])
        parts = path.split("/")
        if self.server.refusal in REFUSALS:
            return self.refuse(self.server.refusal)
        if parts[1] == "api" and parts[5:] in ([], ["revision", "main"]):
            return self.send(200, json.dumps({"id": "O/N", "sha": COMMIT, "siblings": []}).encode())
        if parts[1] == "api" and parts[5:] == ["tree", COMMIT]:
            return self.listing(parse_qs(urlsplit(self.path).query))
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if self.server.refusal == "gated files":
            return self.refuse("gated")
        if name in self.server.large:
            stored = hashlib.sha256(self.server.files[name]).hexdigest()
            head = {"Location": f"{self.server.storage.url}/{stored}?Signature=do-not-show", "X-Linked-ETag": f'"{stored}"'}
            return self.send(302, b"", {**head, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(self.server.files[name]))})
        self.file(name, name)

    def refuse(self, refusal: str) -> None:
        status, code, message = REFUSALS[refusal]
        self.send(
            status, json.dumps({"error": message}).encode(), {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        )

    def listing(self, query: dict) -> None:
        """Two names a page."""
        names, first = list(self.server.files), int(query.get("cursor", ["0"])[0])
        address = f"{self.server.url}{urlsplit(self.path).path}?recursive=True&expand=False&cursor={first + 2}"
        more = {"Link": f'<{address}>; rel="next"'} if first + 2 < len(names) else {}
        self.send(200, json.dumps([self.server.entry(name) for name in names[first : first + 2]]).encode(), more)

    def file(self, name: str, key: str) -> None:
        content, start = self.server.files.get(key), 0
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send(416, b"")
        failures = self.server.fail.get(name, [])
        failure = failures.pop(0) if failures else None
        if failure == "busy":
            return self.send(503, b"")
        body = b"x" * (len(content) - start) if failure == "damaged" else content[start:]
        head = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if failure == "endless":
            self.send_response(200)
            self.end_headers()
            while True:  # until the client has had enough
                self.wfile.write(b"0" * 65536)
        self.send(206 if start else 200, body, head, cut={"cut": 1000, "stalled": 200_000}.get(failure))
        if failure == "stalled":
            self.wfile.flush()
            self.server.going_on.wait(30)

    def send(self, status: int, body: bytes, headers: dict | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@contextmanager
def serve(files: dict[str, bytes], large: set[str]) -> Iterator[Hub]:
    """A running Hub and its storage; they end with the block."""
    with ExitStack() as stack:
        storage = Storage()
        hub = Hub(files, large, storage)
        for server in (storage, hub):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            stack.callback(server.going_on.set)
        yield hub
