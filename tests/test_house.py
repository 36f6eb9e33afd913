"""The house rules: who may import whom, how long things are, what they are called, and that the documents name what is there.

A rule takes a file's path and source and yields its offences. Below, each finds an offence made for it, and passes its neighbour.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
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
    "flash_attn": ("kernels/prefix_providers.py",),
    "xformers": ("kernels/prefix_providers.py",),
    "deepspeed": ("engine/training/zero/", "bench/", "tests/"),
    "nvidia.dali": ("engine/data/loaders/",),
    "nibabel": ("engine/data/volumes/", "bench/", "tests/"),
    "highdicom": ("engine/data/volumes/", "bench/", "tests/"),
    "tensorrt": ("engine/export/",),
    "tensorrt_rtx": ("engine/export/",),
    "torch_tensorrt": ("engine/export/",),
    "onnx": ("engine/export/", "bench/", "tests/"),
    "onnxscript": ("engine/export/", "bench/", "tests/"),
    "onnxruntime": ("engine/export/", "bench/", "tests/"),
    "blosc2": ("engine/viewer/", "tests/"),
    "starlette": ("engine/viewer/", "tests/"),
    "uvicorn": ("engine/viewer/", "tests/"),
}
# Who may import whom within engine/: a room itself, and those named. Each stands after those it may import, so there are no cycles.
# A module that lies in engine/ itself is a leaf.
ENGINE = {
    "leaves": set(),
    "download": {"leaves"},
    "command": {"leaves"},
    "report": {"leaves"},
    "data": {"leaves", "command"},
    "rollout": {"leaves", "command", "data"},
    "evaluation": {"leaves", "command", "data", "rollout"},
    "tasks": {"leaves", "command", "report", "data", "rollout", "evaluation"},
    "training": {"leaves", "command", "report", "data", "rollout", "evaluation", "tasks"},
    "runs": {"leaves", "command", "report", "data", "rollout", "evaluation", "tasks", "training"},
    "export": {"leaves", "command", "data"},
    "serve": {"leaves", "command", "data", "rollout", "evaluation", "export"},
    "viewer": {"leaves", "data"},
}
# Distributions whose modules have another name, and those that no module of ours imports (setup.py says what for).
DISTRIBUTIONS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "liger_kernel": "liger-kernel",
    "rouge_score": "rouge-score",
    "nnInteractive": "nninteractive-client",
}
NOT_IMPORTED = {"protobuf", "pydicom-data", "python-gdcm"}
BANNED_NAMES = {"utils", "helpers", "common", "misc", "base", "manager", "v2", "new", "fast"}
FILE_LINES, RECIPE_LINES, FUNCTION_LINES, KERNEL_LINES, FOLDER_FILES = 500, 150, 80, 150, 14

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


def engine_room(parts: list[str]) -> str:
    """The room of a module of engine/, given the parts of its path or dotted name after `engine`."""
    return parts[0] if parts and parts[0] in ENGINE else "leaves"


def engine_layering(path: str, source: str) -> Iterator[Offence]:
    """Within engine/; `from engine import command` counts as importing the room."""
    if not path.startswith("engine/"):
        return
    folders = path.split("/")[1:-1]
    room = engine_room(folders)
    if folders and folders[0] not in ENGINE:
        yield 1, f"engine/{folders[0]}/ is a room that ENGINE does not know"
    for line, name in imported(ast.parse(source)):
        package, *parts = name.split(".")
        target = engine_room(parts)
        if package == "engine" and target != room and target not in ENGINE[room]:
            yield line, f"{room} imports {name}"


def requirements() -> tuple[set[str], set[str]]:
    """Names of the distributions that setup.py asks for: always, and in an extra."""
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
    }
    extras = sum(values["EXTRAS"].values(), [])
    base, extra = ({re.match(r"[\w.-]+", line).group() for line in lines} for lines in (values["REQUIREMENTS"], extras))
    return base, extra


def third_party(path: str, source: str) -> Iterator[tuple[int, str, str]]:
    """(line, dotted name, distribution) of every import that is neither Python's nor ours."""
    for line, name in imported(ast.parse(source)):
        package = name.split(".")[0]
        if package not in ROOMS and package not in sys.stdlib_module_names:
            yield line, name, DISTRIBUTIONS.get(package, package)


def declared(path: str, source: str) -> Iterator[Offence]:
    """What is imported is asked for by setup.py: in an extra only for bench/ and tests/, and where FENCED says who guards it."""
    base, extra = requirements()
    for line, name, distribution in third_party(path, source):
        fenced = any(f"{name}.".startswith(f"{package}.") for package in FENCED)
        elsewhere = distribution in extra and path.startswith(("bench/", "tests/"))
        if not (distribution in base or fenced or elsewhere or path == "setup.py"):
            yield line, f"{name} is imported, and setup.py does not ask for {distribution}"


def annotations(path: str, source: str) -> Iterator[Offence]:
    """Public functions, and methods of public classes, say what they take and return. Triton's take what Triton makes of it."""
    if path.startswith(("kernels/", "models/", "engine/")):
        yield from _unannotated(ast.parse(source).body, "")


def _unannotated(body: list[ast.stmt], owner: str) -> Iterator[Offence]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _unannotated(node.body, f"{owner}{node.name}.")
        if not isinstance(node, ast.FunctionDef) or (node.name.startswith("_") and not node.name.endswith("__")):
            continue
        decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
        if decorators & {"triton.jit", "jit"}:
            continue
        positional = node.args.posonlyargs + node.args.args
        if owner and "staticmethod" not in decorators:
            positional = positional[1:]  # self, cls
        every = [*positional, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        missing = [argument.arg for argument in every if argument.annotation is None]
        if node.returns is None and node.name not in ("__init__", "__post_init__"):
            missing.append("return")
        if missing:
            yield node.lineno, f"{owner}{node.name} lacks annotations: {', '.join(missing)}"


def encodings(path: str, source: str) -> Iterator[Offence]:
    """Text is read and written in a named encoding, not in that of the machine."""
    if path.startswith("tests/"):
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "encoding" in {keyword.arg for keyword in node.keywords}:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) < 2):
            yield node.lineno, f"{name} without an encoding"
        elif name == "open" and _opens_text(node):
            yield node.lineno, "open without an encoding"


def _opens_text(call: ast.Call) -> bool:
    """`open(path)`, and any `open` whose mode has no b. Without a mode, `x.open()` may be an image's or an archive's."""
    builtin = isinstance(call.func, ast.Name)
    modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[1 if builtin else 0 :][:1]
    if not modes:
        return builtin
    mode = modes[0].value if isinstance(modes[0], ast.Constant) else None
    return isinstance(mode, str) and re.fullmatch(r"[rwaxt+]+", mode) is not None


def crowded(paths: list[str]) -> Iterator[str]:
    """Folders of engine/ and models/ that have become a floor without rooms."""
    folders = Counter(path.rpartition("/")[0] for path in paths if path.startswith(("engine/", "models/")))
    yield from (
        f"{folder}/ has {files} Python files, more than {FOLDER_FILES}" for folder, files in folders.items() if files > FOLDER_FILES
    )


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


RULES = [layering, engine_layering, declared, annotations, encodings, sizes, names, recipe_docstring]


@pytest.mark.parametrize("rule", RULES)
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
        (layering, "kernels/a.py", "import engine.command.main", (1, "kernels imports engine.command.main")),
        (layering, "recipes/a.py", "from recipes import b", (1, "recipes imports recipes.b")),
        (layering, "engine/a.py", "import triton.language as tl", (1, "triton is imported outside kernels/ and bench/ and tests/")),
        (
            layering,
            "engine/a.py",
            "import deepspeed",
            (1, "deepspeed is imported outside engine/training/zero/ and bench/ and tests/"),
        ),
        (layering, "engine/data.py", "from nvidia import dali", (1, "nvidia.dali is imported outside engine/data/loaders/")),
        (layering, "engine/serve.py", "from tensorrt import Builder", (1, "tensorrt is imported outside engine/export/")),
        (engine_layering, "engine/files.py", "from engine.data.images import x", (1, "leaves imports engine.data.images.x")),
        (engine_layering, "engine/evaluation/a.py", "from engine.report.a import x", (1, "evaluation imports engine.report.a.x")),
        (engine_layering, "engine/report/a.py", "def f():\n    from engine import command", (2, "report imports engine.command")),
        (engine_layering, "engine/tasks/a.py", "import engine.training.grpo", (1, "tasks imports engine.training.grpo")),
        (engine_layering, "engine/data/starter/a.py", "from engine.tasks import x", (1, "data imports engine.tasks.x")),
        (engine_layering, "engine/cellar/a.py", "", (1, "engine/cellar/ is a room that ENGINE does not know")),
        (declared, "engine/a.py", "import ninja", (1, "ninja is imported, and setup.py does not ask for ninja")),
        (declared, "tests/a.py", "from timm import x", (1, "timm.x is imported, and setup.py does not ask for timm")),
        (annotations, "engine/a.py", "def f(x, *y: int, z=1): ...", (1, "f lacks annotations: x, z, return")),
        (annotations, "models/a.py", "class A:\n    def __init__(self, x): ...", (2, "A.__init__ lacks annotations: x")),
        (annotations, "kernels/a.py", "class A:\n    @staticmethod\n    def f(x) -> int: ...", (3, "A.f lacks annotations: x")),
        (encodings, "engine/a.py", "with open(path) as file:\n    pass", (1, "open without an encoding")),
        (encodings, "recipes/a.py", "Path(name).open('w')", (1, "open without an encoding")),
        (encodings, "models/a.py", "x = path.read_text()", (1, "read_text without an encoding")),
        (encodings, "engine/a.py", "path.write_text(text, newline='')", (1, "write_text without an encoding")),
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
        (layering, "recipes/a.py", "from engine.command.main import run_command\nimport models\nimport kernels"),
        (layering, "engine/data/loaders/dali.py", "import nvidia.dali.fn"),
        (layering, "engine/a.py", "import tritonclient"),
        (
            engine_layering,
            "engine/runs/train.py",
            "from engine.report.a import x\nfrom engine.files import y\nimport engine.runs.evaluate",
        ),
        (engine_layering, "engine/files.py", "from engine.errors import InputError\nimport kernels"),
        (engine_layering, "recipes/a.py", "import engine.runs.train"),
        (declared, "engine/a.py", "import os, torch\nfrom PIL import Image\nfrom kernels import a"),
        (declared, "bench/a.py", "import liger_kernel.transformers, triton"),
        (annotations, "engine/a.py", "def _f(x): ...\n\ndef g(x: int) -> int:\n    def h(y): ...\n    return x"),
        (annotations, "engine/a.py", "class _A:\n    def f(self, x): ..."),
        (annotations, "kernels/a.py", "@triton.jit\ndef f(x): ..."),
        (annotations, "recipes/a.py", "def f(x): ..."),
        (
            encodings,
            "engine/a.py",
            "open(path, 'rb')\npath.open('wb')\nopen(path, encoding='utf-8')\npath.read_text(encoding='utf-8')",
        ),
        (
            encodings,
            "engine/a.py",
            "Image.open(file)\nimage.open()\nsession.open('GET', path)\narchive.open(name)\npath.write_text(x, 'utf-8')",
        ),
        (sizes, "kernels/a.py", "def f():\n" + "    x = 1\n" * 149),
        (sizes, "engine/a.py", "def f():\n" + "    x = 1\n" * 79),
        (names, "engine/database.py", "url = 'https://x/#todo'"),
    ],
)
def test_no_rule_forbids_what_is_allowed(rule, path, source):
    assert list(rule(path, source)) == []


def test_the_engines_rooms_stand_in_order():
    seen = set()
    for room, below in ENGINE.items():
        assert below <= seen, f"{room} may import rooms that stand after it"
        seen.add(room)


def test_no_folder_is_crowded():
    found = list(crowded([file.relative_to(ROOT).as_posix() for file in our_files()]))
    assert not found, "\n".join(found)


def test_a_crowded_folder_is_found():
    fifteen = [f"engine/data/{i}.py" for i in range(15)]
    assert list(crowded(fifteen)) == ["engine/data/ has 15 Python files, more than 14"]
    assert list(crowded([*fifteen[1:], *(f"recipes/{i}.py" for i in range(20))])) == []


def test_nothing_is_asked_for_that_nothing_imports():
    used = {distribution for file in our_files() for *_, distribution in third_party(file.name, file.read_text(encoding="utf-8"))}
    assert requirements()[0] - used == NOT_IMPORTED


def test_python_m_recipes_lists_every_recipe_at_once():
    code = "import runpy, sys; runpy.run_module('recipes', run_name='__main__'); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode == 0, "the list must not import the recipes"
    modules = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__", "__main__"}
    assert set(re.findall(r"^  python -m recipes\.(\w+) +\S", listed.stdout, re.MULTILINE)) == modules


def test_the_table_of_recipes_is_what_python_m_recipes_lists():
    expected = {f"| `{module}` | {line} |" for recipes in list_recipes().values() for module, line in recipes.items()}
    rows = {
        line for line in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `recipes.")
    }
    assert rows == expected, "docs/recipes.md should have these rows:\n" + "\n".join(sorted(expected))


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def dead_links(folder: Path, text: str) -> Iterator[str]:
    """Relative links of a document that lead nowhere."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and not (folder / target).exists():
            yield target


def dead_paths(text: str) -> Iterator[str]:
    """Files and folders of ours, named in a document's text, that are not there."""
    for path in re.findall(r"\b(?:kernels|models|engine|recipes|bench|tests|docs)/[\w./-]*\w", text):
        if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*")):
            yield path


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_what_a_document_names_is_there(document):
    text = document.read_text(encoding="utf-8")
    gone = list(dead_links(document.parent, text))
    if document.name != "CHANGELOG.md":  # it also names what there was
        gone += dead_paths(text)
    assert not gone, f"{document.name} names what is not there: {', '.join(gone)}"


def test_dead_links_and_paths_are_found():
    assert list(dead_links(ROOT, "[a](LICENSE) [b](docs/gone.md#part) [c](https://x.org/y)")) == ["docs/gone.md"]
    assert list(dead_paths("see `engine/errors.py`, engine/gone.py and kernels/")) == ["engine/gone.py"]
