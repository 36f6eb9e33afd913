"""Which files of a folder hold a split: `train.json` and the like, or the shards of a copy of a hub data set."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from engine.errors import InputError
from engine.files import visible_files

TABLES = (".csv", ".tsv", ".tab")
ENDINGS = (".json", ".jsonl", *TABLES, ".parquet")
SHARD = re.compile(r"-(\d+)(?:-of-(\d+))?(?:-\w+)?\.parquet")  # -00000-of-00002.parquet, also with a hash; -0.parquet


def ending(path: Path) -> str:
    """`.json` of `a.JSON` and `a.json.gz`."""
    return Path(_without_gz(path)).suffix.lower()


def bare_name(path: Path) -> str:
    """The file's name without its ending: `a.b` of `a.b.json` and `a.b.json.gz`."""
    return Path(_without_gz(path)).stem


def _without_gz(path: Path) -> str:
    return path.name[:-3] if path.name.lower().endswith(".gz") else path.name


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The file of a split, or its Parquet shards in order, in the folder or in its folder data/; [] if there are none.

    InputError where it cannot be told what the split is: several files of its name, a shard that lacks or is there twice.
    """
    pattern = f"{glob.escape(split)}*"
    found = [*visible_files(folder, pattern), *visible_files(folder, f"data/{pattern}")]
    whole = [path for path in found if bare_name(path) == split and ending(path) in ENDINGS]
    shards = [path for path in found if path.name.startswith(split) and SHARD.fullmatch(path.name, len(split))]
    if len(whole) > 1 or whole and shards:
        names = " and ".join(path.relative_to(folder).as_posix() for path in [*whole, *shards][:2])
        raise InputError(f"{folder}: {names} could each be the split {split!r} (expected one of them: name the file that is meant)")
    return whole or _in_order(folder, split, shards)


def _in_order(folder: Path, split: str, shards: Sequence[Path]) -> list[Path]:
    """The shards by their numbers, each there once."""
    numbered: dict[int, Path] = {}
    totals: set[str] = set()
    for path in shards:
        digits, total = _numbers(path, split)
        other = numbered.setdefault(int(digits), path)
        totals.add(total)
        if other is not path:
            names = " and ".join(shard.relative_to(folder).as_posix() for shard in (other, path))
            raise InputError(f"{folder}: {names} are one shard of {split!r} (expected each once: remove what is there twice)")
    if not numbered:
        return []
    if len(totals) > 1:
        raise InputError(f"{folder}: shards of {split!r} of more than one division (expected all of them to be -of- one number)")
    total = totals.pop()
    first = 0 if 0 in numbered else 1  # some count from 1
    last = first + int(total) - 1 if total else max(numbered)
    for number in range(first, last + 1):
        if number not in numbered:
            name = f"{split}-{number:0{len(_numbers(shards[0], split)[0])}d}{f'-of-{total}' if total else ''}.parquet"
            raise InputError(
                f"{folder}: the shard {name} is missing (expected all of {last - first + 1}; {len(numbered)} are there)"
            )
    return [numbered[number] for number in sorted(numbered)]


def _numbers(shard: Path, split: str) -> tuple[str, str]:
    """The digits of a shard's number and of how many there are, "" where its name does not say."""
    match = SHARD.fullmatch(shard.name, len(split))
    return (match[1], match[2] or "") if match else ("", "")
