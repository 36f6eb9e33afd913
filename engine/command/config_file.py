"""Settings out of a YAML or JSON file, by the types of their flags.

A value is read as its flag would be: `bf16: yes`, `learning_rate: 1e-5` and `save_strategy: no` mean what they say, whatever YAML
makes of such words. A single value stands for a list of one; nothing (`limit:` or `limit: null`) for None. A mapping `env` sets
environment variables, as in TRL.
"""

import argparse
import difflib
import json
import math
import os
import re
import typing
from typing import Any

import yaml

from engine.command.published_keys import PublishedKeys, translate
from engine.errors import InputError
from engine.json_names import named_twice

LONGEST_FILE = 2**18  # bytes
MOST_VALUES = 10_000  # counted where they are used, so that aliases of aliases do not multiply
NESTED_DEEPEST = 20


class _Loader(yaml.SafeLoader):
    """YAML 1.1, with the numbers of YAML 1.2: 1e-5 is one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def read_config(path: str, parser: Any, published: PublishedKeys | None = None) -> dict[str, Any]:
    """{setting: value} of the file, which a `trl.TrlParser` knows; InputError, naming file and setting, for what it cannot use.

    `published`: what a published file's keys mean, where the recipe has one.
    """
    hints = {name: hint for kind in parser.dataclass_types for name, hint in typing.get_type_hints(kind).items()}
    actions = {option: action for action in parser._actions for option in action.option_strings}
    settings: dict[str, Any] = {}
    for key, name, node in translate(path, _entries(path), published or {}):
        if name == "env":
            _set_environment(path, node)
            continue
        action = actions.get(f"--{name}")
        if action is None or action.dest not in hints or action.nargs == 0:
            near = difflib.get_close_matches(f"--{name}", [option for option in actions if option.startswith("--")], n=1)
            raise InputError(f"{path}: unknown setting {key!r}{f', did you mean {near[0]}?' if near else ''}")
        if action.dest in settings:
            raise InputError(f"{path}: {key}: given twice")
        try:
            settings[action.dest] = _value(node, action, hints[action.dest])
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise InputError(f"{path}: {key}: {error}") from None
    return settings


def _entries(path: str) -> list[tuple[str, yaml.Node]]:
    """The file's outermost keys and what stands behind them."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    if len(data) > LONGEST_FILE:
        raise InputError(f"--config {path}: longer than {LONGEST_FILE} bytes (expected a YAML file of settings)")
    try:
        root = yaml.compose(data.decode("utf-8-sig"), Loader=_Loader)
        num_values = 0 if root is None else _count(root, {})
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: not UTF-8 text (expected a YAML file of settings)") from None
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"--config {path}: not YAML ({' '.join(str(error.problem).split())}{where})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise InputError(f"--config {path}: nested too deeply") from None
    if not isinstance(root, yaml.MappingNode):
        what = "empty" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise InputError(f"--config {path}: {what} (expected settings, one a line, as `seed: 1`)")
    if num_values > MOST_VALUES:
        raise InputError(f"--config {path}: more than {MOST_VALUES} values")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"--config {path}: line {key.start_mark.line + 1}: expected the name of a setting before the colon")
    return [(key.value, node) for key, node in root.value]


def _count(node: yaml.Node, known: dict[int, float], depth: int = 0) -> float:
    """The scalars under a node, each as often as aliases use it; infinitely many where one holds itself."""
    if depth > NESTED_DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # met again while it is counted, it holds itself
        if depth and isinstance(node, yaml.MappingNode) and (twice := named_twice(_names(node))):
            raise ValueError(f"{twice} in line {node.start_mark.line + 1} is given twice")
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _names(node: yaml.MappingNode) -> list[str]:
    """A mapping's plain keys. `<<`, which takes over another mapping's, may be there more than once."""
    return [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]


def _value(node: yaml.Node, action: argparse.Action, hint: Any) -> Any:
    """What the flag of `action`, whose setting has the type `hint`, makes of the node; ValueError says what was expected."""
    kinds = _kinds(hint)
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        if type(None) not in kinds:
            raise ValueError("no value (expected one)")
        return None
    if isinstance(node, yaml.MappingNode):
        if dict not in kinds:
            raise ValueError("a mapping (expected a single value)" if list not in kinds else "a mapping (expected a list)")
        return _json_value(node)
    if action.nargs == "+":
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [_scalar(item, action) for item in items]
    if isinstance(node, yaml.SequenceNode) and list in kinds:
        return [_scalar(item, action) for item in node.value]
    return _scalar(node, action)


def _kinds(hint: Any) -> set[Any]:
    """The plain types of a hint: `list[str] | None` has list and NoneType."""
    parts = [hint] if typing.get_origin(hint) in (None, list, dict) else typing.get_args(hint)
    return {typing.get_origin(part) or part for part in parts}


def _scalar(node: yaml.Node, action: argparse.Action) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"a {'list' if isinstance(node, yaml.SequenceNode) else 'mapping'} (expected a single value)")
    text = node.value
    if "\0" in text:
        raise ValueError("a text with a zero character")
    kind: Any = action.type if callable(action.type) else str
    words = {int: "a whole number", float: "a number"}.get(kind, "true or false" if kind.__name__ == "string_to_bool" else "")
    try:
        value = kind(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{text[:200]!r} (expected {words})" if words else str(error)) from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{text[:200]!r} (expected one of {', '.join(map(str, action.choices))})")
    return value


def _json_value(node: yaml.Node) -> Any:
    """A mapping as JSON has it."""
    try:
        value = _Loader("").construct_document(node)
        json.dumps(value, allow_nan=False)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = getattr(error, "problem", None) or error
        raise ValueError(f"a mapping that JSON cannot hold ({reason})") from None
    return value


def _set_environment(path: str, node: yaml.Node) -> None:
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}: env: expected a mapping of names to values")
    for name, value in node.value:
        plain = isinstance(name, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)
        if not plain or not re.fullmatch(r"[A-Za-z_]\w*", name.value) or "\0" in value.value:
            raise InputError(f"{path}: env: expected a mapping of names to values")
        os.environ[name.value] = value.value
