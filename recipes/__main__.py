"""List the recipes: `python -m recipes`. Their docstrings are read, not their imports, so that it answers at once."""

import ast
import re
import sys
from pathlib import Path

from engine.command.streams import write_output

# Systems by the first part of a recipe's name, in the order they are listed.
SYSTEMS = {
    "medr1": "Med-R1",
    "medvlm": "MedVLM-R1",
    "skin": "Skin diagnosis with spatial awareness",
    "prs": "PRS-Med",
    "unimed": "Uni-MedVLM",
    "sam": "Segment anything",
    "segment": "Segment anything",
    "serve": "Segment anything",
    "merge": "Adapters",
    "starter": "Starter data and policy",
    "download": "Published models and data sets",
    "export": "Export",
}


def list_recipes() -> dict[str, dict[str, str]]:
    """System -> {module: first line of its docstring, without the system's name}; an unknown system goes by its prefix."""
    systems: dict[str, dict[str, str]] = {title: {} for title in SYSTEMS.values()}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "(no docstring)"
        prefix = path.stem.split("_")[0]
        title = SYSTEMS.get(prefix, prefix)
        line = re.sub(
            rf"^{title.split(' with ')[0]}[,:] (.)", lambda first: first[1].upper(), docstring.splitlines()[0].rstrip(".")
        )
        systems.setdefault(title, {})[f"recipes.{path.stem}"] = line
    return {title: recipes for title, recipes in systems.items() if recipes}


def main() -> None:
    lines, systems = [], list_recipes()
    width = max(len(module) for recipes in systems.values() for module in recipes)
    for title, recipes in systems.items():
        lines += ["", title, *(f"  python -m {module:<{width}} {line}" for module, line in recipes.items())]
    error = write_output("\n".join([*lines, "", "--help after a recipe's name lists its flags."]))
    if error is not None:
        print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
