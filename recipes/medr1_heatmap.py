"""Med-R1, transfer: trained on one, tested on all, as matrices of modalities and of tasks, and thought minus none (its figures).

    python -m recipes.medr1_heatmap
    python -m recipes.medr1_heatmap --runs results --output_dir figures

`results` holds evaluations, each in a folder named by what its model was trained on, in any case and as Med-R1's checkpoints are
called (CT, VQA_X-Ray, US, Micro, Lesion Grading ...), below a folder that says whether it reasons (nothink; all others do):

    for part in CT MRI X-Ray; do
        python -m recipes.medr1_batch_eval --model runs/$part/checkpoint-600 --splits_dir Splits --dataset_root OmniMedVQA \\
            --attacks clean --evaluation_type both --output_dir results/think/$part
    done

Evaluations by `recipes.medr1_eval` are read too, as are the files of Med-R1's and AdvMed-R1's scripts: see `engine.runs.transfer`.
A matrix may have gaps. Written are modality_think, modality_nothink, question_type_think and question_type_nothink, as .csv
(fractions) and .png (percent), and the differences: <kind>_think_minus_nothink.csv and think_minus_nothink.png.

With no flags the results are made first: the starter policy is taught each of its six modalities for 20 steps of 16 questions, with
a thought and without, and each model is asked 60 held-out questions. About two minutes on one CPU thread. All these questions ask
for the modality, so a model that was shown CT alone says CT of everything: the diagonal is bright and the rest dark.

The last line is JSON: own and other (mean accuracy on the part trained on, and on those not) of each matrix, cells, output.
"""

import csv
import io
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import ModelArguments, setting
from engine.files import write_whole

STEPS, QUESTIONS, STYLES = 20, 60, ("think", "nothink")  # of the starter models


@dataclass
class HeatmapArguments:
    """Which evaluations, and where the figures go."""

    runs: str | None = setting(None, "Folder of evaluations, by what models were trained on. None: starter models are trained.")
    output_dir: str | None = setting(None, "Folder of the figures. None: runs/medr1_heatmap/<time>.")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(HeatmapArguments, argv, recipe="medr1_heatmap", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.report.charts import as_png
    from engine.report.heatmap import heat_figure
    from engine.runs.transfer import read_matrices

    matrices = read_matrices(Path(args.runs)) if args.runs else None
    run = open_run("medr1_heatmap", args.output_dir)
    run.write_json("config.json", asdict(args))
    if matrices is None:
        teach_starters(run)
        matrices = read_matrices(run.path / "results")
    headline: dict = {}
    for matrix in matrices:
        name = f"{matrix.kind}_{matrix.style}"
        write_whole(run.path / f"{name}.csv", table(matrix))
        write_whole(run.path / f"{name}.png", as_png(heat_figure([heat_map(matrix)])))
        headline[name] = {"own": matrix.mean(own=True), "other": matrix.mean(own=False), "cells": len(matrix.cells)}
    by_name = {(matrix.kind, matrix.style): matrix for matrix in matrices}
    differences = [m.minus(by_name[m.kind, "nothink"]) for m in matrices if m.style == "think" and (m.kind, "nothink") in by_name]
    differences = [difference for difference in differences if difference.cells]
    for difference in differences:
        write_whole(run.path / f"{difference.kind}_think_minus_nothink.csv", table(difference))
    if differences:
        figure = heat_figure([heat_map(each, signed=True) for each in differences])
        write_whole(run.path / "think_minus_nothink.png", as_png(figure))
    return headline | {"output": str(run.path)}


def heat_map(matrix, signed: bool = False):
    from engine.report.heatmap import HeatMap

    what = {"modality": "modalities", "question_type": "tasks"}[matrix.kind]
    unit = "points" if signed else "accuracy in %"
    cells = {place: 100 * value for place, value in matrix.cells.items()}
    return HeatMap(f"{what}, {matrix.style}: {unit}", matrix.trained, matrix.tested, cells, signed=signed)


def table(matrix) -> str:
    """A line for each part that was trained on, a column for each that was tested; fractions, empty where there is no cell."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trained_on", *matrix.tested])
    for trained in matrix.trained:
        cells = [matrix.cells.get((trained, tested)) for tested in matrix.tested]
        rows.writerow([trained, *("" if cell is None else f"{cell:.6g}" for cell in cells)])
    return text.getvalue()


def teach_starters(run) -> None:
    """results/<style>/<modality>/evaluation.json of the starter policy, taught a modality at a time."""
    from transformers.trainer_callback import PrinterCallback

    from engine.data.questions import load_questions
    from engine.data.rows import evenly_spread
    from engine.data.starter.questions import build_starter_data
    from engine.runs.evaluate import evaluate, log_measures, write_evaluation
    from engine.tasks.lessons import TEMPLATE, right_response
    from engine.tasks.multiple_choice import MultipleChoice
    from engine.training.config.sft import SFTConfig
    from engine.training.sft import SFTTrainer
    from models.loading import load_policy

    data = build_starter_data()
    train, test = load_questions(data, split="train"), load_questions(data, split="test")
    test = test.select(evenly_spread(len(test), QUESTIONS))
    tasks = {
        "think": MultipleChoice(TEMPLATE, target_of=right_response),
        "nothink": MultipleChoice("medr1_train_nothink"),
    }
    for style in STYLES:
        for modality in sorted({record["modality"] for record in train.records}):
            policy = ModelArguments().load(load_policy, bf16=False)
            settings = SFTConfig(
                **{"output_dir": str(run.path), "max_steps": STEPS, "save_strategy": "no", "report_to": "none"},
                **{"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "gradient_checkpointing": False},
                **{"learning_rate": 5e-4, "max_completion_length": 32, "logging_strategy": "no", "disable_tqdm": True},
            )
            own = train.select([i for i, record in enumerate(train.records) if record["modality"] == modality])
            trainer = SFTTrainer(policy, tasks[style], settings, own)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            evaluation = evaluate(trainer.answer, tasks[style], test, batch_size=QUESTIONS, progress=False)
            write_evaluation(run.path / "results" / style / modality, tasks[style], evaluation)
            log_measures(f"taught {modality}, {style}", evaluation)


if __name__ == "__main__":
    run_command(main)
