"""Files that belong together are all there, or the one that says so is not; also where a process was killed among them."""

import signal
import subprocess
import sys

import pytest

from models.uni_medvlm.checkpoints.staging import written_whole

LAST = "unimed.json"
# Writes one of two files, says so, and waits to be killed: while it writes, or while the files are being put in their places.
WRITER = """
import sys, time
from pathlib import Path
from models.uni_medvlm.checkpoints import staging

folder, moment = sys.argv[1:]
def stop(*args):
    print("now", flush=True)
    time.sleep(600)
if moment == "moving":
    real = staging.os.replace
    def replace(source, target):
        if Path(source).name == "unimed.json":
            stop()
        real(source, target)
    staging.os.replace = replace
with staging.written_whole(folder, "unimed.json") as inner:
    (inner / "model.safetensors").write_text("new")
    if moment == "writing":
        stop()
    (inner / "unimed.json").write_text("new")
"""


def write(folder, text):
    with written_whole(folder, LAST) as staging:
        (staging / "model.safetensors").write_text(text)
        (staging / LAST).write_text(text)


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_all_files_are_there_beside_what_else_was(tmp_path):
    folder = tmp_path / "inner" / "out"
    write(folder, "old")
    (folder / "trainer_state.json").write_text("kept")
    write(folder, "new")
    assert contents(folder) == {"model.safetensors": "new", LAST: "new", "trainer_state.json": "kept"}
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_fails_changes_nothing(tmp_path):
    for before in ({}, {"model.safetensors": "old", LAST: "old"}):
        with pytest.raises(OSError, match="No space left"), written_whole(tmp_path / "out", LAST) as staging:
            (staging / "model.safetensors").write_text("half")
            raise OSError(28, "No space left on device")
        assert (contents(tmp_path / "out") if before else list(tmp_path.iterdir())) == (before or [])
        write(tmp_path / "out", "old")


@pytest.mark.parametrize("moment", ["writing", "moving"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_killed_writer_leaves_no_half_that_looks_whole(tmp_path, moment, before):
    folder = tmp_path / "out"
    if before:
        write(folder, before)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "now\n"
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    found = contents(folder) if folder.exists() else {}
    assert found == ({"model.safetensors": "old", LAST: "old"} if (moment, before) == ("writing", "old") else found)
    assert LAST not in found or set(found.values()) == {"old"}
    write(folder, "again")  # and clears what the killed one left
    assert contents(folder) == {"model.safetensors": "again", LAST: "again"} and [p.name for p in tmp_path.iterdir()] == ["out"]
