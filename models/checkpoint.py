"""Checkpoints of any model: where they lie, their files and tensors, and whether those are what a model expects.

What a folder holds was written by others. Every file is looked at before a library reads it, and what is wrong with one is said in
one line that names it.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from huggingface_hub import get_cached_repo_tree, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

CONTAINERS = ("model", "state_dict")  # keys under which a training checkpoint keeps its weights
SHOWN_KEYS, SHOWN_FOLDERS, SHOWN_CHARACTERS = 4, 20, 160  # of what an error quotes
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MODEL, ADAPTER = "config.json", "adapter_config.json"  # which of them a folder holds says what it is
DESCRIPTIONS = ("*.json", "*.model", "*.jinja", "*.txt")
SCALAR = np.float64(0).__reduce__()[0]  # numpy's function that makes a number, which has another module in each of its versions
NUMPY_NUMBERS: list[Any] = [*((SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")), np.dtype]
NUMPY_NUMBERS += [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
FORBIDDEN = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)|but got <class '([^']+)'>")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
JSON_BYTES = 1 << 28  # a tokenizer.json has up to 40 MB


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message is one line that names the file and what differs."""


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Inside, whatever a library raises becomes a CheckpointError of one line that begins with `what`.

    Values that nobody expected come out of libraries as exceptions of every kind, so every kind is caught: keep little inside.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
        raise CheckpointError(f"{what}: cannot be used ({type(error).__name__}{': ' if reason else ''}{reason})") from error


# ---- folders and files ----------------------------------------------------------------------------------------------


def local_folder(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` names, or None where it is a hub name: relative, and no folder here.

    Raises OSError where `path` is local and holds neither config.json nor adapter_config.json, or a run's config.json and no
    weights; it names the folders in it that do.
    """
    folder = Path(path)
    if not (folder.is_absolute() or str(path).startswith(".") or folder.is_dir()):
        return None
    holds = holds_checkpoint(folder)
    if not holds or not any((*folder.glob("*.safetensors*"), *folder.glob("*.bin*"))):
        refuse_folder_of(folder, MODEL, ADAPTER)
    if not holds:
        raise OSError(f"{path}: no checkpoint there (expected a folder with config.json, or adapter_config.json for an adapter)")
    return folder


def holds_checkpoint(folder: Path) -> bool:
    """Whether a folder holds the file that says what a model or an adapter is."""
    return any((folder / name).is_file() for name in (MODEL, ADAPTER))


def refuse_folder_of(folder: Path, *names: str) -> None:
    """OSError where folders in `folder`, such as a run's, hold a file of one of these names; it lists them."""

    def by_number(name: str) -> list[str | int]:  # checkpoint-50 before checkpoint-100
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    if within := sorted({file.parent.name for name in names for file in folder.glob(f"*/{name}")}, key=by_number):
        raise OSError(f"{folder}: {_one_of(within)}")


def _one_of(folders: list[str]) -> str:
    """What is wrong with a folder, such as a download of Med-R1, that is no checkpoint but holds some."""
    shown = ", ".join(folders[:SHOWN_FOLDERS]) + (", ..." if len(folders) > SHOWN_FOLDERS else "")
    return f"no checkpoint itself, but holds {len(folders)} (expected one of these folders in it to be named: {shown})"


def find_folder(path: str | Path, revision: str = "main") -> Path:
    """The folder `path`, or the local copy of the hub repository of that name; OSError where there is neither."""
    folder, name = local_folder(path), str(path)
    if folder is not None:
        return folder
    try:
        # not what lies in folders: a repository such as Med-R1's has a whole model in each of them
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[*DESCRIPTIONS, "*.safetensors"], ignore_patterns="*/*")
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=[*DESCRIPTIONS, "*.bin"], ignore_patterns="*/*")
            )
        tree = () if holds_checkpoint(folder) else get_cached_repo_tree(name, revision=revision)
    except Exception as error:  # the hub has a dozen kinds, not all of them OSErrors
        raise OSError(f"{path}: no such folder, and not to be had from the hub ({type(error).__name__})") from None
    if not holds_checkpoint(folder):
        within = sorted({file.path.split("/")[0] for file in tree if re.fullmatch(rf"[^/]+/({MODEL}|{ADAPTER})", file.path)})
        mend = f"{_one_of(within)}; fetch one: python -m recipes.download --model {path} --include {within[0]}/" if within else ""
        raise OSError(f"{path}: {mend or 'no checkpoint in this hub repository (expected config.json or adapter_config.json)'}")
    return folder


def check_file(file: Path) -> Path:
    """`file`, if it is a regular file that holds something; else CheckpointError, also for what Git LFS left in its place."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file" if not file.exists() else f"{file}: not a regular file")
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    if not start:
        raise CheckpointError(f"{file}: is empty")
    if start == LFS_POINTER:
        raise CheckpointError(f"{file}: is a Git LFS pointer, not the file itself (fetch it with: git lfs pull)")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; CheckpointError for anything else, also for infinite numbers and names given twice."""
    if check_file(file).stat().st_size > JSON_BYTES:
        raise CheckpointError(f"{file}: expected JSON of at most {JSON_BYTES >> 20} MB")

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(digits: str) -> float:
        return float(digits) if abs(float(digits)) != float("inf") else refused(digits[:20])

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{ascii(next(name for name in names if names.count(name) > 1))[:40]} is given twice")
        return found

    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refused, parse_float=finite, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({' '.join(str(error).split())[:SHOWN_CHARACTERS]})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


# ---- weights --------------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights, those that an index names or the only one; each there, and not cut."""
    for name in WEIGHTS:
        single, index = folder / name, folder / f"{name}.index.json"
        if index.exists():
            files = indexed_files(index)
            if single.exists() and files != [single]:
                raise CheckpointError(f"{folder}: holds {name} and an index of other files: expected one of the two")
        elif single.exists():
            files = [single]
        else:
            continue
        for file in files:
            check_weights(file)
        return files
    raise CheckpointError(f"{folder}: no weights (expected model.safetensors or pytorch_model.bin, or their index)")


def indexed_files(index: Path) -> list[Path]:
    """The files that an index names, all of them in its own folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: expected a weight_map from keys to file names")
    files = []
    for name in sorted(set(names.values())):
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise CheckpointError(f"{index}: names {name[:SHOWN_CHARACTERS]!r}: expected a file of the same folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names {name[:SHOWN_CHARACTERS]!r}, which is not there")
        files.append(index.parent / name)
    return files


def check_weights(file: Path) -> None:
    """Raise CheckpointError where a file of tensors is cut short, empty, or something else; tensors are not read."""
    if check_file(file).suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a whole file of tensors ({_reason(error)})") from None
    with open(file, "rb") as opened:
        is_pickle = opened.read(1) == b"\x80"
    if not is_pickle and not zipfile.is_zipfile(file):  # a zip's directory is at its end
        raise CheckpointError(f"{file}: not a whole file of tensors")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file by key, on the CPU. No code of a pickle is run.

    Numbers, also numpy's, texts and lists may stand beside them, as in a training checkpoint; they are left out.

    Raises CheckpointError where the file cannot be read or holds anything but tensors, plainly or in one of CONTAINERS.
    """
    check_file(Path(path))
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle raises anything
        if forbidden := FORBIDDEN.search(str(error)):
            found = (forbidden[1] or forbidden[2])[:SHOWN_CHARACTERS]
            raise CheckpointError(
                f"{path}: not a file of tensors alone, it also needs {found} (expected a saved state_dict)"
            ) from None
        raise CheckpointError(f"{path}: not a file of tensors ({_reason(error)})") from None
    for key in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    if not named:
        raise CheckpointError(f"{path}: expected a state dict of tensors, also under 'model' or 'state_dict'")
    return state


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:SHOWN_CHARACTERS]


def check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError, `what` and then the keys that are missing, unexpected or of another shape, if there are any."""
    shapes = [
        f"{key} is {list(given[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    found = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": shapes,
    }
    refuse_keys(found, what)


def refuse_keys(found: Mapping[str, list[str]], what: str) -> None:
    """Raise CheckpointError where `found`, {what is wrong: keys}, has any; some of them are named."""
    if any(found.values()):
        raise CheckpointError(f"{what}: " + "; ".join(f"{_some(names)} {kind}" for kind, names in found.items() if names))


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
