"""The measures of masks against the published protocol's own values, against their definitions, and at the edges."""

import json
from fractions import Fraction

import numpy as np
import pytest

from engine.evaluation.mask_metrics import NAMES, THRESHOLDS, mask_levels, score_mask, summarise

# What the formulas of PRS-Med's evaluation code give for the three pairs of `pair`, computed once with a transcription of it.
PUBLISHED = {
    "mDice": 0.5806026017600455,
    "mIoU": 0.449059818428553,
    "max_dice": 0.8121546485694525,
    "max_iou": 0.6853675471545216,
    "e_measure": 0.685408902867805,
    "max_e_measure": 0.9444810354139449,
    "mean_sensitivity": 0.6941859173681791,
    "max_sensitivity": 1.0,
    "mean_specificity": 0.8448347383980566,
    "max_specificity": 1.0,
    "s_measure": 0.8102789905136244,
    "weighted_f": 0.4971709304570726,
    "mae": 0.14434173669467787,
}


def pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :56]
    truth = np.hypot(y - 18 - seed, x - 25 + 2 * seed) < 9 + seed
    soft = 1 / (1 + np.exp(0.4 * (np.hypot(y - 21, x - 24) - 10))) + 0.1 * rng.random((40, 56))
    return np.clip(np.round(soft * 230), 0, 255).astype(np.uint8), truth


def test_a_table_equals_that_of_the_published_code():
    table = summarise(score_mask(*pair(seed)) for seed in range(3))
    assert {name: table[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=1e-12)
    assert set(NAMES) <= set(table)


@pytest.mark.parametrize("seed", range(4))
def test_histograms_give_what_256_thresholds_give(seed):
    rng = np.random.default_rng(seed)
    levels, truth = rng.integers(0, 256, (13, 17), dtype=np.uint8), rng.random((13, 17)) > 0.7
    sweep = score_mask(levels, truth)["sweep"]
    for k, threshold in enumerate(THRESHOLDS):
        chosen = levels / 255 >= threshold
        met, either = (chosen & truth).sum(), (chosen | truth).sum()
        a, b = truth - truth.mean(), chosen - chosen.mean()
        aligned = 2 * a * b / (a * a + b * b + np.finfo(float).eps)
        assert sweep["dice"][k] == pytest.approx(2 * met / (chosen.sum() + truth.sum()))
        assert sweep["iou"][k] == pytest.approx(met / either)
        assert sweep["sensitivity"][k] == pytest.approx(met / truth.sum())
        assert sweep["specificity"][k] == pytest.approx((~chosen & ~truth).sum() / (~truth).sum() if met else 0)
        assert sweep["e_measure"][k] == pytest.approx(((aligned + 1) ** 2 / 4).sum() / (truth.size - 1))


def test_a_perfect_mask_has_perfect_scores():
    truth = pair(0)[1]
    table = summarise([score_mask(truth.astype(np.uint8) * 255, truth)])
    assert [table[name] for name in ("dice", "iou", "s_measure", "weighted_f")] == pytest.approx([1] * 4) and table["mae"] == 0
    assert table["max_dice"] == 1 and 255 / 256 < table["mDice"] < 1  # the threshold 0 takes the whole image
    assert 1 < table["max_e_measure"] == pytest.approx(truth.size / (truth.size - 1))


def test_half_is_the_threshold_of_plain_dice():
    truth = np.array([[1, 1, 0, 0]], bool)
    assert score_mask(mask_levels(np.array([[0.5, 0.51, 0.49, 0.0]])), truth)["dice"] == 1
    assert score_mask(mask_levels(np.array([[0.49, 0.51, 0.49, 0.0]])), truth)["dice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("level", [0, 127, 255])
@pytest.mark.parametrize("truth", [np.zeros((6, 5), bool), np.ones((6, 5), bool), np.eye(6, 5).astype(bool)])
def test_empty_and_full_masks_have_finite_scores(level, truth):
    table = summarise([score_mask(np.full((6, 5), level, np.uint8), truth)])
    assert np.isfinite(list(table.values())).all()
    if level == 0 and not truth.any():
        assert table["dice"] == table["iou"] == table["s_measure"] == 1 and table["mDice"] == 0  # as the protocol has it


def test_stretching_turns_an_empty_mask_into_a_full_range_one():
    faint = np.array([[0.01, 0.02], [0.03, 0.01]])
    assert mask_levels(faint, stretched=True).tolist() == [[0, 128], [255, 0]]
    assert not mask_levels(np.full((2, 2), 0.3), stretched=True).any()


def test_shapes_and_types_are_checked():
    with pytest.raises(ValueError, match="uint8"):
        score_mask(np.zeros((3, 3)), np.zeros((3, 3), bool))
    with pytest.raises(ValueError, match="of its shape"):
        score_mask(np.zeros((3, 3), np.uint8), np.zeros((3, 4), bool))


def test_per_image_scores_are_the_golden_ones(golden):
    """The golden masks are not stored: two rows of equal area whose overlap gives each image's Dice stand for them."""
    for image in json.loads((golden / "prs_med" / "metrics_position_golden.json").read_text())["per_image_near_0.5"]:
        dice = Fraction(image["dice@0.501961"]).limit_denominator(4000)
        places = np.arange(2 * dice.denominator)[None]
        first, second = (
            places < dice.denominator,
            (places >= dice.denominator - dice.numerator) & (places < 2 * dice.denominator - dice.numerator),
        )
        sweep = score_mask(first.astype(np.uint8) * 128, second)["sweep"]
        assert sweep["dice"][127] == pytest.approx(image["dice@0.501961"], abs=1e-12) and THRESHOLDS[127] == pytest.approx(
            0.501961, abs=1e-6
        )
        assert sweep["iou"][127] == pytest.approx(image["iou"], abs=1e-12)
