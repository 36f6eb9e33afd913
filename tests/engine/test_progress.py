"""Progress on a terminal is a bar drawn in place; in a file it is a few whole lines."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, time
import engine.progress
from engine.progress import progress
engine.progress.SECONDS_BETWEEN_LINES = float(sys.argv[1])
with progress(total=120, desc="training", unit="step") as bar:
    for step in range(120):
        time.sleep(0.005)
        bar.update()
        bar.set_postfix(loss=f"{step}")
        if step == 60:
            list(progress(range(9), desc="inside", leave=False))
"""


def run(folder: Path, seconds: float, **environment: str) -> list[str]:
    """The lines that the script writes into a file; `seconds` between two of them."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **environment}
    with open(folder / "log", "wb") as log:
        subprocess.run([sys.executable, "-c", SCRIPT, str(seconds)], stderr=log, env=env, check=True)
    text = (folder / "log").read_bytes().decode()
    assert "\r" not in text.replace(os.linesep, "\n") and "\x1b" not in text
    return text.splitlines()


def test_a_file_gets_one_whole_line_at_the_end_of_a_short_run(tmp_path):
    (line,) = run(tmp_path, 10)
    assert line.startswith("training: 100%") and "120/120" in line and line.endswith("loss=119]")


def test_a_file_gets_a_line_an_interval_and_never_two(tmp_path):
    begun = time.monotonic()
    lines = run(tmp_path, 0.2)
    most = (time.monotonic() - begun) / 0.2 + 2
    steps = [int(line.split("/120")[0].split()[-1]) for line in lines]
    assert 2 <= len(lines) <= most < 120 and steps == sorted(set(steps)) and steps[-1] == 120


def test_only_the_first_process_says_how_far_it_is(tmp_path):
    assert run(tmp_path, 0.2, RANK="1") == []


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_a_bar_drawn_in_place():
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "10"], stderr=theirs, env=env)
    os.close(theirs)
    drawn = b""
    try:
        while piece := os.read(ours, 4096):
            drawn += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0 and drawn.count(b"\rtraining: ") > 3
