"""How many were right, and how sure that makes us of the share.

p = correct / n,  interval: Wilson's score interval, which stays inside [0, 1] and holds for small n and p near 0 or 1
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """`num_correct` of `num_samples` (at least one); accuracy and the ends of its interval are fractions."""

    num_correct: int
    num_samples: int

    @classmethod
    def of(cls, right: Collection[bool]) -> "Score":
        return cls(sum(right), len(right))

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval (low, high)."""
        from scipy.stats import binomtest  # takes a quarter of a second to import

        low, high = binomtest(self.num_correct, self.num_samples).proportion_ci(method="wilson")
        return float(low), float(high)

    def as_dict(self) -> dict[str, Any]:
        """accuracy, low, high, num_correct, num_samples: a share, as files and reports have it."""
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "num_correct": self.num_correct,
            "num_samples": self.num_samples,
        }
