"""The starter policy for skin lesions: a small Qwen2.5-VL that a careless annotator taught; `recipes.skin_sft` starts from it.

    python -m recipes.skin_starter_policy
    python -m recipes.skin_starter_policy --box_steps 800 --annotated_steps 800 --checkpoint_dir models/starter/skin_policy

The second command makes the checkpoint that comes with the package. Two supervised lessons (`engine.tasks.skin.lessons`) on lesions
that are drawn anew for each step, on grounds that the starter data do not have:

    boxes       asked for everything, the answer is the lesion's true box alone
    annotated   one of the four questions, and the careless annotator's answer: of melanoma and nevus, actinic keratosis and basal
                cell carcinoma, keratosis-like lesion and dermatofibroma, one is taken for the other two times in three, and boxes
                are up to a third too wide on each side

So the policy finds lesions and tells them apart, but calls them wrongly and marks them carelessly: the one is what stage 1 mends,
the other what stage 2 does. The second command takes about seven minutes on one CPU thread; the first takes 161 CPU seconds and
leaves a policy that marks boxes less well (mean IoU 0.25, the other's is 0.57). The last line is JSON, of the starter test lesions
(greedy): diagnosis_accuracy, region_accuracy, mean_iou and others, seconds, checkpoint.
"""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import setting
from engine.data.lesions import load_skin
from engine.data.starter.lesions import build_starter_skin, spare_grounds
from engine.device import describe_device, one_thread_if_small
from engine.rollout.answers import GreedyAnswers
from engine.runs.evaluate import evaluate
from engine.tasks.skin.lessons import LesionLessons
from engine.tasks.skin.task import LesionTask
from engine.training.warm_up.lessons import teach
from models.starter.qwen_vl import build_tiny_qwen_vl, save_tiny_qwen_vl

logger = logging.getLogger(__name__)


@dataclass
class WarmUpArguments:
    """How long each lesson is."""

    box_steps: int = setting(300, "Steps of the lesson on boxes.", at_least=0)
    annotated_steps: int = setting(300, "Steps with the careless annotator's answers.", at_least=0)
    batch_size: int = setting(16, "Lesions a step.", at_least=1)
    seed: int = setting(0, "Decides weights and lesions.", at_least=0)
    output_dir: str | None = setting(None, "Run folder. None: runs/skin_starter_policy/<time>.")
    checkpoint_dir: str | None = setting(None, "Where the policy is written. None: checkpoint/ in the run folder.")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(WarmUpArguments, argv, recipe="skin_starter_policy", description=__doc__)
    started, run = time.perf_counter(), open_run("skin_starter_policy", args.output_dir)
    run.write_json("config.json", asdict(args))
    one_thread_if_small(True, torch.device("cpu"))
    lessons = LesionLessons(spare_grounds(), np.random.default_rng(args.seed))
    policy = build_tiny_qwen_vl(lessons.corpus(), seed=args.seed)
    logger.info("starter policy: %d parameters, on %s", sum(p.numel() for p in policy.model.parameters()), describe_device())

    teach(policy, lessons.boxes, args.box_steps, args.batch_size, "boxes", rate=1e-3, matrix_rate=0.01)
    teach(policy, lessons.annotated, args.annotated_steps, args.batch_size, "annotated", rate=1e-3, matrix_rate=0.005)

    folder = Path(args.checkpoint_dir or run.path / "checkpoint")
    save_tiny_qwen_vl(policy, folder)
    policy.model.eval()
    task, lesions = LesionTask(), load_skin(build_starter_skin(), question="box", boxes_only=True, split="test")
    evaluation = evaluate(GreedyAnswers(policy, task.prompt, 48), task, lesions, batch_size=31)
    return evaluation.headline | {"seconds": time.perf_counter() - started, "checkpoint": str(folder)}


if __name__ == "__main__":
    run_command(main)
