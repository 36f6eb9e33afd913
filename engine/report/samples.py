"""Questions with their images and answers, as the page's template wants them."""

import base64
import io
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from engine.report.content import Sample, ShownAnswer

IMAGE_SIDE = 448  # pixels of the longer side of a shown image, at most; a strip of several has thrice the width


def shown_samples(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """`level` (0-1) is where the sum of an answer's scores lies among all that are shown; `lean` (-1 to 1) is its advantage,
    relative to the largest that is shown."""
    answers = [answer for sample in samples for answer in sample.answers]
    totals = [_total(answer) for answer in answers]
    low, high = min(totals, default=0.0), max(totals, default=0.0)
    largest = max((abs(answer.advantage or 0) for answer in answers), default=0) or 1

    def level(answer: ShownAnswer) -> float:
        if not answer.scores and answer.right is not None:
            return float(answer.right)
        return (_total(answer) - low) / (high - low) if high > low else float(high > 0)

    def shown(answer: ShownAnswer) -> dict[str, Any]:
        return {
            "name": answer.name,
            "pieces": _pieces(answer.text),
            "verdict": None if answer.right is None else "right" if answer.right else "wrong",
            "scores": {name: "–" if value is None else f"{value:.3g}" for name, value in answer.scores.items()},
            "total": f"{_total(answer):.3g}" if answer.advantage is not None and len(answer.scores) > 1 else None,
            "level": level(answer),
            "advantage": answer.advantage,
            "lean": (answer.advantage or 0) / largest,
        }

    return [
        {
            "image": sample.image and _data_uri(sample.image),
            "wide": sample.image is not None and _is_wide(sample.image),
            "question": sample.question,
            "solution": sample.solution,
            "step": sample.step,
            "answers": [shown(answer) for answer in sample.answers],
        }
        for sample in samples
    ]


def _total(answer: ShownAnswer) -> float:
    return sum(value for value in answer.scores.values() if value is not None)


def _pieces(text: str) -> list[tuple[str, bool]]:
    """The text cut at its think and answer tags: (piece, whether it is a tag)."""
    pieces = re.split(r"(</?(?:think|answer)>)", text)
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def _is_wide(image: Image.Image) -> bool:
    return image.width > 2 * image.height


def _data_uri(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((3 * IMAGE_SIDE if _is_wide(image) else IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
