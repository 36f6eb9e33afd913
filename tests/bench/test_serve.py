"""The bench of served bundles: providers are processes that agree before they are timed; one that cannot run is named."""

import json
import sys

import pytest

from bench.medsam_dice import MINI
from bench.serve import vlm
from bench.serve.providers import Worker, cpu_seconds
from bench.serve.segmenter import compare, headline, prepare, python_worker
from engine.errors import InputError
from models.checkpoint import CheckpointError
from models.sam.loading import lite_medsam_checkpoint

ECHO = "import sys\nprint('{}', flush=True)\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n"


@pytest.fixture(scope="module")
def checkpoint():
    try:
        return lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))


def broken(log):
    return Worker([sys.executable, "-c", "raise SystemExit('this runtime is for another machine')"], log)


def test_a_worker_answers_line_by_line_and_its_time_is_its_own(tmp_path):
    worker = Worker([sys.executable, "-c", ECHO], tmp_path / "log")
    assert worker.ask({"image": "a.png", "box": [1, 2]}) == {"image": "a.png", "box": [1, 2]}
    assert 0 < cpu_seconds(worker.watched) < 60
    worker.close()
    with pytest.raises(RuntimeError, match="this runtime is for another machine"):
        broken(tmp_path / "log")


@pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/mini is not here")
def test_providers_are_compared_and_timed(checkpoint, tmp_path, capsys):
    """Python in the place of the binary, which tests/engine/serve drives."""
    cases = prepare(MINI, 2, checkpoint, tmp_path)
    eager = lambda log: python_worker("eager", checkpoint, log)  # noqa: E731
    result = compare({"cpp": eager, "eager": eager, "openvino": broken}, cases, 1, tmp_path)
    assert result["seg_min_iou"] == 1 and result["seg_ms_cpp"] > 0 and result["seg_ms_best_peer"] is None
    assert result["seg_left_out"] == {"openvino": "this runtime is for another machine"} and result["seg_rss_mb"] > 100
    assert "openvino     left out: this runtime is for another machine" in capsys.readouterr().out
    with pytest.raises(InputError, match="cpp: this runtime is for another machine"):
        compare({"cpp": broken, "eager": eager}, cases, 1, tmp_path)


def says(answer):
    """A process that gives every question this answer."""
    script = f"import sys\nprint('{{}}', flush=True)\nfor line in sys.stdin:\n    print({json.dumps(answer)!r}, flush=True)\n"
    return lambda log: Worker([sys.executable, "-c", script], log)


def test_vlms_are_compared_and_who_says_something_else_is_named(tmp_path):
    cases = [vlm.Case(tmp_path / "a.png", "?")] * 2
    eager, other = says({"text": "CT", "tokens": 2}), says({"text": "CT.", "tokens": 3})
    result = vlm.compare({"cpp": eager, "eager": eager, "mistralrs": other, "xllamacpp": broken}, cases, 1, tmp_path)
    assert result["vlm_same_answers"] == {"cpp": "2 of 2", "mistralrs": "0 of 2"} and result["vlm_best_peer"] == "mistralrs"
    assert result["vlm_left_out"] == {"xllamacpp": "this runtime is for another machine"} and result["vlm_tokens_per_s_cpp"] > 0
    with pytest.raises(InputError, match="the greedy answers differ: .*'CT.'.* by the binary"):
        vlm.compare({"cpp": other, "eager": eager}, cases, 1, tmp_path)


def test_the_best_peer_is_the_fastest():
    result = headline({"cpp": 100.0, "eager": 150.0, "openvino": 80.0, "onnxruntime": 90.0}, {})
    assert (result["seg_best_peer"], result["seg_speedup_eager"], result["seg_speedup_best_peer"]) == ("openvino", 1.5, 0.8)
