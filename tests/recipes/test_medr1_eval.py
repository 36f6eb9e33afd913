"""The evaluation recipe from flags to run folder, with a random checkpoint in the real format."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaConfig

from engine.command.main import run_command
from engine.errors import InputError
from engine.export.provenance import measured
from models.loading import load_policy
from recipes.medr1_eval import EvaluationArguments, main
from tests.tiny_qwen import save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (56 + 28 * (i % 2), 56, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        problem = f"What imaging technique is used? {'Look closely. ' * i}A)CT, B)MRI, C)X-Ray"
        modality = "CT" if i < 2 else "MRI"
        rows.append(
            {"image": f"{i}.png", "problem": problem, "solution": f"<answer> {'ABC'[i % 3]} </answer>", "modality": modality}
        )
    (tmp_path / "test.json").write_text(json.dumps(rows))
    return tmp_path / "test.json"


def ask(checkpoint, data, output, *flags) -> dict:
    return main(["--model", checkpoint, "--data", str(data), "--max_new_tokens", "6", "--output_dir", str(output), *flags])


def test_the_run_folder_holds_scores_chart_and_report(checkpoint, data, tmp_path):
    headline = ask(checkpoint, data, tmp_path / "run", "--batch_size", "2")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "evaluation.json", "accuracy.png", "report.html"}
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert headline["num_samples"] == 5 and headline["output"] == str(tmp_path / "run")
    assert (
        written["scores"]["overall"]["accuracy"] == headline["accuracy"]
        and headline["low"] <= headline["accuracy"] <= headline["high"]
    )
    assert [result["row"] for result in written["results"]] == [0, 1, 2, 3, 4]
    (told,) = measured(tmp_path / "run")  # as a bundle's manifest has it
    assert {end: told[end] for end in ("low", "high")} == {end: headline[end] for end in ("low", "high")} and told["data_sha256"]
    assert {name: score["num_samples"] for name, score in written["scores"]["modality"].items()} == {"CT": 2, "MRI": 3}


def test_the_starter_policy_is_asked_as_it_was_trained_and_others_as_published():
    assert EvaluationArguments().template == "train_think"
    assert EvaluationArguments(model="Qwen/Qwen2.5-VL-3B-Instruct").template == "think"


def test_answers_do_not_depend_on_the_batch(checkpoint, data, tmp_path):
    outputs = []
    for size in (1, 4):
        ask(checkpoint, data, tmp_path / f"run{size}", "--batch_size", str(size), "--template", "zeroshot")
        results = json.loads((tmp_path / f"run{size}" / "evaluation.json").read_text())["results"]
        outputs.append([result["model_output"] for result in results])
    assert outputs[0] == outputs[1] and len(set(outputs[0])) > 1


def test_a_bad_row_can_be_skipped_and_is_listed(checkpoint, data, tmp_path):
    (data.parent / "3.png").unlink()
    with pytest.raises(InputError, match="test.json: row 3: image '3.png'"):
        ask(checkpoint, data, tmp_path / "run")
    headline = ask(checkpoint, data, tmp_path / "run", "--on_bad_row", "skip", "--limit", "4")
    assert headline["num_samples"] == 3
    assert "row 3: image" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--modle", "x"], "error: unknown flag --modle, did you mean --model? (--help lists the flags)"),
        (["--batch_size", "0"], "error: --batch_size 0: expected a number, at least 1"),
        (["--template", "thinking"], "invalid choice: 'thinking' (choose from 'think', 'nothink', 'zeroshot', 't"),
        (["--data", "gone.json"], "error: gone.json"),
        (["--model", "TEXT_ONLY", "--data", "DATA"], "a text-only checkpoint (model_type 'llama'); a Qwen2-VL or Qwen2.5-VL"),
        (["--model", "./gone", "--data", "DATA"], "error: --model: ./gone: no checkpoint there"),
    ],
)
def test_what_cannot_be_used_is_one_line(flags, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    places = {"TEXT_ONLY": str(tmp_path / "llama"), "DATA": str(data)}
    with pytest.raises(SystemExit) as end:
        run_command(main, [places.get(flag, flag) for flag in flags])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_published_files_are_read_as_they_are(checkpoint, mini_data, tmp_path):
    headline = ask(checkpoint, mini_data / "omnimedvqa_test.json", tmp_path / "run", "--limit", "3", "--max_pixels", "50176")
    assert headline["num_samples"] == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_tower_attends_as_it_is_asked_to(checkpoint, attention):
    policy = EvaluationArguments(model=checkpoint, attn_implementation=attention).load(load_policy)
    assert policy.base.model.visual.config._attn_implementation.startswith(attention)
