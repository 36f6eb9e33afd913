"""Two runs do not write into one folder at once; what is killed leaves nothing behind that stops the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.command.run_folder import open_run
from engine.errors import InputError
from tests.conftest import ROOT

HOLD = """
import sys, time
from engine.command.main import run_command
from engine.command.run_folder import open_run
def main(argv):
    run = open_run("demo", argv[0])
    print("locked", flush=True)
    time.sleep(60)
run_command(main)
"""


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def holder(tmp_path):
    process = start(tmp_path)
    assert process.stderr.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_run_is_one_line_and_the_first_goes_on(holder, tmp_path):
    second = start(tmp_path)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 2 and out == ""
    assert err.startswith(f"error: {tmp_path}: another run (process {holder.pid} on ") and err.count("\n") == 1
    assert err.endswith("is writing there: expected another --output_dir, or that it has ended\n")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="another run"):
        open_run("demo", tmp_path / "link")
    open_run("demo", tmp_path / "another")
    assert holder.poll() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_ends_with_its_process(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait(timeout=30)
    run = open_run("demo", tmp_path)
    assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
    run.unlock()
    assert not (tmp_path / ".lock").exists()


def test_a_process_may_open_its_folder_again_and_others_once_it_has_done(tmp_path):
    first, second = open_run("demo", tmp_path), open_run("demo", tmp_path)
    first.unlock()
    first.unlock()
    blocked = start(tmp_path)
    assert blocked.wait(timeout=60) == 2
    blocked.communicate()
    del second
    free = start(tmp_path)
    assert free.stderr.readline() == "locked\n"
    free.kill()
    free.communicate()


def test_a_fork_of_the_run_takes_no_lock_away(tmp_path):
    """A data loader's worker is one, and collects what it has inherited."""
    run = open_run("demo", tmp_path)
    child = os.fork()
    if not child:
        run.unlock()
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    blocked = start(tmp_path)
    assert blocked.wait(timeout=60) == 2
    blocked.communicate()
