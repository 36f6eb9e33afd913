"""The house rules: who may import whom, how long things are, what they are called, and that the README lists every recipe."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.__main__ import list_recipes

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "engine": {"engine", "kernels"},
    "recipes": {"kernels", "models", "engine"},
    "bench": {"bench", "kernels", "models", "engine", "recipes"},
    "tests": {"tests", "bench", "kernels", "models", "engine", "recipes"},
}
FENCED = {
    "triton": ("kernels/", "bench/", "tests/"),
    "nvidia.dali": ("engine/data/",),
    "tensorrt": ("engine/export/",),
    "tensorrt_rtx": ("engine/export/",),
    "torch_tensorrt": ("engine/export/",),
}
BANNED_NAMES = {"utils", "helpers", "common", "misc", "base", "manager", "v2", "new", "fast"}
FILE_LINES, RECIPE_LINES, FUNCTION_LINES, KERNEL_LINES = 500, 150, 80, 150

Offence = tuple[int, str]  # line, what is wrong


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions included; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layering(path: str, source: str) -> Iterator[Offence]:
    room = path.split("/")[0]
    if room not in ROOMS:
        return
    for line, name in imported(ast.parse(source)):
        target = name.split(".")[0]
        if target in ROOMS and target not in ROOMS[room]:
            yield line, f"{room} imports {name}"
        for package, rooms in FENCED.items():
            if f"{name}.".startswith(f"{package}.") and not path.startswith(rooms):
                yield line, f"{package} is imported outside {' and '.join(rooms)}"


def sizes(path: str, source: str) -> Iterator[Offence]:
    room = path.split("/")[0]
    if room == "tests":
        return
    limit = RECIPE_LINES if room == "recipes" and not path.endswith("/__main__.py") else FILE_LINES
    if len(source.splitlines()) > limit:
        yield limit, f"{len(source.splitlines())} lines, more than {limit}"
    limit = KERNEL_LINES if room == "kernels" else FUNCTION_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= limit:
            yield node.lineno, f"{node.name} has {node.end_lineno - node.lineno + 1} lines, more than {limit}"


def names(path: str, source: str) -> Iterator[Offence]:
    if BANNED_NAMES & set(Path(path).with_suffix("").parts):
        yield 1, "a name that says nothing"
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"#.*\b(TO[D]O|FIX[M]E)\b", line):
            yield number, "unfinished business"


def recipe_docstring(path: str, source: str) -> Iterator[Offence]:
    """A recipe says how it is run."""
    if re.fullmatch(r"recipes/[^_/]\w*\.py", path):
        module = path.removesuffix(".py").replace("/", ".")
        if f"-m {module}" not in (ast.get_docstring(ast.parse(source)) or ""):
            yield 1, f"its docstring lacks the command: python -m {module}"


def our_files() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")) + [ROOT / "setup.py"]


@pytest.mark.parametrize("rule", [layering, sizes, names, recipe_docstring])
def test_the_house_is_in_order(rule):
    found = []
    for file in our_files():
        path = file.relative_to(ROOT).as_posix()
        found += [f"{path}:{line}: {what}" for line, what in rule(path, file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "rule, path, source, offence",
    [
        (layering, "engine/a.py", "def f():\n    from models.sam import x", (2, "engine imports models.sam.x")),
        (layering, "models/a.py", "import engine", (1, "models imports engine")),
        (layering, "kernels/a.py", "import engine.command.run", (1, "kernels imports engine.command.run")),
        (layering, "recipes/a.py", "from recipes import b", (1, "recipes imports recipes.b")),
        (layering, "engine/a.py", "import triton.language as tl", (1, "triton is imported outside kernels/ and bench/ and tests/")),
        (layering, "engine/data.py", "from nvidia import dali", (1, "nvidia.dali is imported outside engine/data/")),
        (layering, "engine/serve.py", "from tensorrt import Builder", (1, "tensorrt is imported outside engine/export/")),
        (sizes, "engine/a.py", "\n" * 501, (500, "501 lines, more than 500")),
        (sizes, "recipes/a.py", "\n" * 151, (150, "151 lines, more than 150")),
        (sizes, "models/a.py", "def f():\n" + "    x = 1\n" * 80, (1, "f has 81 lines, more than 80")),
        (names, "engine/utils/a.py", "", (1, "a name that says nothing")),
        (names, "engine/a.py", "x = 1  # " + "TO" + "DO later", (1, "unfinished business")),
        (recipe_docstring, "recipes/a.py", '"""Does it."""', (1, "its docstring lacks the command: python -m recipes.a")),
    ],
)
def test_each_rule_finds_its_offence(rule, path, source, offence):
    assert list(rule(path, source)) == [offence]


@pytest.mark.parametrize(
    "rule, path, source",
    [
        (layering, "kernels/a.py", "import triton\nfrom kernels.b import c"),
        (layering, "recipes/a.py", "from engine.command.run import run_command\nimport models\nimport kernels"),
        (layering, "engine/data/loader.py", "import nvidia.dali.fn"),
        (layering, "engine/a.py", "import tritonclient"),
        (sizes, "kernels/a.py", "def f():\n" + "    x = 1\n" * 149),
        (sizes, "engine/a.py", "def f():\n" + "    x = 1\n" * 79),
        (names, "engine/database.py", "url = 'https://x/#todo'"),
    ],
)
def test_no_rule_forbids_what_is_allowed(rule, path, source):
    assert list(rule(path, source)) == []


def test_python_m_recipes_lists_every_recipe_at_once():
    code = "import runpy, sys; runpy.run_module('recipes', run_name='__main__'); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, "the list must not import the recipes"
    modules = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", "__main__"}
    assert set(re.findall(r"^  python -m recipes\.(\w+) +\S", listed.stdout, re.MULTILINE)) == modules


def test_the_readmes_table_is_what_python_m_recipes_lists():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README yet")
    expected = {f"| `{module}` | {line} |" for recipes in list_recipes().values() for module, line in recipes.items()}
    rows = {line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| `recipes.")}
    assert rows == expected, "README.md's table of recipes should have these rows:\n" + "\n".join(sorted(expected))
