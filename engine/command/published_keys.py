"""Keys of a published configuration file, where they are not ours: each means settings of ours, or is left out by name.

A table has the keys as they stand in the file, those of a section as `section.key`; what it says of one is

    a name          that setting is meant
    Unused(why)     the run goes without it, and the log says why
    a function      of the value as JSON has it, to {setting: value}; ValueError says what was expected

A key that the table lacks is one of our settings, in a section as outside of it.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from engine.errors import InputError


@dataclass(frozen=True)
class Unused:
    """`why`: half a sentence for the log."""

    why: str


PublishedKeys = Mapping[str, str | Unused | Callable[[Any], dict[str, Any]]]
Entry = tuple[str, str, yaml.Node]  # the key in the file, the setting, what it is set to
logger = logging.getLogger(__name__)


def translate(path: str, entries: list[tuple[str, yaml.Node]], keys: PublishedKeys) -> Iterator[Entry]:
    """The entries of the file `path` as settings of ours. InputError, naming file and key, for what has no meaning."""
    for key, own, node in _without_sections(path, entries, {key.split(".")[0] for key in keys if "." in key}):
        meaning = keys.get(key, own)
        if isinstance(meaning, Unused):
            logger.warning("%s: %s is not used: %s", path, key, meaning.why)
        elif isinstance(meaning, str):
            yield key, meaning, node
        else:
            try:
                settings = meaning(yaml.SafeLoader("").construct_document(node))
                for name, value in settings.items():
                    node_of_ours = yaml.compose(json.dumps(value), Loader=yaml.SafeLoader)
                    assert node_of_ours is not None  # JSON is never empty
                    yield key, name, node_of_ours
            except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
                raise InputError(f"{path}: {key}: {error}") from None


def _without_sections(path: str, entries: list[tuple[str, yaml.Node]], sections: set[str]) -> Iterator[Entry]:
    """The entries, and in place of each section those within it, as (section.key, key, value)."""
    for key, node in entries:
        if key not in sections:
            yield key, key, node
            continue
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"{path}: {key}: expected settings within it")
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{path}: {key}: expected the names of settings before the colons")
            yield f"{key}.{name.value}", name.value, value
