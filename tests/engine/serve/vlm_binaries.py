"""The binaries of text and of VLMs and the bundle that they run, each made once a process.

VESALIUS_BINARIES, a folder where CMake built them, and VESALIUS_VLM_BUNDLE, a bundle of the starter policy, spare the time.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from models.loading import STARTER_POLICY

ROOT = Path(__file__).resolve().parents[3]
ALONE = {"vesalius-tokenize": ROOT / "engine/serve/tokenizer"}  # what is built without torch


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="vesalius-binaries-")  # taken away when the process ends


@cache
def binary(name: str) -> Path:
    """Built where it is not there yet; skips where a compiler or Debian's packages are missing."""
    if (given := os.environ.get("VESALIUS_BINARIES")) is not None:
        return next(path for path in Path(given).rglob(name) if path.is_file())
    missing = [tool for tool in ("cmake", "c++", "pkg-config") if shutil.which(tool) is None]
    libraries = ["libpcre2-8", "libutf8proc"] if name in ALONE else ["libpcre2-8", "libutf8proc", "libpng", "libjpeg", "libcrypto"]
    if missing or subprocess.run(["pkg-config", "--exists", *libraries]).returncode:
        pytest.skip(f"building needs {', '.join(missing or libraries)} (docs/serving.md has Debian's packages)")
    folder = Path(_folder().name) / ("alone" if name in ALONE else "all")
    configure = ["-S", str(ALONE.get(name, ROOT)), "-B", str(folder), f"-DVESALIUS_PYTHON={sys.executable}"]
    for command in (configure, ["--build", str(folder), "--target", name]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(path for path in folder.rglob(name) if path.is_file())


@cache
def starter_bundle() -> Path:
    """The starter policy, exported by the recipe."""
    if (given := os.environ.get("VESALIUS_VLM_BUNDLE")) is not None:
        return Path(given)
    out = Path(_folder().name) / "bundle"
    command = [sys.executable, "-m", "recipes.export", "--model", str(STARTER_POLICY), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    headline = json.loads(done.stdout.splitlines()[-1])
    assert headline["kind"] == "vlm" and headline["max_abs_error"] < 1e-4
    return out
