"""What a report shows, as plain values: runs and tasks fill it, the page draws it.

A share is the dictionary of `engine.evaluation.score.Score.as_dict`: accuracy, low, high (fractions), num_correct, num_samples.
"""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Share = dict[str, Any]
Cell = float | int | str | Share | None  # a number, a word, a share, or nothing


def value_of(cell: Cell) -> float | int | None:
    """The number in a cell, a share's as a fraction; None for a word or nothing."""
    if isinstance(cell, dict):
        return cell["accuracy"]
    return cell if isinstance(cell, int | float) else None


@dataclass(frozen=True)
class ShownAnswer:
    """One answer to a sample: `scores` by name (None: not scored), and whether it is `right` (None: nobody can say).

    `name` tells apart answers that were given under different conditions ("clean", "after pgd").
    """

    text: str
    scores: dict[str, float | None]
    right: bool | None = None
    advantage: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Sample:
    """A question with its image and answers. `solution`: the true answer, as a reader wants it. `step`: when it was asked."""

    image: Image.Image | None
    question: str
    solution: str
    answers: list[ShownAnswer]
    step: int | None = None


@dataclass(frozen=True)
class Table:
    """`lines`: a name -> one cell a column. Columns of shares are drawn as intervals on one axis."""

    title: str
    columns: list[str]
    lines: dict[str, list[Cell]]


@dataclass(frozen=True)
class Comparison:
    """One measure of the same rows at several times, in their order: {"before training": value, "after training": value}.

    `fixed`, `broken`: rows that went from wrong to right and back, from the first to the last; None where that has no meaning.
    """

    name: str
    values: dict[str, Cell]
    notes: dict[str, str] = field(default_factory=dict)  # a line below a value, by its time
    fixed: int | None = None
    broken: int | None = None
