"""The rewards of the published skin lesion code, quirks included (https://github.com/rasoulcarrera/DR_Diag_Skin_main).

reference, reference_no_mask (commit 8c0cb0c): 0.4 diagnosis + 0.3 spatial + 0.3 segmentation

    diagnosis     the last of the seven names, in the order of `DIAGNOSES`, that the lower-cased text contains
    spatial       what follows the last "located in" equals that of the target, to the letter but for case; both absent is right
    segmentation  the text's first list, filled, against the mask's pixels above 127: intersection over union. Negative numbers
                  count from the far side, as in any Python slice. The published training passes a file name without its folder,
                  so that no mask is found and this part is 0: reference_no_mask.

reference_head: 0.5, 0.3 and 0.2 of the same, 0.1 times a quality, all halved for fewer than 3 or more than 100 words. We know this
version by its scores of 32 texts, which ours equal; one of the five words that its quality counts occurs in none of them and is
not here (0.008 each time it is used).

reference_hf: 0.6 diagnosis + 0.3 body part + 0.1 for any list of four numbers at all, by tags or phrases; penalties multiply.

The published code evaluates the model's list as Python. Here it is read as four numbers, whole or decimal; every other expression
scores 0.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from engine.data.images import open_image
from engine.data.lesions import DIAGNOSES
from engine.tasks.multiple_choice import named
from engine.tasks.skin.task import WEIGHTS, lesion_rewards
from engine.tasks.task import Reward

QUALITY_WORDS, QUALITY_WORD_COUNT = ("lesion", "appears", "diagnosis", "skin"), 5
BODY_PARTS = (
    *("face", "trunk", "back", "chest", "abdomen", "upper extremity", "lower extremity", "arm", "leg", "hand", "foot", "neck"),
    "scalp",
)
# The order in which the variant on the hub's data looks for names.
HF_NAMES = [DIAGNOSES[code] for code in ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")]
_NUMBER = re.compile(r"[+-]?(?:(?:0+|[1-9][0-9]*)|(?:[0-9]+\.[0-9]*|\.[0-9]+))")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_WHOLE_NUMBERS = re.compile(r"\d+(?:(?:,\s*|\s+)\d+){0,3}")
_SIGN = re.compile(r"\S")
_HF_TAGS = {
    tag: (re.compile(f"<{tag}>", re.IGNORECASE), re.compile(f"</{tag}>", re.IGNORECASE)) for tag in ("diagnosis", "location")
}
_HF_DIAGNOSIS = re.compile(r"(?:appears to be|(?:diagnosis|condition)[:\s]*is)\s+([^.]+)", re.IGNORECASE)
_HF_LOCATION = re.compile(r"(?:located in|location is|(?:found|situated) on|on the)\s+(?:the\s+)?([^.]+)", re.IGNORECASE)


def _diagnosis_of(text: str) -> str | None:
    named = [code for code, name in DIAGNOSES.items() if name in text.lower()]
    return named[-1] if named else None


def diagnosis_reward(prompts: Any, completions: list[str], solution: list[str], **columns: Any) -> list[float]:
    """1 where completion and solution have the same last diagnosis."""
    truths = map(_diagnosis_of, solution)
    return [float(truth is not None and _diagnosis_of(text) == truth) for text, truth in zip(completions, truths, strict=True)]


def _place_of(text: str) -> str:
    """What follows the last "located in", spelt so; the whole text where it is spelt in capitals only."""
    return text.rpartition("located in")[2].strip().rstrip(".") if "located in" in text.lower() else ""


def spatial_reward(
    prompts: Any, completions: list[str], solution: list[str], bbox: list[list[float] | None], **columns: Any
) -> list[float]:
    """1 where completion and solution name the same place, or neither names one; 0 without a true box."""
    rows = zip(completions, solution, bbox, strict=True)
    return [float(bool(box) and _place_of(text).lower() == _place_of(truth).lower()) for text, truth, box in rows]


def _first_list(text: str) -> list[int] | None:
    """Four numbers between the first `[` and the first `]`, cut to whole ones."""
    start, end = text.find("["), text.find("]")
    if start < 0 or end < start:
        return None
    numbers = [part.strip() for part in text[start + 1 : end].split(",")]
    numbers = numbers[:-1] if len(numbers) > 1 and not numbers[-1] else numbers  # Python's lists may end with a comma
    if len(numbers) != 4 or not all(len(number) <= 300 and _NUMBER.fullmatch(number) for number in numbers):
        return None
    return [int(float(number)) for number in numbers]


@lru_cache(maxsize=64)
def _read_mask(path: str) -> np.ndarray:
    """[H, W] bool."""
    return np.asarray(open_image(path).convert("L")) > 127


def _mask_iou(text: str, mask: np.ndarray) -> float:
    """Intersection over union of the filled box of the text and a mask [H, W]."""
    sides = _first_list(text)
    if sides is None:
        return 0.0
    x1, y1, x2, y2 = sides
    inside = mask[y1:y2, x1:x2]
    union = int(mask.sum()) + inside.size - int(inside.sum())
    return int(inside.sum()) / union if union else 0.0


def segmentation_reward(prompts: Any, completions: list[str], mask: list[str | None], **columns: Any) -> list[float]:
    """Intersection over union of the box in the text and the mask's file; 0 where there is no mask."""
    return [_mask_iou(text, _read_mask(path)) if path else 0.0 for text, path in zip(completions, mask, strict=True)]


def _quality(text: str, truth: str) -> float:
    """0.6 likeness in length + 0.4 share of the expected words; 0 for fewer than three words."""
    count, expected = len(text.split()), len(truth.split())
    if count < 3 or not expected:
        return 0.0
    found = sum(word in text.lower() for word in QUALITY_WORDS)
    return 0.6 * min(count, expected) / max(count, expected) + 0.4 * found / QUALITY_WORD_COUNT


def head_reward(
    prompts: Any,
    completions: list[str],
    solution: list[str],
    bbox: list[list[float] | None],
    mask: list[str | None],
    **columns: Any,
) -> list[float]:
    """The newest published script's total: above 1 for the best answers."""
    diagnosis = diagnosis_reward(prompts, completions, solution)
    spatial = spatial_reward(prompts, completions, solution, bbox)
    segmentation = segmentation_reward(prompts, completions, mask)
    totals = []
    for text, truth, *parts in zip(completions, solution, diagnosis, spatial, segmentation, strict=True):
        total = 0.5 * parts[0] + 0.3 * parts[1] + 0.2 * parts[2] + 0.1 * _quality(text, truth)
        totals.append(total if 3 <= len(text.split()) <= 100 else 0.5 * total)
    return totals


def _first_tagged(text: str, tag: str) -> str | None:
    """`<tag>\\s*(.*?)\\s*</tag>` in any case, dots stopping at line breaks: what the first match encloses, stripped."""
    opening, closing = _HF_TAGS[tag]
    end, last_break = None, -1
    for start in opening.finditer(text):  # the first close after it decides: one further on has the same line break before it
        if end is None or end.start() < start.end():
            end = closing.search(text, start.end())
            if end is None:
                return None
            last_break = text.rfind("\n", start.end(), _last_sign(text, end.start()))
        first = _SIGN.search(text, start.end(), end.start())
        if first is None or first.start() > last_break:
            return text[start.end() : end.start()].strip()
    return None


def _last_sign(text: str, end: int) -> int:
    """Where the white space before `end` begins."""
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _hf_diagnosis(text: str) -> str:
    tagged = _first_tagged(text, "diagnosis")
    if tagged is not None:
        return tagged
    phrase = _HF_DIAGNOSIS.search(text)
    return phrase[1].strip() if phrase else next((name for name in HF_NAMES if name in text.lower()), "")


def _hf_location(text: str) -> str:
    tagged = _first_tagged(text, "location")
    if tagged is not None:
        return tagged
    phrase = _HF_LOCATION.search(text)
    if phrase:
        return phrase[1].replace("center-center region", "").replace("region", "").strip()
    return next((part for part in BODY_PARTS if part in text.lower()), "")


def _hf_has_box(text: str) -> bool:
    """Whether somewhere four whole numbers stand in brackets; the published pattern also takes `[1234]` for four."""
    contents = (content for content in _LIST.findall(text) if _WHOLE_NUMBERS.fullmatch(content))
    return any(sum(sign.isdigit() for sign in content) >= 4 for content in contents)


def _hf_score(text: str, truth: str, place: str, box) -> float:
    diagnosis, location, total = _hf_diagnosis(text).lower(), _hf_location(text).lower(), 0.0
    if diagnosis:
        total += 0.6 if diagnosis == truth else 0.6 * 0.8 if truth in diagnosis or diagnosis in truth else 0.0
    elif truth in text.lower():
        total += 0.6 * 0.4
    if place and location:
        total += 0.3 if location == place else 0.3 * 0.7 if place in location else 0.0
    if box is not None:
        total += 0.1 * (0.8 if _hf_has_box(text) else 0.2)
    lower = text.lower()
    total *= (1.0 if diagnosis else 0.8) * (1.0 if location else 0.9)
    total *= 1.0 if "<bbox>" in lower and "</bbox>" in lower else 0.9
    return max(0.0, min(1.0, total * (0.85 if len(text.split()) > 120 else 1.0)))


def hf_reward(
    prompts: Any,
    completions: list[str],
    dx: list[str],
    localization: list[str | None],
    bbox: list[list[float] | None],
    **columns: Any,
) -> list[float]:
    """The total of the variant on the hub's data, 0 to 1. Where the box is does not count."""
    rows = zip(completions, dx, localization, bbox, strict=True)
    return [_hf_score(text, DIAGNOSES[code], (place or "").lower(), box) for text, code, place, box in rows]


# {name: (functions, weights)}
REFERENCE_REWARDS: dict[str, tuple[tuple[Callable, ...], tuple[float, ...]]] = {
    "reference": ((diagnosis_reward, spatial_reward, segmentation_reward), (0.4, 0.3, 0.3)),
    "reference_no_mask": ((diagnosis_reward, spatial_reward), (0.4, 0.3)),
    "reference_head": ((head_reward,), (1.0,)),
    "reference_hf": ((hf_reward,), (1.0,)),
}


def skin_rewards(compat: str = "default") -> tuple[list[Reward], list[float]]:
    """The rewards of a run under the names of its metrics, and their weights.

    `compat`: "default"; "reference", what the README describes (40/30/30); "reference_no_mask", the same as it ran, without
    masks; "reference_head", the newest script's; "reference_hf", that of the variant on the hub's data.
    """
    if compat == "default":
        return lesion_rewards(), list(WEIGHTS)
    if compat not in REFERENCE_REWARDS:
        raise ValueError(f"no rewards for compat {compat!r} (expected default, {', '.join(REFERENCE_REWARDS)})")
    functions, weights = REFERENCE_REWARDS[compat]
    return [named(function.__name__.removesuffix("_reward"), function) for function in functions], list(weights)
