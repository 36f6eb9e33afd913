"""Rewards of skin lesion answers: the published scores where asked for, sound ones by default, and quick on any text."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from engine.data.lesions import DIAGNOSES, QUESTIONS, ask
from engine.tasks.skin.answers import box_iou, read_box, read_diagnosis, read_region
from engine.tasks.skin.published import skin_rewards

RECORD = {
    "dx": "mel",
    "diagnosis": "melanoma",
    "bbox": [200.0, 150.0, 400.0, 300.0],
    "localization": "back",
    "spatial_description": "lesion located in center-center region",
    "mask": None,
}


def score(text: str, question: str = "box", compat: str = "default", **changed) -> dict[str, float | None]:
    row = RECORD | {"question_type": question, "solution": ask(question, RECORD)[1]} | changed
    columns = {key: [value] for key, value in row.items()}
    return {reward.__name__: reward([QUESTIONS[question]], [text], **columns)[0] for reward in skin_rewards(compat)[0]}


def total(text: str, compat: str, **changed) -> float:
    return sum(
        weight * value
        for weight, value in zip(skin_rewards(compat)[1], score(text, "location", compat, **changed).values(), strict=True)
    )


@pytest.fixture(scope="module")
def cases(golden) -> list[dict]:
    return json.loads((golden / "grpo" / "reward_golden.json").read_text())["skin"]


@pytest.fixture(scope="module")
def mask(tmp_path_factory) -> str:
    """The mask of all golden cases."""
    pixels = np.zeros((450, 600), np.uint8)
    pixels[150:300, 200:400] = 255
    path = tmp_path_factory.mktemp("masks") / "lesion_segmentation.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_reference_rewards_are_the_published_ones_on_every_golden_string(cases, mask):
    assert len(cases) == 32
    for case in cases:
        text, truth = case["completion"], {"solution": case["ground_truth"], "bbox": case["bbox"]}
        parts = score(text, "location", "reference", mask=mask, **truth)
        published = {"diagnosis": float(case["diagnosis_match"]), "spatial": case["spatial"], "segmentation": case["mask_iou"]}
        assert parts == pytest.approx(published, abs=1e-12), text
        for compat, key, path in [
            ("reference", "r403030_mask_found", mask),
            ("reference_no_mask", "r403030_mask_path_missing", mask),
            ("reference_head", "head_503020_plus_quality", mask),
            ("reference_hf", "hf_script_603010", mask),
        ]:
            assert total(text, compat, mask=path, **truth) == pytest.approx(case[key], abs=1e-12), (compat, text)


def test_overlap_is_the_published_one_on_every_golden_pair(golden):
    pairs = json.loads((golden / "grpo" / "reward_golden.json").read_text())["skin_calculate_iou"]
    assert len(pairs) == 10
    for pair in pairs:
        assert box_iou(pair["pred"], pair["gt"]) == pytest.approx(pair["iou"], abs=1e-6), pair


@pytest.mark.parametrize(
    "expression", ["[__import__('os')]", "[1, 2, 3, 2+2]", "[1, 2, 3]", "[1e3, 0, 1, 1]", "[[200, 150, 400, 300]", "] [1, 2, 3, 4"]
)
def test_reference_rewards_read_numbers_and_evaluate_nothing(expression, mask):
    assert score(f"melanoma {expression}", "location", "reference", mask=mask)["segmentation"] == 0


def test_reference_boxes_are_python_slices(mask):
    """Negative sides count from the far side, and a list may end with a comma."""
    for box in ("[200, 150, 400, 300,]", "[-400, -300, -200, -150]", "[200.9, 150.9, 400.9, 300.9]", "[+200,150 , 400,300]"):
        assert score(box, "location", "reference", mask=mask)["segmentation"] == 1, box


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_to_learn_scores_full_marks(question):
    scores = score(ask(question, RECORD)[1], question)
    asked = {"diagnosis": 1, "location": 1, "box": 1, "format": 1}
    if question == "diagnosis":
        asked["location"] = None
    if question in ("diagnosis", "location"):
        asked["box"] = None
    assert scores == asked
    assert skin_rewards()[1] == [0.4, 0.3, 0.3, 0.0]


@pytest.mark.parametrize(
    "text, code",
    [
        *((f"This appears to be {name}.", code) for code, name in DIAGNOSES.items()),
        *((f"<diagnosis>{code.upper()}</diagnosis>", code) for code in DIAGNOSES),
        ("THIS APPEARS TO BE MELANOMA.", "mel"),
        ("a  melanocytic\nnevus", "nv"),
        ("Nevus", "nv"),
        ("naevi", "nv"),
        ("not a melanoma but a dermatofibroma", "df"),
        ("a vascular lesion rather than melanoma", "vasc"),
        ("melanoma or melanocytic nevus", None),
        ("melanoma, vascular lesion, nevus", None),
        ("This is not melanoma.", None),
        ("mel", None),
        ("nonmelanoma", None),
        ("", None),
        ("melanoma? <diagnosis>nv</diagnosis>", "nv"),
        ("<diagnosis>nv</diagnosis> so <diagnosis>melanoma</diagnosis>", "mel"),
        ("<diagnosis>melanoma", "mel"),
        ("<diagnosis></diagnosis> melanoma", None),
    ],
)
def test_a_text_that_names_one_diagnosis_has_it(text, code):
    assert read_diagnosis(text) == code


@pytest.mark.parametrize(
    "text, region",
    [
        ("The lesion is located in the upper-left region.", "upper-left"),
        ("in the TOP LEFT", "upper-left"),
        ("in the middle-right part", "center-right"),
        ("lower center", "lower-center"),
        ("not in the upper-left but in the lower-right", "lower-right"),
        ("upper-left or lower-right", None),
        ("center", None),
        ("on the left", None),
        ("upper-left <location>lower-left</location>", "lower-left"),
    ],
)
def test_a_text_that_names_one_region_has_it(text, region):
    assert read_region(text) == region


@pytest.mark.parametrize(
    "text, box",
    [
        ("[200, 150, 400, 300]", (200, 150, 400, 300)),
        ("[200.5 150.5 400.5 300.5]", (200.5, 150.5, 400.5, 300.5)),
        ("<bbox>200, 150, 400, 300</bbox>", (200, 150, 400, 300)),
        ("[1, 2, 3, 4] no, [5, 6, 7, 8]", (5, 6, 7, 8)),
        ("[-10, -10, 400, 300]", (-10, -10, 400, 300)),
        ("200, 150, 400, 300", None),
        ("[400, 300, 200, 150]", None),
        ("[200, 150, 200, 300]", None),
        ("[1, 2, 3]", None),
        ("[1, 2, 3, 4, 5]", None),
        ("[nan, 0, 1, 1]", None),
        ("[0, 0, inf, 1e9]", None),
        ("[0, 0, 2**9, 3]", None),
        ("[0, 0, 9999999, 3]", None),
        ("[a, b, c, d]", None),
        ("[٢, ٣, ٤, ٥]", None),
        ("[[1, 2, 3, 4]", (1, 2, 3, 4)),
        ("", None),
    ],
)
def test_a_box_is_the_last_list_of_four_numbers(text, box):
    assert read_box(text) == box


def test_a_box_earns_its_overlap():
    assert score("[210, 160, 390, 290]")["box"] == pytest.approx(0.78)
    assert score("[-200, -150, 400, 300]")["box"] == pytest.approx(1 / 9)  # outside counts as area
    assert score("[0, 0, 999999, 999999]")["box"] == pytest.approx(0, abs=1e-6)
    assert score("[400, 300, 200, 150]")["box"] == 0 and score("no box")["box"] == 0


def test_what_is_not_asked_or_not_known_is_not_scored():
    assert score("[200, 150, 400, 300]", "location")["box"] is None
    assert score("upper-left", "diagnosis")["location"] is None
    assert score("<location>back</location>", "tagged", localization="unknown")["location"] is None
    assert score("<location> Back </location>", "tagged")["location"] == 1
    assert score("<location>lower back</location>", "tagged")["location"] == 0
    without = {"bbox": None, "spatial_description": None, "question_type": "diagnosis"}
    assert score("melanoma", "diagnosis", **without) == {"diagnosis": 1, "location": None, "box": None, "format": 0}


@pytest.mark.parametrize(
    "text, question",
    [
        ("This appears to be melanoma", "diagnosis"),
        ("So. This appears to be melanoma.", "diagnosis"),
        ("This appears to be melanoma. The lesion is located in the center region.", "location"),
        ("This appears to be melanoma.", "location"),
        ("<diagnosis>melanoma</diagnosis> <location>back</location> <bbox>[1, 2, 3]</bbox>", "tagged"),
        ("<diagnosis>melanoma</diagnosis> <bbox>[1, 2, 3, 4]</bbox> <location>back</location>", "tagged"),
        ("", "box"),
    ],
)
def test_another_form_is_seen(text, question):
    assert score(text, question)["format"] == 0


def test_rewards_go_through_a_batch_in_order():
    (diagnosis, _, box, _), _ = skin_rewards()
    texts = ["melanoma [0, 0, 1, 1]", "nevus [0, 0, 2, 1]"]
    assert diagnosis(["?"] * 2, texts, dx=["nv", "nv"]) == [0, 1]
    assert box(["?"] * 2, texts, question_type=["box"] * 2, bbox=[[0, 0, 1, 1]] * 2) == [1, 0.5]


def test_an_unknown_kind_of_reward_is_an_error():
    with pytest.raises(ValueError, match="no rewards for compat 'hf' .expected default, reference, reference_no_mask, "):
        skin_rewards("hf")


HOSTILE = [
    *("<diagnosis>", "</diagnosis>", "<location>", "<bbox>", "[", "]", "[1,", "1", "[1 ", " ", "\n", ".", "-"),
    *("not ", "melanoma ", "upper-", "located in ", "diagnosis: ", "appears to be ", "<diagnosis>\n", "<location>a\nb"),
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_scoring_stays_quick_on_hostile_text(unit, mask):
    body = unit * (100_000 // len(unit))
    start = time.process_time()
    for text in (body, f"[{body}]", f"<diagnosis>{body}</diagnosis>", f"<bbox>[{body}", f"This appears to be {body}"):
        for compat in ("default", "reference", "reference_head", "reference_hf"):
            for question in ("box", "tagged"):
                score(text, question, compat, mask=mask)
    assert time.process_time() - start < 5
