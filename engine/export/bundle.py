"""A bundle: a folder of packages, their weights, and manifest.json, which has the size and SHA-256 of every other file.

    BUNDLE/manifest.json   weights.safetensors   packages/NAME.pt2 | onnx/NAME.onnx | engines/NAME.engine

It is written beside its place and renamed, so that none is there in part, and the manifest is written last.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import InputError
from engine.files import open_regular, read_bounded, refuse_unwritable, write_json
from engine.json_names import each_once

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
FORMAT, FORMAT_VERSION = "vesalius-bundle", 1
MANIFEST_BYTES = 1 << 26
BLOCK = 1 << 20  # bytes that are hashed at a time


def refuse_existing(out: Path) -> None:
    """InputError where a bundle cannot come to lie: there is a file, or a folder that is not empty."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"--out {out}: exists already (expected a folder that does not, or an empty one)")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, beside `out`, which becomes `out` when the block ends well and is taken away when it does not."""
    refuse_existing(out)
    refuse_unwritable("--out", out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as staging:
        whole = Path(staging) / "whole"
        whole.mkdir()
        yield whole
        refuse_existing(out)
        out.mkdir(exist_ok=True)
        out.rmdir()  # where it was there, empty
        os.rename(whole, out)


def seal(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder that is otherwise complete, with its files' sizes and hashes; returns what was written."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths}
    sealed = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "files": files}
    write_json(folder / MANIFEST, sealed)
    return sealed


def read_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle whose files are all as it says; InputError, one line that names the file, where one is not."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (expected a bundle)")
    try:
        manifest = json.loads(read_bounded(path, MANIFEST_BYTES), object_pairs_hook=each_once)
    except FileNotFoundError:
        raise InputError(f"{folder}: no bundle (expected {MANIFEST} in it)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a bundle (expected format {FORMAT})")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: format_version {manifest.get('format_version')} (expected {FORMAT_VERSION})")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise InputError(f"{path}: expected `files`, a size and a SHA-256 for each")
    for name, entry in files.items():
        _check_file(folder, name, entry)
    return manifest


def _check_file(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    inner = PurePosixPath(name)
    if inner.is_absolute() or not inner.parts or set(inner.parts) & {"..", "."} or "\\" in name or ":" in name:
        raise InputError(f"{folder / MANIFEST}: names {name[:80]!r} (expected a file within the bundle)")
    path = folder / inner
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror} (expected by {MANIFEST})") from None
    if size != entry.get("bytes"):
        raise InputError(f"{path}: {size:,} bytes (expected {entry.get('bytes')} by {MANIFEST})")
    if sha256(path) != entry.get("sha256"):
        raise InputError(f"{path}: was changed (its SHA-256 is not the one in {MANIFEST})")


def sha256(path: Path, *others: Path) -> str:
    """Of a file's content, in hexadecimal digits; of several files, that of their digests written one after another."""
    if others:
        return hashlib.sha256("".join(map(sha256, (path, *others))).encode()).hexdigest()
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
