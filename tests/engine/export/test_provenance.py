"""A bundle's manifest says what our own files say of a model: its accuracy with the interval, and the rows it was trained on."""

import json
from dataclasses import replace

import pytest

from engine.errors import InputError
from engine.evaluation.score import Score
from engine.export.bundle import sha256
from engine.export.provenance import measured, training_rows
from engine.tasks.evaluation import Evaluation

DIGEST = "ab" * 32
WRITTEN = Evaluation([], {}, {"accuracy": Score(9, 12).as_dict(), "loss": 0.5}, summary={"rows": f"12 {DIGEST}"})


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation_after.json"])
def test_a_run_folder_or_its_file_gives_each_share_with_its_interval(tmp_path, name):
    WRITTEN.write(tmp_path / name)
    (entry,) = measured(tmp_path)
    assert entry == measured(tmp_path / name)[0]
    low, high = Score(9, 12).interval
    numbers = {"measure": "accuracy", "value": 0.75, "low": low, "high": high, "rows": 12}
    assert entry == {**numbers, "data_sha256": DIGEST, "evaluation_sha256": sha256(tmp_path / name)}
    replace(WRITTEN, summary={}).write(tmp_path / name)
    assert measured(tmp_path)[0]["data_sha256"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no evaluation.json there"),
        ("", "not an evaluation"),
        ("[1]", "not an evaluation"),
        ('{"shown": {"measures": {"accuracy": {"accuracy": "much"}}}}', "not an evaluation"),
        ('{"shown": {"measures": {"loss": 0.5}}}', "no accuracy is in it"),
    ],
)
def test_what_is_no_evaluation_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=f"^--evaluation .*: {message}.*$"):
        measured(tmp_path)
    with pytest.raises(InputError, match="gone.json: cannot be read"):
        measured(tmp_path / "gone.json")


def test_a_checkpoint_of_ours_says_which_rows_it_was_trained_on(tmp_path):
    assert training_rows(tmp_path) is None
    for rows, expected in (({"training": f"7 {DIGEST}"}, DIGEST), ({"training": None}, None), ([], None)):
        (tmp_path / "manifest.json").write_text(json.dumps({"rows": rows}))
        assert training_rows(tmp_path) == expected
