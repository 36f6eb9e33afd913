"""The server's life as a command: its address, its key, its end."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from engine.errors import InputError
from engine.viewer.client import segment_box
from engine.viewer.server import address_of, checked_key, listen

BOX = [[4, 5], [8, 33], [10, 35]]
COMMAND = """
import time
from engine.command.main import run_command
from engine.viewer.leases import Leases
from engine.viewer.routes import Viewer
from engine.viewer.server import address_of, listen, serve
from tests.engine.viewer.bright import Bright

def main(argv):
    viewer = Viewer(Bright(), Leases(2, 100.0, time.monotonic), 10**6)
    with listen("127.0.0.1", 0) as listener:
        print(address_of(listener), flush=True)
        serve(viewer, listener, None)
    return {"predictions": viewer.predictions}

run_command(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process can be sent these signals there")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_good_order(number, code, volume, ball):
    command, root = [sys.executable, "-c", COMMAND], Path(__file__).resolve().parents[3]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stderr.readline().strip()
            assert (segment_box(address, None, volume[0], (5, 1, 1), BOX) == ball).all()
            with httpx2.Client(base_url=address) as idle:  # whose connection is open
                idle.get("/healthz")
                process.send_signal(number)
                out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == code and "Traceback" not in err, err
    assert json.loads(out) == {"predictions": 1} if code == 0 else not out and err.endswith("interrupted\n")


def test_a_port_that_is_taken_is_one_line():
    with listen("127.0.0.1", 0) as first:
        port = int(address_of(first).rpartition(":")[2])
        with pytest.raises(InputError, match=f"^--host 127.0.0.1 --port {port}: cannot be listened on"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="--host no.such.host.invalid: not an address of this machine"):
        listen("no.such.host.invalid", 0)


def test_who_may_ask_without_a_key(monkeypatch):
    monkeypatch.delenv("NN_INTERACTIVE_API_KEY", raising=False)
    assert all(checked_key(host, None) is None for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"))
    for host in ("0.0.0.0", "::", "192.168.1.5", "lab.example"):
        with pytest.raises(InputError, match="others can reach it, so --api_key"):
            checked_key(host, None)
        assert checked_key(host, "long-enough") == "long-enough"
    for key in ("", "short", "with a space", "schlüssel-schlüssel", "line\nbreaks"):
        with pytest.raises(InputError, match="^--api_key: expected 8 or more printable ASCII characters without a space$"):
            checked_key("127.0.0.1", key)
    monkeypatch.setenv("NN_INTERACTIVE_API_KEY", "from-the-environment")
    assert checked_key("0.0.0.0", None) == "from-the-environment"


def test_the_client_of_the_trial_goes_on_until_all_is_done(slow, server, volume, ball):
    assert (segment_box(server.url, None, volume[0], (5, 1, 1), BOX) == ball).all()
    assert not server.leases.held
