"""Accuracy under attack: the same questions, asked again about images changed so as to mislead the model.

An attack (`engine.evaluation.attacks`) on a question that was answered rightly raises the loss -log p(that answer, reasoning
included | image, question). One that was answered wrongly stays so: an attacker may leave an image alone. With `compat="reference"`
the attack is AdvMed-R1's: on every question, -log p(first token of the own answer), changes in units of a channel's standard
deviation, and answers are read as its scripts read them.

An evaluation writes evaluation_<attack>.json and accuracy_<attack>.png for the clean images and each attack, summary.json (accuracy
overall and per modality, an entry an attack), report.html, and images/<attack>/ where attacked images are to be kept.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image

from engine.command.run import RunFolder
from engine.command.settings import setting
from engine.errors import InputError
from engine.evaluation.attacks import Attack, target_loss
from engine.evaluation.questions import Evaluation, ask, evaluate, score_texts, write_evaluation
from engine.report.overlay import write_png
from engine.report.report import write_report
from engine.rollout.policy import Policy
from engine.rollout.rollout import greedy_texts, rollout
from engine.rollout.sampling import SamplingParams
from engine.runs.evaluate import QuestionArguments, open_evaluation
from engine.tasks.templates import build_prompt

ATTACKS = ("fgsm", "pgd")
SHOWN = 12  # attacked images in the report
LEGEND = "Images are some whose answer the last attack changed, as it left them; answers to the clean image come first."
logger = logging.getLogger(__name__)


@dataclass
class AttackArguments(QuestionArguments):
    """Which attacks on which questions."""

    model: str | None = setting(None, "Checkpoint folder or hub name. None: the starter policy.", aliases=["--model_path"])
    data: list[str] | None = setting(
        None, "Files or folders of questions. None: the starter test questions.", aliases=["--test_data"]
    )
    image_root: str | None = setting(
        None, "Folder that relative image paths start from. None: that of the file.", aliases=["--dataset_root"]
    )
    attacks: list[str] | None = setting(
        None, "fgsm, pgd, or both; clean images are always asked about. None: both.", aliases=["--attack_type"]
    )
    epsilon: float = setting(0.03, "Largest change of a pixel, of a range of 0 to 1 (0.03 is 7 levels of 255).")
    pgd_alpha: float = setting(0.01, "Change of a step of PGD.")
    pgd_iters: int = setting(10, "Steps of PGD.")
    save_sample_images: int = setting(0, "Keep so many attacked images of each attack as PNG.")
    batch_size: int = setting(8, "Questions attacked and answered at once.")

    def __post_init__(self):
        super().__post_init__()
        self.attacks = [name for name in self.attacks or ATTACKS if name != "clean"]
        if not set(self.attacks) <= set(ATTACKS):
            raise InputError(f"--attacks {' '.join(self.attacks)}: expected {' or '.join(ATTACKS)}")
        for name in ("epsilon", "pgd_alpha", "pgd_iters"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} must be more than 0")
        if self.epsilon > 1:
            raise InputError("--epsilon is of a range of 0 to 1: 8 levels of 255 are 0.0314")


class AttackedAnswers:
    """Answers to rows about attacked images. `pixels` turns an encoded batch into images and back (see `models.qwen.pixels`),
    `clean` is the evaluation on the unchanged ones. Of the attacked images `first` holds so many as are to be kept, and `changed`
    some that changed the answer, by the row's place in its file."""

    def __init__(self, policy: Policy, pixels: Any, attack: Attack, prompt_of: Callable, clean: Evaluation, args: AttackArguments):
        self.policy, self.pixels, self.attack, self.prompt_of, self.args = policy, pixels, attack, prompt_of, args
        self.clean = {(result["source"], result["row"]): result["model_output"] for result in clean.results}
        self.first: list[Image.Image] = []
        self.changed: dict[tuple[str, int], Image.Image] = {}

    def __call__(self, rows: list[dict]) -> list[str]:
        batch = self.policy.encode([self.prompt_of(row) for row in rows], [row["images"] for row in rows])
        targets = [self._target(row) for row in rows]
        attacked = self.attack(
            self.pixels.of(batch), lambda images: target_loss(self.policy, self.pixels.put(batch, images), targets)
        )
        shown, greedy = self.pixels.put(batch, attacked), SamplingParams(temperature=0)
        answers = rollout(self.policy, shown, greedy, num_generations=1, max_new_tokens=self.args.max_new_tokens)
        texts = answers.texts(self.policy.processor)
        self._keep(rows, texts, attacked, batch)
        return texts

    def _target(self, row: dict) -> list[int]:
        """Token ids that the attack makes unlikely."""
        text = self.clean[row["source"], row["row"]]
        ids = self.policy.processor.tokenizer(text, add_special_tokens=False).input_ids
        return (ids[:1] if self.args.compat == "reference" else ids) or self.policy.eos_token_ids[:1]

    def _keep(self, rows: list[dict], texts: list[str], attacked: list, batch) -> None:
        places = iter(range(len(attacked)))
        for row, text in zip(rows, texts, strict=True):
            first, *_ = [next(places) for _ in row["images"]]
            place = row["source"], row["row"]
            picture = self.pixels.picture(attacked[first], batch.image_grid_thw[first])
            if len(self.first) < self.args.save_sample_images:
                self.first.append(picture)
            if len(self.changed) < SHOWN and text != self.clean[place]:
                self.changed[place] = picture


def run_adversarial_evaluation(
    recipe: str,
    title: str,
    load_policy: Callable[..., Policy],
    pixels_of: Callable[[Policy], Any],
    args: AttackArguments,
    *,
    template: str,
) -> dict:
    """Ask what `load_policy(path or None, **options)` gives about clean and attacked images; returns the headline numbers."""
    questions, policy, run = open_evaluation(recipe, title, load_policy, args)
    pixels, prompt_of = pixels_of(policy), partial(build_prompt, template)
    asking = {"batch_size": args.batch_size, "progress": run.writes}
    reading = "advmed" if args.compat == "reference" else "default"
    answer = partial(greedy_texts, policy, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, progress=False)
    clean = evaluate(answer, questions, template=template, compat=reading, **asking)
    evaluations, changed = {"clean": _written(run, "clean", clean)}, {}
    attackable = [i for i, result in enumerate(clean.results) if result["correct"] or args.compat == "reference"]
    for name in args.attacks:
        scale = pixels.std if args.compat == "reference" else None
        attack = Attack.named(name, args.epsilon, args.pgd_alpha, args.pgd_iters, scale)
        attacked = AttackedAnswers(policy, pixels, attack, prompt_of, clean, args)
        found = ask(attacked, questions.select(attackable), doing=f"attacking ({name})", **asking)
        texts = dict(enumerate(result["model_output"] for result in clean.results)) | dict(zip(attackable, found, strict=True))
        evaluations[name] = _written(run, name, score_texts(questions, list(texts.values()), template, reading))
        changed = attacked.changed
        for number, picture in enumerate(attacked.first if run.writes else []):
            write_png(run.path / "images" / name / f"{number:04d}.png", picture)
    headline = {f"accuracy_{name}": evaluation.overall.accuracy for name, evaluation in evaluations.items()}
    headline |= {"num_samples": len(questions), "output": str(run.path)}
    if run.writes:
        _write_run(run, title, args, questions, evaluations, changed, headline)
    return headline | {"by_modality": {name: evaluation.accuracies("modality") for name, evaluation in evaluations.items()}}


def _written(run: RunFolder, name: str, evaluation: Evaluation) -> Evaluation:
    """The evaluation, kept before the next one begins."""
    low, high = evaluation.overall.interval
    numbers = (100 * x for x in (evaluation.overall.accuracy, low, high))
    logger.info("%s: accuracy %.1f %% (95 %% interval %.1f-%.1f)", name, *numbers)
    if run.writes:
        write_evaluation(run.path, evaluation, suffix=f"_{name}")
    return evaluation


def _write_run(run, title, args, questions, evaluations, changed, headline) -> None:
    run.write_json(
        "summary.json",
        {
            name: {"overall": evaluation.overall.as_dict()}
            | {modality: score.as_dict() for modality, score in evaluation.by("modality").items()}
            for name, evaluation in evaluations.items()
        },
    )
    write_report(
        run.path / "report.html",
        title=title,
        headline={key: value for key, value in headline.items() if not key.startswith("accuracy")},
        settings=asdict(args),
        rows=[],
        samples=_shown(evaluations, changed),
        evaluations=evaluations,
        legend=LEGEND,
        skipped=questions.skipped,
    )


def _shown(evaluations: dict[str, Evaluation], changed: dict[tuple[str, int], Image.Image]) -> list[dict]:
    """Samples for the report: the answers to an image, clean and attacked, each under its attack's name."""
    by_place = {
        name: {(result["source"], result["row"]): result for result in evaluation.results}
        for name, evaluation in evaluations.items()
    }
    samples = []
    for place, picture in changed.items():
        results = {name: of_place[place] for name, of_place in by_place.items()}
        answers = [
            {"text": result["model_output"], "rewards": {name: float(result["correct"])}, "advantage": None}
            for name, result in results.items()
        ]
        asked = {"question": results["clean"]["question"]["problem"], "solution": results["clean"]["question"]["solution"]}
        samples.append({"image": picture, "step": None, **asked, "completions": answers})
    return samples
