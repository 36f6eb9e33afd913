"""What a session still says, and to whom, once its block has ended. Requests themselves: tests/recipes/test_download_hub.py."""

import subprocess
import sys

import pytest

from engine.http_session import HTTPSession


def test_a_request_that_fails_after_the_block_is_not_sent_again_and_nothing_is_printed(capsys):
    with (session := HTTPSession("http://127.0.0.1:9", pause=0.01)):
        pass
    with pytest.raises(ConnectionError):
        session.read("GET", "/", 10)
    assert capsys.readouterr().err == ""


def test_the_end_of_the_process_closes_no_connection_under_a_thread():
    code = "from engine.http_session import *; s = HTTPSession('http://127.0.0.1:9'); import atexit\n"
    code = f"import atexit; atexit.register(lambda: print(s.client.is_closed)); {code}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
