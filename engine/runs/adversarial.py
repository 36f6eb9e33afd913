"""Accuracy under attack: the same questions, asked again about images changed so as to mislead the model.

An attack (`engine.evaluation.attacks`) on a question that was answered rightly raises the loss -log p(that answer, reasoning
included | image, question). One that was answered wrongly stays so: an attacker may leave an image alone. `--compat reference`
attacks as AdvMed-R1's code does: every question, -log p(first token of the own answer), in units of a channel's standard deviation,
keeping PGD's last step.

A run writes evaluation_<attack>.json and accuracy_<attack>.png for the clean images and each attack, summary.json (accuracy overall
and per modality, an entry an attack), report.html, and images/<attack>/ where attacked images are to be kept.
"""

from dataclasses import asdict
from typing import Any

from PIL import Image

from engine.command.evaluation_settings import AttackArguments
from engine.command.run_folder import RunFolder
from engine.data.rows import Rows
from engine.evaluation.attacks import Attack
from engine.report.content import Sample, ShownAnswer, value_of
from engine.report.overlay import write_png
from engine.report.report import write_report
from engine.rollout.answers import GreedyAnswers
from engine.rollout.policy import Policy
from engine.runs.attacked_answers import AttackedAnswers, Pixels, place_of
from engine.runs.evaluate import ask, evaluate, log_measures, write_evaluation
from engine.tasks.evaluation import Evaluation, comparisons, tables
from engine.tasks.task import Task

LEGEND = "Images are some whose answer the last attack changed, as it left them; answers to the clean image come first."


def run_adversarial_evaluation(
    run: RunFolder, title: str, policy: Policy, pixels: Pixels, task: Task, questions: Rows, args: AttackArguments
) -> dict[str, Any]:
    """Ask about clean and attacked images, write the run folder and return the headline numbers."""
    evaluations = evaluate_under_attacks(run, title, policy, pixels, task, questions, args)
    accuracies = {f"accuracy_{name}": value_of(evaluation.measures["accuracy"]) for name, evaluation in evaluations.items()}
    by_modality = {
        name: {line: value_of(cell) for line, cell in evaluation.details["by_modality"].items()}
        for name, evaluation in evaluations.items()
    }
    return accuracies | {"num_samples": len(questions), "output": str(run.path), "by_modality": by_modality}


def evaluate_under_attacks(
    run: RunFolder, title: str, policy: Policy, pixels: Pixels, task: Task, questions: Rows, args: AttackArguments
) -> dict[str, Evaluation]:
    """{"clean": evaluation, an attack: evaluation, ...}, when the run folder is written."""
    published = args.compat == "reference"
    answers = GreedyAnswers(policy, task.prompt, args.max_new_tokens)
    clean = evaluate(answers, task, questions, batch_size=args.batch_size, progress=run.writes)
    evaluations, changed = {"clean": _written(run, task, "clean", clean)}, {}
    attackable = [i for i, result in enumerate(clean.results) if result["correct"] or published]
    for name in args.attacks or ():
        published_attack = {"scale": pixels.std, "best": False} if published else {}
        attack = Attack.named(name, args.epsilon, args.pgd_alpha, args.pgd_iters, **published_attack)
        attacked = AttackedAnswers(policy, pixels, attack, task, clean, args)
        asked = questions.select(attackable)
        found = ask(attacked, task, asked, batch_size=args.batch_size, progress=run.writes, doing=f"attacking ({name})")
        results = dict(enumerate(clean.results)) | dict(zip(attackable, found, strict=True))
        evaluations[name] = _written(run, task, name, task.evaluation(list(results.values())))
        changed = attacked.changed
        for index, picture in enumerate(attacked.first if run.writes else []):
            write_png(run.path / "images" / name / f"{index:04d}.png", picture)
    if run.writes:
        run.write_json("summary.json", {name: shares_of(evaluation) for name, evaluation in evaluations.items()})
        write_report(
            run.path / "report.html",
            title=title,
            headline={"num_samples": len(questions), "output": str(run.path)},
            settings=asdict(args),
            rows=[],
            comparisons=comparisons(evaluations),
            tables=tables(evaluations),
            samples=_samples(task, evaluations, changed),
            legend=LEGEND,
            skipped=questions.skipped,
        )
    return evaluations


def _written(run: RunFolder, task: Task, name: str, evaluation: Evaluation) -> Evaluation:
    """The evaluation, kept before the next one begins."""
    log_measures(name, evaluation)
    if run.writes:
        write_evaluation(run.path, task, evaluation, suffix=f"_{name}")
    return evaluation


def shares_of(evaluation: Evaluation) -> dict[str, Any]:
    """The accuracy overall and of each modality, as shares."""
    return {"overall": evaluation.measures["accuracy"], **evaluation.details["by_modality"]}


def _samples(task: Task, evaluations: dict[str, Evaluation], changed: dict[tuple[str, int], Image.Image]) -> list[Sample]:
    """The answers to an image, clean and attacked, each under its attack's name."""
    by_place = {name: {place_of(result): result for result in e.results} for name, e in evaluations.items()}
    samples = []
    for place, picture in changed.items():
        results = {name: of_place[place] for name, of_place in by_place.items()}
        answers = [ShownAnswer(result["model_output"], {}, right=result["correct"], name=name) for name, result in results.items()]
        asked = results["clean"]["question"]
        samples.append(Sample(picture, asked["problem"], asked["solution"], answers))
    return samples
