"""The server's life: the port it has, the signals that end it."""

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from engine.errors import InputError
from engine.viewer.access import is_loopback
from engine.viewer.routes import Viewer

SWEEP_SECONDS = 15.0
KEY_VARIABLE = "NN_INTERACTIVE_API_KEY"  # the clients' own


def require_packages() -> None:
    """InputError where the server's packages are not installed."""
    for package in ("starlette", "uvicorn", "blosc2"):
        if find_spec(package) is None:
            raise InputError(f"{package} is not installed (pip install 'vesalius[serve]')")


def checked_key(host: str, api_key: str | None) -> str | None:
    """The key that clients must show. InputError where others than this machine could reach `host` without one."""
    key = os.environ.get(KEY_VARIABLE) or None if api_key is None else api_key
    if key is None and not is_loopback(host):
        raise InputError(f"--host {host}: others can reach it, so --api_key (or {KEY_VARIABLE}) is needed; 127.0.0.1 needs none")
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise InputError("--api_key: expected 8 or more printable ASCII characters without a space")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; InputError where it cannot."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, else asyncio lets Nagle's delays be
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: not an address of this machine ({error})") from None
    try:
        if os.name == "posix":  # elsewhere it would let two programs have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: cannot be listened on ({error.strerror})") from None
    return listener


def address_of(listener: socket.socket) -> str:
    """What a client is told."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(viewer: Viewer, listener: socket.socket, api_key: str | None) -> None:
    """Answers until SIGTERM; KeyboardInterrupt at SIGINT. What is being answered is finished first."""
    server = _server(viewer, api_key)
    server.run([listener])
    viewer.stop()
    if server.signal == signal.SIGINT:
        raise KeyboardInterrupt


@contextmanager
def served(viewer: Viewer, listener: socket.socket, api_key: str | None) -> Iterator[str]:
    """Inside, a thread answers; the address."""
    server = _server(viewer, api_key)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield address_of(listener)
    finally:
        server.should_exit = True
        thread.join()
        viewer.stop()


def _server(viewer: Viewer, api_key: str | None) -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Keeps the signal that ends it to itself, and lets go of sessions that are over."""

        signal: int | None = None

        def handle_exit(self, sig: int, frame: Any) -> None:
            self.force_exit = self.should_exit and sig == signal.SIGINT  # twice
            self.should_exit, self.signal = True, self.signal or sig
            viewer.stopping = True  # a prediction ends at its next slice

        async def main_loop(self) -> None:
            sweeping = asyncio.create_task(self._sweep())
            await super().main_loop()
            sweeping.cancel()

        async def _sweep(self) -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                viewer.leases.sweep()

    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    most = 8 * viewer.leases.most + 32  # requests at a time; more are answered 503
    how: dict[str, Any] = {"http": "h11", "ws": "none", "loop": "asyncio", "lifespan": "off", "log_config": None}
    how |= {"access_log": False, "server_header": False, "limit_concurrency": most, "timeout_graceful_shutdown": 60}
    how["timeout_keep_alive"] = 75  # seconds between a user's strokes
    return Server(uvicorn.Config(viewer.app(api_key), **how))
