"""A server that speaks OpenAI's chat protocol on a free port of this machine, and answers what a test wants."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import patch


class Server(ThreadingHTTPServer):
    """Answers with what `answer(body, number of the request)` gives: (status, JSON or bytes or pieces of bytes[, headers]).

    Pieces come without their length before them, and the connection ends with the last.
    """

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.bodies, self.headers, self.lock = answer, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *args):
        """A client that left before the answer is part of the test."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body | {"path": self.path})
            self.server.headers.append(dict(self.headers))
            status, content, *headers = self.server.answer(body, len(self.server.bodies))
        self.send_response(status)
        for name, value in (headers[0] if headers else {}).items():
            self.send_header(name, value)
        if isinstance(content, Iterator):
            self.end_headers()
            for piece in content:
                self.wfile.write(piece)
            return
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_header("Content-Length", str(len(content)))
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextmanager
def serve(answer) -> Iterator[Server]:
    """A running server; it ends with the block."""
    server = Server(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        with patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield server
    finally:
        server.shutdown()
        server.server_close()


def says(text: str):
    return 200, {"choices": [{"message": {"content": text}}]}
