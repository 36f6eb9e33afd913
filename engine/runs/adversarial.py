"""Accuracy under attack: the same questions, asked again about images changed so as to mislead the model.

An attack (`engine.evaluation.attacks`) on a question that was answered rightly raises the loss -log p(that answer, reasoning
included | image, question). One that was answered wrongly stays so: an attacker may leave an image alone. `--compat reference`
attacks as AdvMed-R1's code does: every question, -log p(first token of the own answer), in units of a channel's standard deviation,
keeping PGD's last step.

A run writes evaluation_<attack>.json and accuracy_<attack>.png for the clean images and each attack, summary.json (an entry an
attack: accuracy overall and per modality, and what `effect` says), report.html, and images/<attack>/ where images are to be kept.
"""

from dataclasses import asdict
from typing import Any

from PIL import Image

from engine.command.evaluation_settings import AttackArguments
from engine.command.run_folder import RunFolder
from engine.data.rows import Rows
from engine.evaluation.attacks import Attack
from engine.evaluation.score import Score
from engine.report.content import Sample, ShownAnswer, Table, value_of
from engine.report.overlay import write_png
from engine.report.report import write_report
from engine.rollout.answers import GreedyAnswers
from engine.rollout.policy import Policy
from engine.runs.attacked_answers import AttackedAnswers, Pixels, place_of
from engine.runs.evaluate import ask, evaluate, log_measures, write_evaluation
from engine.runs.published_files import write_published
from engine.tasks.evaluation import Evaluation, comparisons, tables
from engine.tasks.task import Task

LEGEND = (
    "Some images whose answer the last attack changed: clean, as the attack left them, and their difference times 10 around grey. "
    "Answers to the clean image come first."
)


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
    clean, *attacked = evaluations.items()
    success = {f"success_rate_{name}": value_of(effect(clean[1], evaluation)["success_rate"]) for name, evaluation in attacked}
    return accuracies | success | {"num_samples": len(questions), "output": str(run.path), "by_modality": by_modality}


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
        effects = {name: effect(clean, evaluation) for name, evaluation in evaluations.items() if name != "clean"}
        shares = {name: shares_of(evaluation) for name, evaluation in evaluations.items()}
        run.write_json("summary.json", {name: share | effects.get(name, {}) for name, share in shares.items()})
        if args.output_path:
            write_published(args.output_path, evaluations, args)
        write_report(
            run.path / "report.html",
            title=title,
            headline={"num_samples": len(questions), "output": str(run.path)},
            settings=asdict(args),
            rows=[],
            comparisons=comparisons(evaluations),
            tables=[*effect_tables(effects), *tables(evaluations)],
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


def effect(clean: Evaluation, attacked: Evaluation) -> dict[str, Any]:
    """What an attack did.

    success_rate          of the questions that were right about the clean image, those that it made wrong: a share, None of none
    accuracy_drop         by how much the accuracy fell, a fraction
    logprob_drop          by how much the log-probability of the attacked answer fell, in nats
    linf, l2              the change of an image, of values in 0-1

    The last three are means over the questions that were attacked, None of none.
    """
    pairs = zip(clean.results, attacked.results, strict=True)
    made_wrong = [not after["correct"] for before, after in pairs if before["correct"]]
    fewer = sum(result["correct"] for result in clean.results) - sum(result["correct"] for result in attacked.results)
    measured = [result for result in attacked.results if "linf" in result]
    means = {name: sum(r[name] for r in measured) / len(measured) if measured else None for name in ("logprob_drop", "linf", "l2")}
    return {
        "success_rate": Score.of(made_wrong).as_dict() if made_wrong else None,
        "accuracy_drop": fewer / len(clean.results),
        **means,
    }


def effect_tables(effects: dict[str, dict[str, Any]]) -> list[Table]:
    """Two tables, a line an attack: the share that succeeded, and the rest."""
    rest = ["accuracy_drop", "logprob_drop", "linf", "l2"]
    titles = ["accuracy lost", "log-probability lost (nats)", "largest change (of 1)", "L2 change"]
    return [
        Table("success of attacks", ["success_rate"], {name: [effect["success_rate"]] for name, effect in effects.items()}),
        Table("strength of attacks", titles, {name: [effect[key] for key in rest] for name, effect in effects.items()}),
    ]


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
