"""Values of the Trainer's own settings that are more than a number or a choice: JSON objects, lists of pairs, names of trackers.

The Trainer looks at them late, some when training begins, and then in a traceback.
"""

import dataclasses
import importlib.util
import inspect
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import InputError
from engine.files import read_bounded
from engine.json_names import each_once
from engine.training.config.optimization import parse_optim_args, refuse_schedules_of_evaluation

OBJECTS = ("accelerator_config", "deepspeed", "gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
IN_FILES = ("accelerator_config", "deepspeed")  # what may also be the name of a JSON file
LARGEST = 1 << 20  # bytes of such a file
OPTIONS = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug"}  # torch.utils.checkpoint's


def check_values(args: Any) -> None:
    """InputError, naming flag and value, for the first value of `transformers.TrainingArguments` that means nothing."""
    refuse_schedules_of_evaluation(args.lr_scheduler_type)
    for name in OBJECTS:
        value = getattr(args, name, None)
        if value is None or value == "" or not isinstance(value, str | Mapping):
            continue
        found = _object(name, value)
        _check_finite(name, found)
        _check_keys(name, found, args)
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise InputError("--deepspeed: deepspeed is not installed (pip install 'vesalius[scale]')")
    parse_optim_args(args.optim_args)
    _check_trackers(args.report_to)


def _object(name: str, value: str | Mapping) -> Mapping:
    if isinstance(value, Mapping):
        return value
    text, shown, or_file = value, value[:80], " or the name of a file with one" if name in IN_FILES else ""
    if name in IN_FILES and not value.lstrip().startswith("{"):
        try:
            text = read_bounded(value, LARGEST).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise InputError(f"--{name} {shown}: {reason} (expected a JSON object{or_file})") from None
    try:
        found = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--{name} {shown}: not JSON ({error}; expected an object{or_file})") from None
    if not isinstance(found, dict):
        raise InputError(f"--{name} {shown}: expected a JSON object{or_file}")
    return found


def _check_finite(name: str, found: Mapping) -> None:
    """InputError for a number in it, at whatever depth, that is none: Python reads NaN in JSON, and 1e999 as infinite."""
    left: list[tuple[str, Any]] = [("", found)]
    while left:
        place, value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name}: {place[:80]} is {value}: expected finite numbers")
        inside = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
        left += [(f"{place}.{key}" if place else str(key), item) for key, item in inside]


def _check_keys(name: str, found: Mapping, args: Any) -> None:
    known: Collection[str] | None = None
    if name == "lr_scheduler_kwargs":
        known = _keywords(_schedule(args.lr_scheduler_type))
    elif name == "gradient_checkpointing_kwargs":
        known = OPTIONS
    elif name == "accelerator_config":
        from transformers.trainer_pt_utils import AcceleratorConfig

        known = {declared.name for declared in dataclasses.fields(AcceleratorConfig)}
    unknown = [str(key) for key in found if known is not None and key not in known]
    if unknown:
        raise InputError(f"--{name}: {unknown[0]!r} is not known there (expected some of {', '.join(sorted(known or ()))})")


def _schedule(kind: Any) -> Any:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    return TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]


def _keywords(function: Any) -> set[str]:
    """What a schedule may be told beyond what the Trainer tells it."""
    return set(inspect.signature(function).parameters) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def _check_trackers(report_to: Any) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            raise InputError(f"--report_to {name}: expected none, all or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
