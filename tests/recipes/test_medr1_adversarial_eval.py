"""`recipes.medr1_adversarial_eval`: accuracies, what the run folder holds, the published variant, and mistakes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from engine.data.starter.questions import build_starter_data
from engine.errors import InputError
from engine.tasks.published import AdvMedScoring
from recipes.medr1_adversarial_eval import main
from recipes.medr1_eval import main as evaluate_clean

FEW = ["--limit", "48", "--max_new_tokens", "32", "--pgd_iters", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the starter policy and what its main returned."""
    folder = tmp_path_factory.mktemp("run")
    return folder, main([*FEW, "--save_sample_images", "2", "--output_dir", str(folder)])


def results(folder, name: str) -> list[dict]:
    return json.loads((folder / f"evaluation_{name}.json").read_text())["results"]


def test_attacks_lower_accuracy_and_pgd_lowers_it_most(run):
    headline = run[1]
    assert headline["num_samples"] == 48
    assert headline["accuracy_clean"] > headline["accuracy_fgsm"] >= headline["accuracy_pgd"]
    assert set(headline["by_modality"]) == {"clean", "fgsm", "pgd"}


def test_clean_answers_are_those_of_the_plain_evaluation(run, tmp_path):
    headline = evaluate_clean([*FEW[:4], "--output_dir", str(tmp_path)])
    assert headline["accuracy"] == run[1]["accuracy_clean"]
    plain = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [result["model_output"] for result in plain] == [result["model_output"] for result in results(run[0], "clean")]


def test_what_was_wrong_stays_as_it_was(run):
    clean, pgd = results(run[0], "clean"), results(run[0], "pgd")
    assert all(a["model_output"] == b["model_output"] for a, b in zip(clean, pgd, strict=True) if not a["correct"])


def test_the_run_folder_tells_it_all(run):
    folder, headline = run
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("clean", "fgsm", "pgd"):
        assert summary[name]["overall"]["accuracy"] == headline[f"accuracy_{name}"]
        assert (folder / f"accuracy_{name}.png").stat().st_size > 0
    report = (folder / "report.html").read_text()
    shown = " ".join(re.sub("<[^>]+>", " ", report).split())
    assert "whose answer the last attack changed" in shown and report.count("<img") > 0
    assert "Success of attacks" in shown and "difference times 10 around grey" in shown
    assert all(f"{100 * headline[f'accuracy_{name}']:.1f} %" in shown for name in ("clean", "fgsm", "pgd"))


def test_kept_images_are_within_epsilon_of_the_question_s(run):
    """The starter images have the size the model sees, so that the files can be compared pixel by pixel."""
    originals = [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in sorted(build_starter_data().rglob("*.png"))]
    for name in ("fgsm", "pgd"):
        kept = sorted((run[0] / "images" / name).glob("*.png"))
        assert len(kept) == 2
        for path in kept:
            attacked = np.asarray(Image.open(path)).astype(int)
            changes = [np.abs(attacked - original).max() for original in originals if original.shape == attacked.shape]
            assert 0 < min(changes) <= 7  # 0.03 of 255


def test_the_published_variant_attacks_every_question_and_reads_as_its_scripts_do(tmp_path):
    headline = main([*FEW, "--limit", "16", "--attack_type", "fgsm", "--compat", "reference", "--output_dir", str(tmp_path)])
    assert "accuracy_pgd" not in headline and not (tmp_path / "evaluation_pgd.json").exists()
    for result in results(tmp_path, "clean"):
        gold = result["ground_truth"].removeprefix("<answer>").removesuffix("</answer>").strip()
        assert result["correct"] == (AdvMedScoring().read(result["model_output"], {}, "") == gold)


def test_what_an_attack_did_is_counted_over_what_it_attacked(run):
    clean, pgd = results(run[0], "clean"), results(run[0], "pgd")
    summary = json.loads((run[0] / "summary.json").read_text())["pgd"]
    before = [result["correct"] for result in clean]
    made_wrong = [not after["correct"] for was_right, after in zip(before, pgd, strict=True) if was_right]
    share = summary["success_rate"]
    assert (share["num_correct"], share["num_samples"]) == (sum(made_wrong), sum(before))
    assert run[1]["success_rate_pgd"] == share["accuracy"] > 0
    assert summary["accuracy_drop"] == pytest.approx(run[1]["accuracy_clean"] - run[1]["accuracy_pgd"])
    attacked = [result for result in pgd if "linf" in result]
    assert len(attacked) == sum(before) and all(0 < result["linf"] <= 7 / 255 + 1e-6 for result in attacked)
    assert all(result["linf"] <= result["l2"] for result in attacked)
    assert summary["logprob_drop"] == pytest.approx(sum(r["logprob_drop"] for r in attacked) / len(attacked)) and (
        summary["logprob_drop"] > json.loads((run[0] / "summary.json").read_text())["fgsm"]["logprob_drop"] > 0
    )


def test_the_published_layout_is_written_besides(tmp_path):
    flags = ["--limit", "8", "--max_new_tokens", "32", "--output_dir", str(tmp_path / "run"), "--output_path"]
    main([*flags, str(tmp_path / "fgsm.json"), "--attack_type", "fgsm"])
    published = json.loads((tmp_path / "fgsm.json").read_text())
    assert list(published)[:8] == (
        ["test_data_path", "attack_type", "epsilon", "pgd_alpha", "pgd_iters", "accuracy", "num_samples", "num_correct"]
    )
    assert published["attack_type"] == "fgsm" and published["epsilon"] == 0.03 and published["pgd_alpha"] is None
    assert published["accuracy"] == 100 * published["num_correct"] / 8
    ours = results(tmp_path / "run", "fgsm")
    for theirs, result in zip(published["detailed_results"], ours, strict=True):
        assert theirs["correct"] == result["correct"] == (theirs["model_answer"] == theirs["gt_answer"])
        assert theirs["gt_answer"] in "ABCD" and theirs["ground_truth"] == result["ground_truth"]
    main([*flags, str(tmp_path / "each.json"), "--attacks", "clean", "fgsm", "pgd", "--pgd_iters", "1"])
    assert {path.name for path in tmp_path.glob("*.json")} == {"fgsm.json", "each_clean.json", "each_fgsm.json", "each_pgd.json"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attacks", "cw"], "--attacks cw: expected fgsm or pgd"),
        (["--epsilon", "8"], "--epsilon 8.0: expected a number, more than 0 and at most 1"),
        (["--epsilon", "0"], "--epsilon 0.0: expected a number, more than 0"),
        (["--pgd_iters", "0"], "--pgd_iters 0: expected a number, at least 1"),
        (["--data", "nowhere.json"], "nowhere.json: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flags, message):
    with pytest.raises(InputError) as error:
        main([*flags, "--output_dir", str(tmp_path)])
    assert message in str(error.value) and "\n" not in str(error.value)
