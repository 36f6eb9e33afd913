"""A killed evaluation goes on where it stopped, and ends as one that was not; of another model or other rows nothing is kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.command.evaluation_settings import EvaluationSettings
from engine.command.run_folder import open_run
from engine.data.rows import Rows
from engine.rollout.answers import Answer
from engine.runs.evaluate import run_evaluation
from engine.tasks.masks import MaskTask


class Lesions(Rows):
    def open(self, handle):
        return {"image": np.zeros((8, 8, 3), np.uint8), "mask": np.eye(8, dtype=np.uint8) * 255}

    def select(self, indices):
        return Lesions([self.records[i] for i in indices], [None for _ in indices])


class Shown(MaskTask):
    """Without pictures."""

    def samples(self, evaluation, rows, answers, count=12):
        return []


def rows(num: int, question: str = "Where?") -> Rows:
    told = {
        "question": question,
        "answer": "Top left.",
        "position": "top left",
        "dataset": "demo",
        "source": "x.csv",
        "label": None,
    }
    return Lesions([told | {"row": i, "image_id": f"{i:02d}"} for i in range(num)], [None] * num)


def answer(row: dict) -> Answer:
    mask = np.random.default_rng(row["row"]).integers(0, 256, (8, 8)).astype(np.uint8)
    return Answer("top left", mask, {"seen": row["row"]})


def run(folder: Path, asked: list, data: Rows, of: str = "m", die_at: int | None = None, batch_size: int = 2) -> None:
    def answers(batch):
        if die_at is not None and len(asked) >= die_at:
            raise KeyboardInterrupt
        asked.extend(row["row"] for row in batch)
        return [answer(row) for row in batch]

    settings = EvaluationSettings(batch_size=batch_size, output_dir=str(folder))
    run_evaluation(open_run("demo", folder), "Demo", answers, Shown(), data, settings, of=of)


def test_it_goes_on_where_it_stopped_to_the_same_numbers(tmp_path):
    run(tmp_path / "whole", [], rows(9))
    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", first, rows(9), die_at=5)
    kept = tmp_path / "killed" / ".results_0.jsonl"
    kept.write_text(kept.read_text()[:-20])  # and the last line was cut by the kill
    run(tmp_path / "killed", second, rows(9))
    assert first == [0, 1, 2, 3, 4, 5] and second == [4, 5, 6, 7, 8]
    ends = [(tmp_path / name / "evaluation.json").read_bytes() for name in ("whole", "killed")]
    assert ends[0] == ends[1] and len(json.loads(ends[0])["results"]) == 9
    assert not kept.exists()


@pytest.mark.parametrize(
    ("data", "options"), [(rows(9), {"of": "another"}), (rows(9, "What?"), {}), (rows(8), {}), (rows(9), {"batch_size": 3})]
)
def test_what_was_asked_otherwise_is_asked_again(tmp_path, data, options):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [], rows(9), die_at=4)
    asked = []
    run(tmp_path, asked, data, **options)
    assert len(asked) == len(data)


def test_a_model_trained_again_is_asked_again(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_text("a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", [], rows(6), of=str(tmp_path / "m"), die_at=4)
    (tmp_path / "m" / "model.safetensors").write_text("b")
    asked = []
    run(tmp_path / "run", asked, rows(6), of=str(tmp_path / "m"))
    assert len(asked) == 6


@pytest.mark.parametrize("text", ["", "{", "[]\n[]", '{"asked": 1}\n{"place": 0, "result": {}}', "\x00" * 100])
def test_a_damaged_file_is_begun_anew(tmp_path, text):
    tmp_path.joinpath(".results_0.jsonl").write_text(text)
    asked = []
    run(tmp_path, asked, rows(3))
    assert asked == [0, 1, 2]
