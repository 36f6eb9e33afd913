"""Two processes of which one fails: both end, soon, with one line that says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny_qwen import save_tiny

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
EXPECTED = "(expected 4 numbers, one a completion, None where it does not apply)"
# kind: (exit code, the beginning of the line, its end)
ENDS = {
    "raises": (2, "error: step 2: reward reward raised ValueError: no such organ (", ")"),
    "raises_in_first": (2, "error: step 2: reward reward raised KeyError: 'organ' (", ")"),
    "exits": (2, "error: step 2: reward reward raised SystemExit: 0 (", ")"),
    "wrong_number": (2, f"error: step 2: reward reward gave 1 values {EXPECTED}", ""),
    "not_a_number": (2, f"error: step 2: reward reward gave 'much' {EXPECTED}", ""),
    "bad_row": (2, "error: train.json: row ", ": image changed (expected a picture; rows count from 0)"),
    "evaluation": (2, "error: test.json: row 2: image changed (expected a picture; rows count from 0)", ""),
    "not_finite": (2, "error: step 3: the ", " or --max_grad_norm may help"),
    "save_of_first": (2, "error: ", "checkpoint-2: cannot be saved (extra.pt: No space left on device); no checkpoint was saved"),
    "save_of_second": (2, "error: ", "checkpoint-2: cannot be saved (extra.pt: No space left on device); no checkpoint was saved"),
    "SIGTERM_in_evaluation": (130, "interrupted", ""),
    "SIGTERM": (130, "stopped by a signal after step 2; resume from ", "/SIGTERM/checkpoint-2"),
    "SIGINT": (130, "stopped by a signal after step 2; resume from ", "/SIGINT/checkpoint-2"),
    "SIGKILL": (2, "error: another process of this run has ended (was it killed?)", ""),
    "waiting_for_ever": (2, "error: the second process failed", ""),
    "before_joining": (2, "error: settings.yaml: No such file or directory", ""),
    "setting": (2, "error: --learning_rate nan: expected a number, more than 0", ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of failure, and its two processes' ends."""
    folder = tmp_path_factory.mktemp("failures")
    command = [sys.executable, "-m", "tests.engine.training.failing_run", save_tiny(folder / "model"), str(folder)]
    done = subprocess.run(
        [*command, *ENDS, "bug", "none_of_one_rank"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def said(folder: Path, kind: str) -> tuple[list[int], list[str]]:
    """Exit codes of the two processes and what they said, but for the lines of a run that goes well."""
    ends = json.loads((folder / f"{kind}.json").read_text())
    assert abs(ends[0]["seconds"] - ends[1]["seconds"]) < 30, ends  # the first to end is the one that failed
    lines = [line for rank in range(2) for line in (folder / f"{kind}.{rank}.err").read_text().splitlines()]
    usual = ("A run: ", "before training: ", "after training: ", "training:", "evaluating:", "[Gloo]", "[rank0]:[W", "[rank1]:[W")
    return [end["code"] for end in ends], [line for line in lines if line.strip() and not line.startswith(usual)]


@pytest.mark.parametrize("kind", ENDS)
def test_a_failure_of_one_ends_both_with_one_line(folder, kind):
    code, begin, end = ENDS[kind]
    codes, lines = said(folder, kind)
    assert len(lines) == 1 and lines[0].startswith(begin) and lines[0].endswith(end), lines
    assert codes == ([2, -9] if kind == "SIGKILL" else [code, code])


def test_a_bug_in_one_has_one_traceback(folder):
    codes, lines = said(folder, "bug")
    assert codes == [1, 1] and lines[0].startswith("Traceback") and lines[-1] == "KeyError: 'a name that is missing'"
    assert sum(line.startswith("Traceback") for line in lines) == 1


def test_a_reward_that_scores_no_row_of_one_process_ends_nothing(folder):
    codes, lines = said(folder, "none_of_one_rank")
    assert codes == [0, 0] and "teach nothing" in "".join(lines)
    assert json.loads((folder / "none_of_one_rank.0.out").read_text())["reward_last"] > 0


def test_a_stop_saves_and_a_failure_leaves_what_was_saved(folder):
    assert (folder / "SIGTERM" / "checkpoint-2" / "trainer_state.json").is_file()
    for kind in ("not_finite", "bad_row"):
        assert [path.name for path in (folder / kind).glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((folder / "save_of_second").glob("checkpoint-*"))
