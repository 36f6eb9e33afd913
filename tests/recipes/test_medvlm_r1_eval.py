"""MedVLM-R1's evaluation reads its published test file, asks its prompts and scores each modality."""

import gzip
import json

import pytest
from PIL import Image

from engine.command.main import run_command
from engine.errors import InputError
from engine.runs.evaluate import load_questions_of
from recipes.medvlm_r1_eval import EvaluationArguments, main
from tests.tiny_qwen import noise_image, save_tiny

SUBSETS = ["MR (Mag-netic Resonance Imaging)"] * 3 + ["CT(Computed Tomography)"] * 3 + ["X-Ray"] * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"), "qwen2_vl")


@pytest.fixture
def data(tmp_path) -> str:
    """Nine rows with the keys and the order of MRI_CT_XRAY_300each_dataset.json."""
    (tmp_path / "images").mkdir()
    rows = []
    for i, subset in enumerate(SUBSETS):
        noise_image(i).save(tmp_path / "images" / f"{i}.png")
        texts = ["Hemorrhage", "Acute infarct", "Abscess formation", "Chronic infarct"][: 2 + i % 3]
        rows.append(
            {
                "image": [f"images/{i}.png"],
                "problem": f"What is apparent in image {i}?\n"
                + "\n".join(f"{x}) {text}" for x, text in zip("ABCD", texts, strict=False)),
                "solution": "B",
                "question": f"What is apparent in image {i}?",
                "options": texts,
                "answer": texts[1],
                "dataset": "OmniMedVQA",
                "subset": subset,
            }
        )
    (tmp_path / "MRI_CT_XRAY_300each_dataset.json").write_text(json.dumps(rows))
    return str(tmp_path / "MRI_CT_XRAY_300each_dataset.json")


def ask(checkpoint, data, output, *flags) -> dict:
    return main(["--model", checkpoint, "--data", data, "--max_new_tokens", "6", "--output_dir", str(output), *flags])


def test_the_published_file_is_scored_per_modality_with_intervals(checkpoint, data, tmp_path):
    headline = ask(checkpoint, data, tmp_path / "run")
    assert headline["num_samples"] == 9 and set(headline["by_modality"]) == set(SUBSETS)
    for score in headline["by_modality"].values():
        assert score["num_samples"] == 3 and 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["template"] == "medvlm_eval_complex" and written["scores"]["modality"] == headline["by_modality"]


@pytest.mark.parametrize("modality, rows", [("MRI", [0, 1, 2]), ("CT", [3, 4, 5]), ("Xray", [6, 7, 8])])
def test_a_modality_is_what_the_published_script_slices(checkpoint, data, tmp_path, modality, rows):
    flags = ["--modality", modality, "--prompt_type", "simple", "--compat", "reference"]
    assert ask(checkpoint, data, tmp_path / "run", *flags)["num_samples"] == 3
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [result["row"] for result in written["results"]] == rows
    assert (written["template"], written["compat"]) == ("medvlm_eval_simple", "reference")
    assert all(result["extracted_answer"] == result["model_output"] for result in written["results"])


def test_the_starter_policy_is_asked_as_it_was_trained_and_others_as_published():
    assert EvaluationArguments().prompt_type == "train_complex"
    published = EvaluationArguments(model="JZPeterPan/MedVLM-R1")
    assert (published.prompt_type, published.max_new_tokens) == ("complex", 512)


def test_without_data_the_three_modalities_of_the_starter_questions_are_asked(checkpoint, tmp_path):
    headline = main(["--model", checkpoint, "--max_new_tokens", "2", "--limit", "12", "--output_dir", str(tmp_path / "run")])
    assert headline["num_samples"] == 12 and set(headline["by_modality"]) == {"CT", "MRI", "X-Ray"}


def test_the_other_modalities_are_asked_about_where_the_data_have_them(checkpoint, tmp_path):
    flags = ["--model_path", checkpoint, "--max_new_tokens", "2", "--limit", "3", "--output_dir", str(tmp_path / "run")]
    for name, label in {"Fundus": "Fundus photography", "Ultrasound": "Ultrasound", "Microscopy": "Microscopy"}.items():
        assert set(main([*flags, "--modality", name])["by_modality"]) == {label}


def test_the_published_command_line_and_its_file(checkpoint, data, tmp_path):
    flags = ["--modality", "MRI", "--prompt_type", "complex", "--model_path", checkpoint, "--bsz", "1", "--prompt_path", data]
    flags += ["--base_path", str(tmp_path), "--max_new_tokens", "6", "--do_sample", "false", "--temperature", "1.0"]
    main([*flags, "--output_path", str(tmp_path / "Ours.json"), "--output_dir", str(tmp_path / "run")])
    published = json.loads((tmp_path / "Ours.json").read_text())
    assert list(published) == ["accuracy", "results"] and len(published["results"]) == 3
    assert all(list(r) == ["question", "ground_truth", "model_output", "extracted_answer"] for r in published["results"])


def test_drawn_answers_depend_on_seed_and_temperature_but_not_on_the_batch(checkpoint, data, tmp_path):
    def answers(*flags):
        ask(checkpoint, data, tmp_path / "run", *flags)
        return [result["model_output"] for result in json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]]

    drawn = answers("--do_sample", "--batch_size", "9")
    assert drawn == answers("--do_sample", "--batch_size", "2") != answers()
    assert drawn != answers("--do_sample", "--seed", "1") and len(set(drawn)) > 1
    assert answers("--do_sample", "--temperature", "0.001") == answers()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--modality", "PET"], "invalid choice: 'PET' (choose from 'CT', 'Dermoscopy', 'Fundus', 'MRI', "),
        (["--prompt_type", "think"], "invalid choice: 'think' (choose from 'complex', 'simple', 'train_complex')"),
        (["--do_sample", "true", "--temperature", "0"], "--temperature 0.0: expected a number, more than 0"),
        (["--max_new_tokens", "0"], "--max_new_tokens 0: expected a number, at least 1"),
        (["--data", "CT.json", "--modality", "MRI"], "CT.json: no row about MRI (expected such a `modality` or `subset`)"),
    ],
)
def test_what_cannot_be_used_is_one_line(data, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = json.loads((tmp_path / "MRI_CT_XRAY_300each_dataset.json").read_text())
    (tmp_path / "CT.json").write_text(json.dumps(rows[3:6]))
    with pytest.raises(SystemExit) as end:
        run_command(main, flags)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err


def test_the_published_file_of_900_rows_is_read_as_published(checkpoint, published_rows, tmp_path):
    """MedVLM-R1's published questions in the layout of their file, three of them twice: 300 rows a modality, in the order of the
    file; images lie below --dataset_root, not beside the file, each the one that its row names."""
    with gzip.open(published_rows, "rt", encoding="utf-8") as file:
        questions = [row for row in map(json.loads, file) if "options" in row]
    assert len(questions) == 897
    rows, root = [], tmp_path / "Huatuo"
    (root / "images").mkdir(parents=True)
    for i, question in enumerate([*questions, *questions[:3]]):
        name = f"images/{'brain chest lung'.split()[i // 300]}{i:06d}.png"
        Image.new("RGB", (28, 28), (i % 256, i // 256, 0)).save(root / name)
        problem, answer = question["problem"], question["options"]["ABCDEFGHIJ".index(question["solution"])]
        own = {"question": problem.partition("\n")[0], "answer": answer, "dataset": "OmniMedVQA", "subset": SUBSETS[i // 300 * 3]}
        rows.append({"image": [name], **question, **own})
    path = tmp_path / "prompts" / "MRI_CT_XRAY_300each_dataset.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows), encoding="utf-8")

    arguments = EvaluationArguments(data=[str(path)], image_root=str(root))
    read = load_questions_of(arguments)
    assert len(read) == 900 and not read.skipped
    for i in range(900):
        row = read[i]
        assert row["answer"] == rows[i]["solution"] and row["problem"] == rows[i]["problem"]
        assert list(row["options"].values()) == [text.strip() for text in rows[i]["options"]]
        assert row["images"][0].getpixel((0, 0)) == (i % 256, i // 256, 0)
    for block, name in enumerate(("MRI", "CT", "X-Ray")):
        assert [r["row"] for r in load_questions_of(arguments, [name]).records] == list(range(300 * block, 300 * block + 300))

    flags = [
        "--model_path",
        checkpoint,
        "--prompt_path",
        str(path),
        "--dataset_root",
        str(root),
        "--max_new_tokens",
        "1",
        "--bsz",
        "100",
    ]
    headline = main([*flags, "--output_dir", str(tmp_path / "run")])
    assert headline["num_samples"] == 900 and {score["num_samples"] for score in headline["by_modality"].values()} == {300}
    with pytest.raises(InputError, match=r"row 0: image 'images/brain000000.png': no such image file"):
        main([*flags[:4], "--output_dir", str(tmp_path / "other")])
