"""The binaries, built once, and a small bundle. Skipped where a C++ compiler or a library of docs/serving.md is missing."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine.export.export import export_bundle
from models.loading import STARTER_POLICY
from tests.engine.serve.small_segmenter import SmallSegmenter

ROOT = Path(__file__).resolve().parents[3]
HEADERS = ("boost/beast.hpp", "nlohmann/json.hpp", "CLI/CLI.hpp", "png.h", "jpeglib.h", "openssl/evp.h", "gtest/gtest.h")
HEADERS += ("pcre2.h", "utf8proc.h")


def missing():
    """What of a compiler, CMake and Debian's libraries is not here."""
    found = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if not found:
        source = "#include <cstdio>\n" + "".join(
            f'#if !__has_include(<{header}>)\n#error "{header}"\n#endif\n' for header in HEADERS
        )
        compiled = subprocess.run(["c++", "-fsyntax-only", "-x", "c++", "-"], input=source, capture_output=True, text=True)
        found = [header for header in HEADERS if f'"{header}"' in compiled.stderr]
    return found


@contextmanager
def only_one(lock):
    """Of the processes that run tests side by side."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of this run, the same for all its processes."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def binaries(shared):
    """The folder of the binaries: VESALIUS_BINARIES, where they were built before, or build/, where they are built now."""
    if "VESALIUS_BINARIES" in os.environ:
        return Path(os.environ["VESALIUS_BINARIES"])
    if lacking := missing():
        pytest.skip(f"the binaries cannot be built: no {', '.join(lacking)} (docs/serving.md has the apt-get line)")
    build = ROOT / "build"
    with only_one(shared / "build.lock"):
        for command in (["cmake", "-S", ROOT, "-B", build, f"-DVESALIUS_PYTHON={sys.executable}"], ["cmake", "--build", build]):
            built = subprocess.run(command, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return build


@pytest.fixture(scope="session")
def small_bundle(binaries, shared):
    """Not to be changed; `bundle` may be."""
    folder = shared / "small_bundle"
    with only_one(shared / "bundle.lock"):
        if not folder.exists():
            export_bundle(SmallSegmenter().exported(), "aoti", torch.device("cpu"), torch.float32, folder)
    return folder


@pytest.fixture
def bundle(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "bundle")


@pytest.fixture(scope="session")
def starter_bundle(shared, binaries):
    """The starter policy, exported by the recipe: VESALIUS_VLM_BUNDLE, or made once a run."""
    if "VESALIUS_VLM_BUNDLE" in os.environ:
        return Path(os.environ["VESALIUS_VLM_BUNDLE"])
    out = shared / "starter_vlm"
    with only_one(shared / "starter_vlm.lock"):
        if not out.exists():
            command = [sys.executable, "-m", "recipes.export", "--model", str(STARTER_POLICY), "--out", str(out)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            headline = json.loads(done.stdout.splitlines()[-1])
            assert headline["kind"] == "vlm" and headline["max_abs_error"] < 1e-4
    return out
