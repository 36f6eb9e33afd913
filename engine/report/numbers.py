"""Names and numbers as a page writes them: the numbers of one measure alike, so that they can be compared at a glance."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine.report.content import Cell, value_of

FRACTIONS = {"accuracy", "low", "high", "unanswered", "unread", "recall"}  # words in the names of what is written in percent
SPELLINGS = {"seconds": "time", "num_samples": "samples", "dice": "Dice"}
CAPITALS = {"iou": "IoU", "fgsm": "FGSM", "pgd": "PGD", "kl": "KL"}


def words(name: str) -> str:
    """`place_accuracy` -> `place accuracy`, `rewards/format/mean` -> `rewards format mean`; a path within a sentence stays."""
    pieces = [name.replace("/", " ")] if " " not in name else name.split(" ")
    spelt = " ".join(SPELLINGS.get(piece, piece if "/" in piece else piece.replace("_", " ")) for piece in pieces)
    return " ".join(CAPITALS.get(word, word) for word in spelt.split(" "))


def heading(name: str) -> str:
    """`words`, the first letter a capital, but for a first word that has one already (`mDice`)."""
    spelt = words(name)
    first = spelt.split(" ")[0]
    return spelt[:1].upper() + spelt[1:] if first.islower() else spelt


def duration(seconds: float) -> str:
    """In seconds below two minutes, in minutes below two hours, else in hours."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Scale:
    """How the numbers of one measure are written: in percent or as they are, with so many decimals."""

    percent: bool
    decimals: int

    def text(self, cell: Cell) -> str:
        """Without the unit; a word stays itself, and nothing is a dash."""
        value = value_of(cell)
        return (cell if isinstance(cell, str) else "–") if value is None else self._number(value)

    def gain(self, first: Cell, last: Cell) -> str | None:
        """What was gained, with its sign: of shares in points. None where one of the two is no number."""
        a, b = value_of(first), value_of(last)
        if a is None or b is None:
            return None
        sign = "+" if b >= a else "−"
        return f"{sign}{self._number(abs(b - a))}{' points' if self.percent else ''}"

    def _number(self, value: float) -> str:
        number = f"{100 * value if self.percent else value:,.{self.decimals}f}"
        return number.replace(",", "\N{NARROW NO-BREAK SPACE}")


def scale_of(name: str, cells: Iterable[Cell]) -> Scale:
    """Shares, and fractions whose name says so, in percent; other fractions with three decimals, or with as many as show three
    digits; whole numbers whole."""
    cells = list(cells)
    values = [value for value in map(value_of, cells) if value is not None]
    fractions = all(0 <= value <= 1 for value in values) and any(isinstance(value, float) for value in values)
    if any(isinstance(cell, dict) for cell in cells) or fractions and FRACTIONS & set(name.split("_")):
        return Scale(percent=True, decimals=1)
    if all(isinstance(value, int) for value in values):
        return Scale(percent=False, decimals=0)
    largest = max(map(abs, values))
    magnitude = math.floor(math.log10(largest)) if largest else 0
    return Scale(percent=False, decimals=max(3, min(8, 2 - magnitude)) if largest <= 1 else max(0, 3 - magnitude))
