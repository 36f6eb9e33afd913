"""bench.gpu in processes: whatever fails is reported, the rest goes on, and what was found is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.job_processes import JobProcesses

FAULTY = "tests.bench.faulty_cases"
pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals are POSIX")


def run(capfd, tmp_path, *flags):
    """(exit code, summary, written rows)."""
    code = gpu.main(["--device", "cpu", "--tiny", "--cases", FAULTY, "--output", str(tmp_path), *flags])
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    return code, summary, written(tmp_path)


def written(folder):
    return [json.loads(line) for path in folder.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_raises_crashes_or_hangs_ends_nothing_else(capfd, tmp_path):
    code, summary, rows = run(capfd, tmp_path, "--seconds", "6")
    assert code == 1
    outcomes = {row["check"]: row["outcome"] for row in rows if "check" in row}
    assert {name for name, outcome in outcomes.items() if name not in summary["failed_checks"]} == {"good first", "good last"}
    assert outcomes["good, raises"] == "ZeroDivisionError: division by zero"
    assert outcomes["good, crashes"] == "its process ended by SIGSEGV"
    assert outcomes["good, hangs"] == "nothing for 6 s: ended"
    assert "nan" in outcomes["good, not a number"]

    found = {(row["phase"], row["case"], row["provider"]): row.get("stopped", "timed") for row in rows if "case" in row}
    assert found == {
        ("goals", "fine", "ours"): "timed",
        ("goals", "fine", "eager"): "ZeroDivisionError: division by zero",
        ("goals", "crashes", "ours"): "its process ended by SIGSEGV",
        ("goals", "its peer crashes", "ours"): "timed",
        ("variants", "fine, other launches", "ours"): "timed",
        ("variants", "fine, other launches", "64 x 8 w"): "timed",
        ("peers", "fine", "ours"): "timed",
        ("peers", "fine", "compile"): "timed",
        ("peers", "its peer crashes", "a peer"): "its process ended by SIGSEGV",
    }
    assert summary["stopped"] == ["crashes"] and set(summary["ours_ms"]) == {"fine", "its peer crashes"}
    assert all(row["torch"] == torch.__version__ for row in rows) and summary["left_out"] == {}


def test_order_is_checks_then_ours_then_variants_then_peers(monkeypatch):
    """Also where a phase has used up its share: what it left over comes before the peers."""
    from tests.bench import faulty_cases

    for shares, expected in (
        ({}, ["ceilings", "checks", *["goals"] * 3, "variants", "peers", "peers"]),
        ({"checks": 0, "goals": 0}, ["ceilings", "variants", "checks", *["goals"] * 3, "peers", "peers"]),
    ):
        monkeypatch.setattr(gpu, "SHARES", gpu.SHARES | shares)
        done: list[str] = []
        monkeypatch.setattr(gpu.Bench, "do", lambda self, unit, done=done: done.append(unit.phase))
        bench = gpu.Bench(None, gpu.argparse.Namespace(minutes=9.0, seconds=1.0), {"device": "cpu"}, None)
        bench.run(list(gpu.units([faulty_cases], torch.device("cpu"), True, "")))
        assert done == expected


def test_where_the_minutes_are_over_the_rest_is_named(capfd, tmp_path):
    code, summary, rows = run(capfd, tmp_path, "--minutes", "0")
    assert code == 1 and rows == [] and summary["failed_checks"] == []
    assert len(summary["left_out"]["the minutes are over"]) == 8  # the rates and the checks
    assert len(summary["left_out"]["the device's rates were not measured"]) == 6


def test_a_hang_ends_with_the_minutes():
    begun = time.monotonic()
    with JobProcesses([FAULTY]) as processes:
        job = {"work": "checks", "device": "cpu", "tiny": True, "names": ["good first", "good, hangs"]}
        list(processes.run(job, 100, begun + 6))
    assert processes.ended == "the minutes are over" and time.monotonic() - begun < 30


def test_what_was_found_is_kept_and_nothing_is_left_running_when_it_is_ended(tmp_path):
    """By SIGTERM, as a shell's timeout ends it."""
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--cases", FAULTY, "--output", str(tmp_path)]
    root = Path(gpu.__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        end = time.monotonic() + 100
        while not any(row.get("check") == "good, crashes" for row in written(tmp_path)) and time.monotonic() < end:
            time.sleep(0.1)  # it now hangs
        workers = [int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == process.pid] if _PROC else []
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    summary = json.loads(output.splitlines()[-1])
    assert process.returncode == 1 and "interrupted" in summary["left_out"] and "good, crashes" in summary["failed_checks"]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers) and (workers or not _PROC)


_PROC = Path("/proc/self/stat").exists()


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError):
        return 0
