"""Uni-MedVLM, all five stages in order, each in a process of its own: on the starter data, or with settings of your own for each.

    python -m recipes.unimed_run_all
    python -m recipes.unimed_run_all --output_dir OUT --seed 1
    python -m recipes.unimed_run_all --output_dir OUT --settings settings/

`--settings DIR` has stage1.yaml to stage5.yaml, each the settings of that stage's recipe (`--config`); what the stages hand on to
one another is set here. Stage 3 starts from stage 2, as MedPLIB's does. Run again with the same `--output_dir`, stages that are
done are not run again, and one that was interrupted goes on from its last checkpoint.

The last line is JSON: stage1_loss_before and _after (nats a token of held-out captions), stage2_accuracy_before and _after,
stage3_dice_before and _after, stage4_accuracy and stage4_dice (and _before: the experts with a router that has learnt nothing),
stage5_reward_before and _after, seconds, output.
"""

import json
import logging
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import setting
from engine.command.unimed_settings import STAGES
from engine.errors import InputError
from engine.files import write_json

logger = logging.getLogger(__name__)
# Of each stage the measures that the last line has, and their names there.
MEASURES = {
    1: {"loss": "loss"},
    2: {"accuracy": "accuracy"},
    3: {"mDice": "dice"},
    4: {"answer_accuracy": "accuracy", "mDice": "dice"},
    5: {"reward": "reward"},
}
SOURCES = {1: (), 2: (1,), 3: (1, 2), 4: (1, 2, 3), 5: (4,)}  # what a stage is given
RESULT = "result.json"


@dataclass
class RunAllArguments:
    """Where, and with which settings."""

    output_dir: str | None = setting(None, "Run folder. None: runs/unimed_run_all/<time>.")
    settings: str | None = setting(None, "Folder of stage1.yaml to stage5.yaml. None: the starter data.", metavar="DIR")
    seed: int | None = setting(
        None, "Of rows, adapters and samples. None: 42, or what --settings say.", at_least=0, at_most=2**32 - 1
    )


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(RunAllArguments, argv, recipe="unimed_run_all", description=__doc__)
    started = time.perf_counter()
    files = {stage: args.settings and Path(args.settings) / f"stage{stage}.yaml" for stage in STAGES}
    for file in files.values():
        if file and not file.is_file():
            raise InputError(f"{file}: no such file (--settings expects stage1.yaml to stage5.yaml)")
    run = open_run("unimed_run_all", args.output_dir)
    headline: dict = {}
    for stage, file in files.items():
        result = run_stage(stage, run.path, args.seed, file)
        for measure, name in MEASURES[stage].items():
            for when in ("before", "after"):
                key = f"stage{stage}_{name}_{when}"
                headline[key.removesuffix("_after") if stage == 4 else key] = result.get(f"{measure}_{when}")
    return headline | {"seconds": time.perf_counter() - started, "output": str(run.path)}


def run_stage(stage: int, folder: Path, seed: int | None, settings: Path | None) -> dict:
    """The last line of a stage's recipe, run in `folder`/stageN; what it was, where that is done. InputError where it fails, and
    where it was done with another seed or other settings."""
    recipe, left = STAGES[stage]
    own = folder / f"{stage}_{recipe.removeprefix('unimed_')}"
    asked = {"--seed": seed, "--settings": settings and settings.read_text(encoding="utf-8", errors="replace")}
    with suppress(OSError, ValueError):  # not done, or damaged since
        done = json.loads((own / RESULT).read_text(encoding="utf-8"))
        if isinstance(done, dict) and (own / left).is_file():
            if changed := [flag for flag, value in done.pop("asked", asked).items() if asked[flag] != value]:
                raise InputError(f"{own}: was done with another {changed[0]}: expected the same, or another --output_dir")
            logger.info("stage %d is done: %s", stage, own)
            return done
    flags = ["--output_dir", str(own), *([] if seed is None else ["--seed", str(seed)])]
    for source in SOURCES[stage]:
        of = folder / f"{source}_{STAGES[source][0].removeprefix('unimed_')}"
        flags += [f"--stage{source}", str(of / STAGES[source][1]) if source == 1 else str((of / STAGES[source][1]).parent)]
    if settings:
        flags += ["--config", str(settings)]
    if any(own.glob("checkpoint-*")):
        flags += ["--resume_from_checkpoint", "true"]
    logger.info("stage %d: python -m recipes.%s %s", stage, recipe, " ".join(flags))
    command = [sys.executable, "-m", f"recipes.{recipe}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            said, _ = process.communicate()
        except KeyboardInterrupt:  # not the stage's, which is in a session of its own: told to stop, it saves first
            process.terminate()
            process.communicate()
            raise
    if process.returncode:
        raise InputError(f"stage {stage} ended with {process.returncode}; run this command again to go on: --output_dir {folder}")
    result = json.loads(said.strip().splitlines()[-1])
    write_json(own / RESULT, result | {"asked": asked})
    return result


if __name__ == "__main__":
    run_command(main)
