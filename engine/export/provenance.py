"""What our runs recorded of a model, for a bundle's manifest: the rows that it was trained on, and what was measured of it.

Rows are told by `row_identity`: a SHA-256 of what stands in them, wherever their files lie.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.export.bundle import sha256
from engine.files import read_bounded

EVALUATIONS = ("evaluation.json", "evaluation_after.json")  # of an evaluation's run folder, of a training run's
LARGEST = 1 << 30  # bytes of an evaluation, which has a result a row


def training_rows(checkpoint: Path) -> str | None:
    """SHA-256 of the rows that a checkpoint of ours was trained on; None where the folder does not say."""
    try:
        return _digest(json.loads(read_bounded(checkpoint / "manifest.json", LARGEST))["rows"]["training"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def measured(path: Path) -> list[dict[str, Any]]:
    """The manifest's `accuracy`, by the evaluation in a run folder or by its file: an entry a share, with its 95 % interval.

    {measure, value, low, high (fractions), rows, data_sha256 (None where it does not say), evaluation_sha256}. InputError, one
    line, where there is no evaluation or no share in it.
    """
    if path.is_dir():
        file = next((path / name for name in EVALUATIONS if (path / name).exists()), None)
        if file is None:
            raise InputError(f"--evaluation {path}: no {EVALUATIONS[0]} there (expected the run folder of an evaluation)")
        path = file
    try:
        evaluation = json.loads(read_bounded(path, LARGEST))
        shares = {name: cell for name, cell in evaluation["shown"]["measures"].items() if isinstance(cell, dict)}
        entries = [
            {
                "measure": name,
                "value": float(cell["accuracy"]),
                **{end: float(cell[end]) for end in ("low", "high")},
                "rows": int(cell["num_samples"]),
                "data_sha256": _digest(evaluation.get("rows")),
                "evaluation_sha256": sha256(path),
            }
            for name, cell in shares.items()
        ]
    except OSError as error:
        raise InputError(f"--evaluation {path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"--evaluation {path}: not an evaluation (expected what an evaluation recipe writes)") from None
    if not entries:
        raise InputError(f"--evaluation {path}: no accuracy is in it (expected a share with its interval)")
    return entries


def _digest(identity: Any) -> str | None:
    """The second word of an identity: how many rows, and their digest."""
    words = identity.split() if isinstance(identity, str) else []
    return words[1] if len(words) == 2 else None
