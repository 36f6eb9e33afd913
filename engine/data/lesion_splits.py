"""The lesions that a run trains on and is tested on, as its flags name them."""

from dataclasses import dataclass
from functools import partial

from engine.command.settings import DataArguments, check_ranges, setting
from engine.data.lesions import QUESTIONS, load_skin
from engine.data.splits import Splits, read_splits
from engine.data.starter.lesions import build_starter_skin


@dataclass
class LesionArguments(DataArguments):
    """Which lesions to learn from and to be tested on, and what is asked about them."""

    question: str | None = setting(
        None,
        "diagnosis; location: and the region; box: and the bounding box too; tagged: diagnosis, body part and box in tags. None: "
        "as the recipe says.",
        choices=list(QUESTIONS),
    )
    eval_question: str | None = setting(
        None, "What held-out lesions are asked. None: box, which asks for all, or tagged as in training.", choices=list(QUESTIONS)
    )
    spatial_description_ratio: float = setting(
        1.0, "Part of the lesions that are asked this; all others are asked for the diagnosis.", at_least=0, at_most=1
    )
    limit: int | None = setting(None, "Train on at most so many lesions, evenly spread.", at_least=1, aliases=["--train_limit"])

    def __post_init__(self):
        super().__post_init__()
        check_ranges(type(self), vars(self))


def load_lesion_splits(data: LesionArguments, question: str, *, boxes_only: bool = False) -> Splits:
    """Lesions asked the questions of `data`, where it names none `question`; held-out ones, if they have a box, all the same.

    `boxes_only`: train on lesions with a box only, as the published stage 2.
    """
    asked = data.question or question
    held_out = data.eval_question or ("tagged" if asked == "tagged" else "box")
    load = partial(load_skin, image_root=data.image_root, on_bad_row=data.on_bad_row)
    train = partial(load, question=asked, ratio=data.spatial_description_ratio, boxes_only=boxes_only, limit=data.limit)
    return read_splits(data, build_starter_skin, train, partial(load, question=held_out))
