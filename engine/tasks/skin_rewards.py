"""Rewards of skin lesion answers: the diagnosis, where the lesion lies, its box, and the form of the text.

A reward function is TRL's: `f(prompts, completions, **columns) -> list[float | None]`; columns are those of `engine.data.lesions`.
None: the question did not ask for it, or the truth is not known. The default weighs 40 % diagnosis, 30 % location and 30 % box,
as the published README has it; the form is logged and weighs nothing, since what cannot be read earns nothing anyway.

    diagnosis   1 where the text names exactly the right one of the seven
    location    1 for the right region of the image ("tagged": the right body part)
    box         intersection over union with the true box, 0 to 1
    format      1 where the whole text has the form of the answers to learn

A well-formed `<diagnosis>`, `<location>` or `<bbox>` in a text, the last one, is read in place of the whole text. "Not a melanoma"
names no melanoma. `compat="reference..."` scores as the published code does: see `engine.tasks.published_skin`.

All parsing is linear in the length of the model's text, whatever the text, and nothing of it is evaluated.
"""

import re
from collections.abc import Callable, Sequence

from engine.data.lesions import CODES
from engine.tasks.published_skin import REFERENCE_REWARDS

WEIGHTS = (0.4, 0.3, 0.3, 0.0)
_TAGS = {name: re.compile(rf"<(/?){name}>", re.IGNORECASE | re.ASCII) for name in ("diagnosis", "location", "bbox")}
_NAMES = {
    "akiec": r"actinic keratos[ie]s",
    "bcc": r"basal cell carcinomas?",
    "bkl": r"benign keratos[ie]s(?:[- ]like lesions?)?",
    "df": r"dermatofibromas?",
    "mel": r"melanomas?",
    "nv": r"(?:melanocytic )?na?ev(?:us|i)",
    "vasc": r"vascular lesions?",
}
_NAME = re.compile(r"\b(?:" + "|".join(f"(?P<{code}>{name})" for code, name in _NAMES.items()) + r")\b")
_DENIED = re.compile(r"\b(?:not|no|non|rather than|instead of|without|unlike)(?: (?:a|an|the|in|be|to|likely)){0,4}[ -]$")
_SIDES = {"upper": "upper top", "center": "center centre central middle", "lower": "lower bottom", "left": "left", "right": "right"}
_SIDE_OF = {word: side for side, words in _SIDES.items() for word in words.split()}
_MIDDLE = _SIDES["center"].replace(" ", "|")
_REGION = re.compile(rf"\b(upper|top|lower|bottom|{_MIDDLE})[- ](left|right|{_MIDDLE})\b")
_LIST = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"-?[0-9]{1,6}(?:\.[0-9]{1,6})?")

_SENTENCE = r"This appears to be [^.\n]+\."
_PLACED = _SENTENCE + r" The lesion is located in the (?:upper|center|lower)-(?:left|center|right) region\."
_BOX = r"\[[0-9]{1,6}, [0-9]{1,6}, [0-9]{1,6}, [0-9]{1,6}\]"
_FORMS = {
    "diagnosis": re.compile(_SENTENCE),
    "location": re.compile(_PLACED),
    "box": re.compile(rf"{_PLACED} Its bounding box is {_BOX}\."),
    "tagged": re.compile(rf"<diagnosis>[^<>\n]+</diagnosis>\s*<location>[^<>\n]+</location>\s*<bbox>{_BOX}</bbox>"),
}


def _tagged(text: str, tag: str) -> str | None:
    """What the last well-formed pair of the tag encloses, or None."""
    content, start = None, None
    for found in _TAGS[tag].finditer(text):
        if not found[1]:
            start = found.end()
        elif start is not None:
            content, start = text[start : found.start()], None
    return content


def _denied(text: str, start: int) -> bool:
    return _DENIED.search(text[max(0, start - 40) : start]) is not None


def read_diagnosis(text: str) -> str | None:
    """The code of the one diagnosis that the text names; None where it names none or several. Tags may hold the code itself."""
    tagged = _tagged(text, "diagnosis")
    content = " ".join((text if tagged is None else tagged).lower().split())
    if tagged is not None and content in CODES:
        return CODES[content]
    named = {found.lastgroup for found in _NAME.finditer(content) if not _denied(content, found.start())}
    return named.pop() if len(named) == 1 else None


def read_region(text: str) -> str | None:
    """The one region that the text names, as `upper-left`; None where it names none or several."""
    tagged = _tagged(text, "location")
    content = " ".join((text if tagged is None else tagged).lower().split())
    named = {
        f"{_SIDE_OF[found[1]]}-{_SIDE_OF[found[2]]}" for found in _REGION.finditer(content) if not _denied(content, found.start())
    }
    return named.pop() if len(named) == 1 else None


def read_box(text: str) -> tuple[float, ...] | None:
    """The last list of exactly four plain numbers, `[x1, y1, x2, y2]`; None where there is none or it is reversed or empty.

    Sides may lie outside of the image, which costs overlap; NaN, infinity, exponents and arithmetic are no plain numbers.
    """
    tagged = _tagged(text, "bbox")
    lists = [text] if tagged is None else [tagged]
    lists = _LIST.findall(lists[0]) or ([] if tagged is None else lists)
    for content in reversed(lists):
        sides = content.replace(",", " ").split()
        if len(sides) == 4 and all(map(_NUMBER.fullmatch, sides)):
            x1, y1, x2, y2 = map(float, sides)
            return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
    return None


def box_iou(box: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where one is missing, reversed or empty."""
    if not box or not other or not all(b[0] < b[2] and b[1] < b[3] for b in (box, other)):
        return 0.0
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return common / (sum(areas) - common)


def diagnosis_reward(prompts, completions, dx, **columns) -> list[float]:
    """1 where `read_diagnosis` gives the row's `dx`."""
    return [float(read_diagnosis(text) == gold) for text, gold in zip(completions, dx, strict=True)]


def location_reward(prompts, completions, question_type, spatial_description, localization, **columns) -> list[float | None]:
    """1 where the text names the region, or in answer to "tagged" the body part; None where neither is asked for or known."""
    rows = zip(completions, question_type, spatial_description, localization, strict=True)
    return [_location(*row) for row in rows]


def _location(text: str, question: str, region: str | None, body_part: str | None) -> float | None:
    if question == "tagged":
        if body_part in (None, "unknown"):
            return None
        return float(" ".join((_tagged(text, "location") or "").lower().split()) == body_part.lower())
    if question == "diagnosis" or region is None:
        return None
    return float(f"lesion located in {read_region(text)} region" == region)


def box_reward(prompts, completions, question_type, bbox, **columns) -> list[float | None]:
    """Intersection over union of the text's box and the row's; None where no box is asked for."""
    asked = [gold is not None and question in ("box", "tagged") for question, gold in zip(question_type, bbox, strict=True)]
    rows = zip(completions, bbox, asked, strict=True)
    return [box_iou(read_box(text), gold) if wanted else None for text, gold, wanted in rows]


def format_reward(prompts, completions, question_type, **columns) -> list[float]:
    """1 where the whole text has the form of the answers to that kind of question, white space around it aside."""
    return [
        float(_FORMS[question].fullmatch(text.strip()) is not None)
        for text, question in zip(completions, question_type, strict=True)
    ]


def skin_rewards(compat: str = "default") -> tuple[list[Callable], list[float]]:
    """The rewards of a run under the names of its metrics, and their weights.

    `compat`: "default"; "reference", what the README describes (40/30/30); "reference_no_mask", the same as it ran, without
    masks; "reference_head", the newest script's; "reference_hf", that of the variant on the hub's data.
    """
    if compat == "default":
        functions, weights = (diagnosis_reward, location_reward, box_reward, format_reward), WEIGHTS
    elif compat in REFERENCE_REWARDS:
        functions, weights = REFERENCE_REWARDS[compat]
    else:
        raise ValueError(f"no rewards for compat {compat!r} (expected default, {', '.join(REFERENCE_REWARDS)})")
    return [_named(function) for function in functions], list(weights)


def _named(reward: Callable) -> Callable:
    """The same function without the ending of its name."""

    def named(prompts, completions, **columns):
        return reward(prompts, completions, **columns)

    named.__name__, named.__doc__ = reward.__name__.removesuffix("_reward"), reward.__doc__
    return named
