"""`--compat reference` on all of reward_golden.json, as a training step computes it: all answers at once, given as messages.

Value by value, in double precision, the same strings are compared in test_published.py (rewards and answers that are read),
skin/test_task.py (the skin rewards, overlap of boxes) and tests/engine/data/test_lesion_boxes.py (regions).
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from trl.rewards import think_format_reward

from engine.tasks.published import scoring
from engine.tasks.rewards import RewardFunctions
from engine.tasks.skin.published import skin_rewards

# What each column of the file is compared with; a column that is new has to be compared too.
COMPARED = {
    "medr1_accuracy medr1_format_think": "medr1_train_think",
    "medr1_accuracy_nothink_script medr1_format_nothink": "medr1_train_nothink",
    "medvlm_accuracy medvlm_format": "medvlm_train_complex",
}
READ = (
    "medr1_extract medr1_nothink25_answer medr1_correct advmed_extract advmed_correct medvlm_complex_extract medvlm_complex_correct"
)
NO_SYSTEMS = {"open_r1_multimodal_format"}  # of the code that MedVLM-R1's is built on; no system trains with it
SKIN = {
    "reference": "r403030_mask_found",
    "reference_no_mask": "r403030_mask_path_missing",
    "reference_head": "head_503020_plus_quality",
    "reference_hf": "hf_script_603010",
}
OPTIONS = {"A": "MRI", "B": "X-ray", "C": "CT", "D": "Ultrasound"}


@pytest.fixture(scope="module")
def file(golden) -> dict:
    return json.loads((golden / "grpo" / "reward_golden.json").read_text())


def text_of(completion: str | dict) -> str:
    if isinstance(completion, str):
        return completion
    before, unit, count, after = completion["repeat"]
    return before + unit * count + after


def rewards_of(functions, rows: list[dict], texts: list[str]) -> torch.Tensor:
    """(N, F), as a trainer has them."""
    rows = [{"prompt": [{"role": "user", "content": "?"}], **row} for row in rows]
    return RewardFunctions(functions)(rows, texts, [[0]] * len(texts), step=1, state=None)


def column(cases: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([float(case[name]) for case in cases])


def test_every_group_and_column_of_the_file_is_compared(file):
    assert {name for name in file if name not in ("versions", "solution_medr1", "solution_medvlm")} == {
        "vqa",
        "skin",
        "skin_calculate_iou",
        "skin_region_naming_19accca",
    }
    read = {f"eval_{name}" for name in [*READ.split(), "medvlm_simple_correct"]}
    rewarded = {name for names in COMPARED for name in names.split()} | {"trl_think_format"}
    assert {name for case in file["vqa"] for name in case} == {"completion"} | read | rewarded | NO_SYSTEMS
    parts = {"diagnosis_match", "spatial", "mask_iou"}
    assert {name for case in file["skin"] for name in case} == {"completion", "ground_truth", "bbox", "mask"} | parts | set(
        SKIN.values()
    )


@pytest.mark.parametrize("names", COMPARED)
def test_a_step_gives_the_published_rewards(file, names):
    template, cases = COMPARED[names], file["vqa"]
    solution = file["solution_medvlm" if template.startswith("medvlm") else "solution_medr1"]
    rows = [{"solution": solution, "answer": "C", "options": OPTIONS, "problem": "?"}] * len(cases)
    rewards = rewards_of(scoring(template, "reference").rewards(template), rows, [text_of(case["completion"]) for case in cases])
    assert len(cases) == 81 and torch.equal(rewards, torch.stack([column(cases, name) for name in names.split()], 1))


def test_trls_own_format_reward_runs_unchanged_on_all_of_them(file):
    cases = file["vqa"]
    rewards = rewards_of([think_format_reward], [{}] * len(cases), [text_of(case["completion"]) for case in cases])
    assert torch.equal(rewards[:, 0], column(cases, "trl_think_format"))


@pytest.mark.parametrize("compat", SKIN)
def test_a_step_gives_the_published_skin_reward(file, tmp_path, compat):
    pixels = np.zeros((450, 600), np.uint8)
    pixels[150:300, 200:400] = 255
    Image.fromarray(pixels).save(tmp_path / "lesion_segmentation.png")
    rest = {"dx": "mel", "localization": "back", "mask": str(tmp_path / "lesion_segmentation.png")}
    rows = [{"solution": case["ground_truth"], "bbox": case["bbox"], **rest} for case in file["skin"]]
    functions, weights = skin_rewards(compat)
    rewards = rewards_of(functions, rows, [text_of(case["completion"]) for case in file["skin"]])
    torch.testing.assert_close(rewards @ torch.tensor(weights), column(file["skin"], SKIN[compat]), atol=1e-6, rtol=0)
