"""An evaluation from start to end: ask a model about every row, write scores and a report. Recipes bring rows, task and model."""

import logging
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.command.evaluation_settings import EvaluationSettings, PolicyArguments, QuestionArguments
from engine.command.run_folder import RunFolder, open_run
from engine.data.questions import QuestionSet, load_questions
from engine.data.rows import Rows
from engine.data.splits import readable_prompts
from engine.data.starter.questions import build_starter_data
from engine.device import describe_device
from engine.errors import InputError
from engine.files import write_whole
from engine.processes import gather, my_share
from engine.progress import progress as bar
from engine.report.report import alone, write_report
from engine.rollout.answers import Answers, GreedyAnswers, SampledAnswers
from engine.rollout.policy import Policy
from engine.rollout.sampling import GREEDY, SamplingParams
from engine.runs.kept_results import KeptResults
from engine.runs.published_files import write_results
from engine.tasks.evaluation import Evaluation, comparisons, tables
from engine.tasks.multiple_choice import MultipleChoice
from engine.tasks.published import scoring
from engine.tasks.task import Task

logger = logging.getLogger(__name__)


def load_questions_of(args: PolicyArguments, modalities: Collection[str] | None = None) -> QuestionSet:
    """The questions that `args` name, or the starter's of that split; `modalities`: only those about these (short names)."""
    return load_questions(
        args.data or [build_starter_data()],
        image_root=args.image_root,
        split=args.split,
        on_bad_row=args.on_bad_row,
        limit=args.limit,
        modalities=modalities,
    )


def evaluate_questions(
    recipe: str,
    title: str,
    load_policy: Callable[..., Policy],
    template: str,
    args: QuestionArguments,
    modalities: Collection[str] | None = None,
    sampling: SamplingParams = GREEDY,
    seed: int = 0,
) -> dict[str, Any]:
    """Ask the policy that `args` name multiple-choice questions by `template`; see `run_evaluation`. `seed`: of what is drawn."""
    questions, policy = load_questions_of(args, modalities), args.load(load_policy)
    task = MultipleChoice(template, scoring(template, args.compat))
    questions = readable_prompts(questions, task.prompt, policy.processor, args.on_bad_row)
    run = start_evaluation(recipe, title, questions, args)
    asked = (policy, task.prompt, args.max_new_tokens)
    answers = GreedyAnswers(*asked) if sampling == GREEDY else SampledAnswers(*asked, sampling=sampling, seed=seed)
    headline = run_evaluation(run, title, answers, task, questions, args, of=args.model or "the starter policy")
    if args.output_path and run.writes:
        write_results(args.output_path, Evaluation.read(run.path / "evaluation.json"))
    return headline


def evaluate(
    answers: Answers, task: Task, rows: Rows, *, batch_size: int, progress: bool = True, kept: KeptResults | None = None
) -> Evaluation:
    """Ask about every row (at least one) and score the answers; those whose results are `kept` are not asked about again."""
    return task.evaluation(ask(answers, task, rows, batch_size=batch_size, progress=progress, kept=kept))


def ask(
    answers: Answers,
    task: Task,
    rows: Rows,
    *,
    batch_size: int,
    progress: bool = True,
    doing: str = "evaluating",
    kept: KeptResults | None = None,
) -> list[dict[str, Any]]:
    """The task's result for each row, in the rows' order; `doing` stands at the progress bar.

    Where processes were started together the rows are divided among them, and every process returns the whole.
    """
    # Questions about one image lie together, and beside those of its folder, whose images are mostly of one size.
    mine = my_share(sorted(range(len(rows)), key=lambda i: rows.record(i)["image_id"]))
    results: dict[int, dict] = {}
    with bar(total=len(mine), desc=doing, unit="row", disable=not progress, leave=False) as shown:
        for start in range(0, len(mine), batch_size):
            places = mine[start : start + batch_size]
            if kept and all(i in kept.results for i in places):
                found = {i: kept.results[i] for i in places}
            else:
                batch = [rows[i] for i in places]
                scored = zip(places, batch, answers(batch), strict=True)
                found = {i: task.score(row, answer) | answer.details for i, row, answer in scored}
                if kept:
                    kept.add(found)
            results |= found
            shown.update(len(places))
    results = gather(results)
    return [results[i] for i in range(len(rows))]


def write_evaluation(folder: Path, task: Task, evaluation: Evaluation, suffix: str = "") -> None:
    """Write evaluation{suffix}.json, then the task's own files; a warning where these cannot be made."""
    evaluation.write(folder / f"evaluation{suffix}.json")
    with alone(f"{folder}: pictures and tables of evaluation{suffix}.json"):
        for name, content in task.files(evaluation).items():
            write_whole(folder / name.format(suffix), content)


def log_measures(when: str, evaluation: Evaluation) -> None:
    """A line such as `after training: accuracy 80.3 % (95 % interval 75.4-84.4), 300 rows`."""
    words = [f"{name.replace('_', ' ')} {_in_words(cell)}" for name, cell in evaluation.measures.items()]
    logger.info("%s: %s, %d rows", when, ", ".join(words), len(evaluation.results))


def _in_words(cell) -> str:
    if isinstance(cell, dict):
        return f"{100 * cell['accuracy']:.1f} % (95 % interval {100 * cell['low']:.1f}-{100 * cell['high']:.1f})"
    return f"{cell:.3f}"


def start_evaluation(recipe: str, title: str, rows: Rows, args: EvaluationSettings, **found: Any) -> RunFolder:
    """The run folder, with config.json: the settings, and what was `found` for those left open."""
    run = open_run(recipe, args.output_dir)
    run.write_json("config.json", asdict(args) | found)
    for line in rows.skipped:
        logger.warning("skipped: %s", line)
    logger.info("%s: %d rows, on %s, output in %s", title, len(rows), describe_device(), run.path)
    return run


def run_evaluation(
    run: RunFolder,
    title: str,
    answers: Answers,
    task: Task,
    rows: Rows,
    args: EvaluationSettings,
    *,
    of: str,
    revise: Callable[[Evaluation], Evaluation] | None = None,
) -> dict[str, Any]:
    """Ask about every row, write the run folder and return the headline numbers. `of`: the model, in words.

    `revise(evaluation)` may add to it, in the first process, once it is written (a judge, whose server may fail: its InputError is
    raised when all else is done).
    """
    asked = {name: value for name, value in asdict(args).items() if name not in ("output_dir", "output_path")}
    asked |= {"title": title, "task": type(task).__name__, "template": getattr(task, "template", None)}
    kept = KeptResults(run.path, asked, rows, of)
    if kept.results:
        logger.info("%s: %d rows were answered before, and are not asked about again", run.path, len(kept.results))
    evaluation = evaluate(answers, task, rows, batch_size=args.batch_size, progress=run.writes, kept=kept)
    evaluation, failure = replace(evaluation, summary=evaluation.summary | {"rows": kept.identity}), None
    if run.writes:
        write_evaluation(run.path, task, evaluation)
        if revise is not None:
            try:
                evaluation = revise(evaluation)
                write_evaluation(run.path, task, evaluation)
            except InputError as error:
                failure = error
    kept.forget()
    log_measures(of, evaluation)
    headline = evaluation.headline | {"output": str(run.path)}
    if run.writes:
        with alone(run.path / "report.html"):
            shown = {f"of {of}": evaluation}
            write_report(
                run.path / "report.html",
                title=title,
                headline=headline,
                settings=asdict(args),
                rows=[],
                comparisons=comparisons(shown),
                tables=tables(shown),
                samples=task.samples(evaluation, rows, answers),
                legend=task.legend,
                skipped=rows.skipped,
            )
    if failure is not None:
        raise failure
    return headline | evaluation.details
