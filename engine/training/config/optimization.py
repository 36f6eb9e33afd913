"""Optimizer and learning rate, tried out on one weight before anything is loaded.

The Trainer builds both when training begins, in tracebacks, and leaves out without a word what an optimizer does not take. Here
each part of --optim_args has to be read by the optimizer, and the schedule has to give a rate to train with.
"""

import math
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_scheduler
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext, is_optimizer_factory

from engine.errors import InputError

FAULTS = (ValueError, TypeError, ArithmeticError, ImportError, NotImplementedError, RuntimeError)
OF_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that follow an evaluation during training
SWITCHES = {"nesterov", "centered"}  # optimizers take any word but these for "false"
WORDS = {"true", "false", "yes", "no", "1", "0"}
OF_A_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that look for layers: one weight has none
TYPICAL_STEPS = 1000  # of a run whose number of steps its rows decide
MOST_RATES = 2000  # that are looked at
ROUNDING = 1e-6


class _Read(UserDict):
    """A dict that notes which of its keys were asked for and were there."""

    def __init__(self, content: dict[str, str]) -> None:
        self.read: set[str] = set()
        super().__init__(content)

    def __getitem__(self, key: str) -> str:
        value = super().__getitem__(key)
        self.read.add(key)
        return value


def check_learning(args: Any) -> None:
    """InputError, naming the flags, where settings of `transformers.TrainingArguments` make no optimizer or no learning rate, or
    neither looks at them."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = try_optimizer(args, weight) or torch.optim.SGD([weight], lr=args.learning_rate)
    _check_warm_up(args)
    steps = args.max_steps if args.max_steps > 0 else max(TYPICAL_STEPS, 2 * math.ceil(args.warmup_steps))
    with_rates(args, steps, lambda: _schedule(args, optimizer, steps))


def _schedule(args: Any, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def parse_optim_args(text: str | None) -> dict[str, str]:
    """`name=value,name=value` by name; InputError where it is not that."""
    found: dict[str, str] = {}
    for pair in filter(None, (text or "").replace(" ", "").split(",")):
        name, _, value = pair.partition("=")
        if not name or pair.count("=") != 1:
            raise InputError(f"--optim_args {text}: expected name=value,name=value")
        if name in found:
            raise InputError(f"--optim_args {text}: {name} is there twice")
        try:
            finite = math.isfinite(float(value))
        except ValueError:  # a word
            finite = True
        if not finite:
            raise InputError(f"--optim_args {text}: {name} is {value}: expected a finite number")
        if name in SWITCHES and value.lower() not in WORDS:
            raise InputError(f"--optim_args {text}: {name} is {value}: expected true or false")
        found[name] = value
    return found


def try_optimizer(args: Any, weight: torch.nn.Parameter) -> torch.optim.Optimizer | None:
    """The optimizer of one weight; None of one that needs a whole model."""
    optim, given = str(getattr(args.optim, "value", args.optim)), _Read(parse_optim_args(args.optim_args))
    if "weight_decay" in given.data:
        raise InputError(f"--optim_args {args.optim_args}: weight_decay is not read there: use --weight_decay")
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    try:
        context = OptimizerContext(args, None, {"lr": args.learning_rate}, adam, given)  # type: ignore[arg-type]
        made, settings = _OPTIMIZER_HANDLERS[args.optim](context)
        group: Any = {"params": [weight], "weight_decay": args.weight_decay}
        optimizer = None if is_optimizer_factory(made) else made([group], **settings)
    except FAULTS as error:
        if optim.startswith(OF_A_MODEL) and isinstance(error, ValueError) and "pass a" in str(error):
            return None
        flags = f"--optim {optim}" + (f", --optim_args {args.optim_args}" if args.optim_args else "")
        raise InputError(f"{flags}: {_line(error)}") from None
    if unread := [name for name in given.data if name not in given.read]:
        raise InputError(f"--optim_args {args.optim_args}: --optim {optim} does not read {unread[0]}")
    return optimizer


# ---- the learning rate ----------------------------------------------------------------------------------------------


def _check_warm_up(args: Any) -> None:
    own = args.warmup_steps != type(args).__dataclass_fields__["warmup_steps"].default
    if own and args.warmup_steps and _kind(args) == "constant":
        raise InputError(
            f"--warmup_steps {args.warmup_steps:g}: --lr_scheduler_type constant has no warm-up; constant_with_warmup has"
        )


def refuse_schedules_of_evaluation(kind: Any) -> None:
    """InputError for a schedule that would never change the rate, since training evaluates nothing."""
    kind = str(getattr(kind, "value", kind))
    if kind in OF_EVALUATION:
        raise InputError(f"--lr_scheduler_type {kind} is not supported: it follows an evaluation, and training evaluates nothing")


def with_rates(args: Any, steps: int, make: Callable[[], Any]) -> Any:
    """The schedule that `make` gives, for a run of so many steps; InputError where it cannot be made, or where a rate is none: not
    a number, below 0 or above --learning_rate, or 0 at every step."""
    flags = _flags(args)
    try:
        schedule = make()
        if not isinstance(schedule, LambdaLR):  # one of many schedules, or DeepSpeed's
            return schedule
        shown = sorted({round(step) for step in _spread(steps)})
        factors = {step: factor(step) for step in shown for factor in schedule.lr_lambdas[:1]}
    except FAULTS as error:
        raise InputError(f"{flags}: no learning rate can be made of it ({_line(error)})") from None
    peak = args.learning_rate
    for step, factor in factors.items():
        if not isinstance(factor, int | float) or not -ROUNDING <= factor <= 1 + ROUNDING:
            rate = f"{factor * peak:g}" if isinstance(factor, int | float) else "no number"
            raise InputError(f"{flags}: the rate of step {step + 1} would be {rate}: expected 0 to --learning_rate, {peak:g}")
    if not any(factors[step] for step in shown if step < steps):
        raise InputError(f"{flags}: the learning rate would be 0 at each of {steps} steps")
    return schedule


def _spread(steps: int) -> list[float]:
    """Steps to look at, counted from 0; with the one after the last, whose rate is computed too."""
    apart = max(1.0, steps / MOST_RATES)
    return [*(apart * i for i in range(min(steps, MOST_RATES))), steps - 1, steps]


def _flags(args: Any) -> str:
    parts = [f"--lr_scheduler_type {_kind(args)}"]
    if args.lr_scheduler_kwargs:
        parts.append(f"--lr_scheduler_kwargs {str(args.lr_scheduler_kwargs)[:200]}")
    if args.warmup_steps and _kind(args) != "constant":
        parts.append(f"--warmup_steps {args.warmup_steps:g}")
    return ", ".join(parts)


def _kind(args: Any) -> str:
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def _line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
