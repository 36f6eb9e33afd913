"""The lesions that a run trains on and is tested on, as `LesionArguments` names them."""

from functools import partial

from engine.command.lesion_settings import LesionArguments
from engine.data.lesions import load_skin
from engine.data.splits import Splits, read_splits
from engine.data.starter.lesions import build_starter_skin


def load_lesion_splits(data: LesionArguments, question: str, *, boxes_only: bool = False) -> Splits:
    """Lesions asked the questions of `data`, where it names none `question`; held-out ones, if they have a box, all the same.

    `boxes_only`: train on lesions with a box only, as the published stage 2.
    """
    asked = data.question or question
    held_out = data.eval_question or ("tagged" if asked == "tagged" else "box")
    load = partial(load_skin, image_root=data.image_root, on_bad_row=data.on_bad_row)
    train = partial(load, question=asked, ratio=data.spatial_description_ratio, boxes_only=boxes_only, limit=data.limit)
    return read_splits(data, build_starter_skin, train, partial(load, question=held_out))
