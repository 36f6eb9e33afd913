"""Flags and YAML files become dataclasses, by `trl.TrlParser`; what cannot be used is one line that says what was expected."""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from trl import TrlParser

from engine.command.config_file import read_config
from engine.command.published_keys import PublishedKeys
from engine.command.settings import LIMITS, check_ranges
from engine.errors import InputError

NEGATIVE = re.compile(r"-\.?\d|-(inf|nan)", re.IGNORECASE)  # how a value begins that argparse would take for a flag


class _Parser(TrlParser):
    """Complains in one line, not in one below two hundred flags of usage, and before the dataclasses are made."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the flags)")

    @staticmethod
    def _parse_dataclass_field(parser: argparse.ArgumentParser, field: dataclasses.Field) -> None:
        declared = field.metadata
        field.metadata = {key: value for key, value in declared.items() if key not in LIMITS}  # type: ignore[assignment]
        try:  # what is left are arguments of argparse's
            TrlParser._parse_dataclass_field(parser, field)
        finally:
            field.metadata = declared
        if field.default is None and field.type == bool | None:  # a switch without a value is true, whatever its default
            switch = parser._option_string_actions[f"--{field.name}"]
            switch.nargs, switch.const = "?", True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, left_over = super().parse_known_args(args, namespace)
        for kind in self.dataclass_types:
            check_ranges(kind, vars(found))
        return found, left_over


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The recipe's docstring as written; each flag under its first name, with its choices (few) and its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """With its default, unless that is nothing or "no"; or with the word that it must be given."""
        default = action.default
        if action.required:
            return f"{action.help} (required)"
        return action.help if default is None or default is False or default in ("", []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings[:2])
        if action.const is True:  # a switch, which may have a value: `--bf16`, `--bf16 false`
            return action.option_strings[0]
        kind = getattr(action.type, "__name__", "")
        if action.metavar is not None:
            value = str(action.metavar)
        elif action.choices and len(choices := list(action.choices)) <= 6:
            value = "{" + ",".join(map(str, choices)) + "}"
        elif kind == "string_to_bool":
            value = "{true,false}"
        else:
            value = kind.upper() if kind in ("int", "float", "str") else "VALUE"
        return f"{action.option_strings[0]} {value}{' ...' if action.nargs == '+' else ''}"


# What a newcomer sets of the Trainer's hundred flags; `--help_all` shows the rest.
COMMON = frozenset(
    "output_dir run_name seed per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate "
    "lr_scheduler_type warmup_steps max_grad_norm bf16 gradient_checkpointing logging_steps report_to save_strategy save_steps "
    "save_total_limit save_only_model resume_from_checkpoint deepspeed dataloader_num_workers".split()
)
TRACKERS = ("wandb", "tensorboard")


def parse_arguments(
    dataclass_types: type | Sequence[type],
    argv: Sequence[str],
    *,
    recipe: str,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    starter: Mapping[str, Any] | None = None,
    starter_unless: Collection[str] = ("model_name_or_path", "dataset_name"),
    published: PublishedKeys | None = None,
    refused: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass, filled from `argv`; `--config FILE.yaml` gives defaults, flags go on top.

    Every number is held to the range that its field names (`engine.command.settings.check_ranges`) before anything is made.

    `defaults`: the recipe's, where they differ from the dataclasses'. `starter`: those of the run on starter data; they come before
    `defaults`, and are used only where `argv` has no `--config` and sets none of `starter_unless`, the settings that bring a user's
    own model or data. `published`: what the keys of a published configuration file mean, where they are not ours. `refused`: flags
    of published scripts that are not taken, and what there is instead.
    Raises InputError for an unknown flag or setting (naming the nearest one), for a value that does not parse or is missing, and
    with the first line of any ValueError that a dataclass raises about its values.
    """
    argv, config = _without_config(argv)
    parser = _build_parser(dataclass_types, recipe, description, everything="--help_all" in argv)
    parser.set_defaults_with_config(**(defaults or {}))
    asked = {"-h", "--help", "--help_all"} & set(argv)
    if starter and config is None and not asked and not _named(parser, argv) & set(starter_unless):
        parser.set_defaults_with_config(**starter)
    flags = [option for action in parser._actions for option in action.option_strings]
    for part in argv:  # before the dataclasses are made, which for the Trainer's takes seconds
        if part.startswith("--") and part.split("=")[0] not in flags:
            flag = part.split("=")[0]  # without its value, which may be a secret
            if refused and flag in refused:
                raise InputError(f"{flag} is not taken: {refused[flag]}")
            raise InputError(f"unknown flag {flag}{_nearest(flag, flags)} (--help lists the flags)")
    if config is not None and not asked:
        found = read_config(config, parser, published)
        for kind in parser.dataclass_types:
            check_ranges(kind, found, f"{config}: ")
        parser.set_defaults_with_config(**found)
    try:
        *parsed, left_over = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(str(error).strip().splitlines()[0]) from None
    for word in left_over[:1]:
        what = f"unknown flag {word}" if word.startswith("-") else f"{word}: expected a flag, not one more value"
        raise InputError(f"{what} (--help lists the flags)")
    for tracker in {tracker for args in parsed for tracker in getattr(args, "report_to", [])} & set(TRACKERS):
        if importlib.util.find_spec(tracker) is None:
            raise InputError(f"--report_to {tracker}: {tracker} is not installed (pip install 'vesalius[tracking]')")
    for args in parsed:
        if place := getattr(args, "image_cache", None):
            os.environ["VESALIUS_IMAGE_CACHE"] = place  # for the processes that this one starts too
        if getattr(args, "allow_burned_in", False):
            os.environ["VESALIUS_ALLOW_BURNED_IN"] = "1"
    return tuple(parsed)


def _without_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The flags without `--config FILE`, and FILE."""
    flags = [part for flag in argv for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in flags:
        return flags, None
    at = flags.index("--config")
    if at == len(flags) - 1:
        raise InputError("--config: expected the name of a YAML file after it")
    rest = flags[:at] + flags[at + 2 :]
    if "--config" in rest:
        raise InputError("--config: expected one file, not several")
    return rest, flags[at + 1]


def _build_parser(dataclass_types: Any, recipe: str, description: str | None, *, everything: bool) -> _Parser:
    usage = f"python -m recipes.{recipe} [--config FILE.yaml] [--flag value ...]"
    parser = _Parser(dataclass_types, usage=usage, description=description, allow_abbrev=False, formatter_class=_Help)
    parser._negative_number_matcher = NEGATIVE  # argparse's own knows -5 and -0.5, not -1e-3 nor -5,20,80,80
    if any(_is_trainers(owner) for kind in parser.dataclass_types for owner in kind.__mro__):
        parser.add_argument("--help_all", action="help", help="show every flag of transformers.TrainingArguments too")
    _group_by_class(parser, everything=everything)
    return parser


def _is_trainers(owner: type) -> bool:
    """Whether it is `transformers.TrainingArguments`: asked by name, since importing it takes seconds."""
    return owner.__module__ == "transformers.training_args"


def _group_by_class(parser: _Parser, *, everything: bool) -> None:
    """In the help, list flags under the class that declares them, the recipe's own first, the Trainer's rarer ones not at all."""
    places: dict[str, type] = {}
    for dataclass_type in parser.dataclass_types:
        for owner in reversed(dataclass_type.__mro__):
            places |= dict.fromkeys(owner.__dict__.get("__annotations__", ()), owner)
    owners = list(dict.fromkeys(owner for kind in parser.dataclass_types for owner in kind.__mro__ if owner in places.values()))
    groups = {
        owner: parser.add_argument_group(
            "The training loop" if _is_trainers(owner) else (owner.__doc__ or "").strip().split("\n")[0].rstrip(".")
        )
        for owner in owners
    }
    for action in [action for action in parser._optionals._group_actions if action.dest in places]:
        parser._optionals._group_actions.remove(action)
        owner = places[action.dest]
        groups[owner]._group_actions.append(action)
        if _is_trainers(owner) and action.dest not in COMMON and not everything:
            action.help = argparse.SUPPRESS


def _named(parser: _Parser, argv: Sequence[str]) -> set[str]:
    """The settings that the flags in `argv` name, by any of their spellings."""
    flags = {part.split("=")[0] for part in argv}
    return {action.dest for action in parser._actions if flags & set(action.option_strings)}


def _nearest(flag: str, flags: Sequence[str]) -> str:
    near = difflib.get_close_matches(flag, flags, n=1)
    return f", did you mean {near[0]}?" if near else ""
