"""MedVLM-R1, demonstration: a model reasons about one image and answers; how likely it holds each option (arXiv:2502.19634).

    python -m recipes.medvlm_r1_demo
    python -m recipes.medvlm_r1_demo --model JZPeterPan/MedVLM-R1 --image brain.png \\
        --question "What is visible? A) haemorrhage, B) infarct, C) abscess, D) none of these"

The options stand in the question, or are given by `--options haemorrhage infarct ...`. With no flags: the starter policy and one of
its held-out questions (`--row 3` takes another); `--model runs/medvlm_r1_grpo/<time>/checkpoint-120` shows what it has learnt.

The run folder gets report.html: the image, the question, the reasoning, and the probability of each option: that of the answer with
its letter behind this reasoning, of all options together 1. The last line is JSON: reasoning, answer (a letter, null where none can
be read), text (the option's), probabilities (by letter), seconds, output.

Differences from the published notebook: it prints the answer as it comes, and knows eight images; probabilities are ours. Answers
are greedy in both.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import ALLOW_BURNED_IN, refuse, setting
from engine.data.formats.text import is_unicode
from engine.data.images import open_image
from engine.data.options.answers import read_tagged
from engine.data.options.shown import list_options, parse_options
from engine.data.questions import load_questions
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError, input_errors

TEMPLATES = {"complex": "medvlm_eval_complex", "train_complex": "medvlm_train_complex"}


@dataclass
class DemoArguments:
    """A model, an image and a question."""

    model: str | None = setting(None, "Folder or hub name of a checkpoint or an adapter. None: the starter policy.")
    image: str | None = setting(None, "Image or scan.nii.gz#slice=9. None: a held-out image of the starter data.", metavar="FILE")
    question: str | None = setting(None, "What is asked of the image, with its options unless --options has them.")
    options: list[str] | None = setting(None, "The options' texts, without letters.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)
    row: int = setting(0, "Of the starter data this held-out question.", at_least=0)
    prompt_type: str | None = setting(
        None,
        "Ask as the published evaluation does, or as training does. None: complex, for starter questions train_complex.",
        choices=list(TEMPLATES),
    )
    max_new_tokens: int = setting(512, "Longest answer in tokens.", at_least=1, at_most=2**17)
    output_dir: str | None = setting(None, "Run folder. None: runs/medvlm_r1_demo/<time>.")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(DemoArguments, argv, recipe="medvlm_r1_demo", description=__doc__)
    refuse([(not (args.image and args.row), f"--row {args.row}: of the starter data, not of --image (expected one of the two)")])
    row = read_input(args)
    policy = load(args.model)
    start = time.perf_counter()
    template = args.prompt_type or ("complex" if args.image else "train_complex")
    result = answer(policy, row, template, args.max_new_tokens) | {"seconds": time.perf_counter() - start}
    run = open_run("medvlm_r1_demo", args.output_dir)
    run.write_json("config.json", asdict(args))
    write_page(run, row, result, asdict(args))
    return {name: value for name, value in result.items() if name != "said"} | {"output": str(run.path)}


def load(model: str | None = None) -> Any:
    """The policy of a checkpoint, or the starter policy, on this machine's device."""
    from engine.device import inference_dtype, local_device, one_thread_if_small  # torch: seconds, which wrong flags do not need
    from models.loading import load_policy

    device = local_device()
    one_thread_if_small(model is None, device)
    with input_errors("--model"):
        policy = load_policy(model, dtype=inference_dtype(device))
    policy.model.to(device).eval()
    return policy


def read_input(args: DemoArguments) -> dict:
    """A row as `engine.data.questions` has them: images, problem, options."""
    if args.image is None:
        if args.question or args.options:
            raise InputError("--image is missing: the file that the question is about")
        questions = load_questions(build_starter_data(), split="test")
        if args.row >= len(questions):
            raise InputError(f"--row {args.row}: expected at most {len(questions) - 1}")
        return questions[args.row]
    if not all(map(is_unicode, [args.question or "", *(args.options or [])])):
        raise InputError("--question, --options: expected UTF-8 text")
    if not args.question or not args.question.strip():
        raise InputError('--question is missing, e.g. "Which modality is this? A) CT, B) MRI"')
    listed = list_options(args.options or [])
    problem = "\n".join([args.question, *(f"{letter}) {text}" for letter, text in listed.items())])
    options = parse_options(problem)
    if len(options) < 2 or not all(options.values()) or args.options and len(options) != len(args.options):
        raise InputError("--question: no options can be read in it (expected such as `... A) CT, B) MRI`, or --options CT MRI)")
    return {"images": [open_image(args.image)], "problem": problem, "options": options}


def answer(policy: Any, row: dict, template: str = "complex", max_new_tokens: int = 512) -> dict[str, Any]:
    """{said: the whole answer, reasoning, answer: a letter or None, text: that option's, probabilities: {letter: probability}}."""
    from engine.evaluation.option_probabilities import option_probabilities
    from engine.rollout.answers import GreedyAnswers
    from engine.tasks.templates import build_prompt

    def prompt_of(asked: dict) -> list[dict]:
        return build_prompt(TEMPLATES[template], asked)

    (said,) = (found.text for found in GreedyAnswers(policy, prompt_of, max_new_tokens)([row]))
    letter = read_tagged(said, row["options"])
    probabilities = option_probabilities(policy, prompt_of(row), row["images"], said, list(row["options"]))
    reasoning = said.partition("<answer>")[0].replace("<think>", "").replace("</think>", "").strip()
    return {
        "said": said,
        "reasoning": reasoning,
        "answer": letter,
        "text": row["options"].get(letter),
        "probabilities": probabilities,
    }


def write_page(run: Any, row: dict, result: dict[str, Any], settings: dict[str, Any]) -> None:
    from engine.report.content import Sample, ShownAnswer, Table
    from engine.report.report import write_report

    options = {f"{x}) {text}": [f"{100 * result['probabilities'][x]:.1f} %"] for x, text in row["options"].items()}
    right = result["answer"] == row["answer"] if "answer" in row else None
    truth = f"{row['answer']}) {row['options'][row['answer']]}" if "answer" in row else "not told"
    sample = Sample(row["images"][0], row["problem"], truth, [ShownAnswer(result["said"], {}, right=right)])
    tables = [Table("options", ["probability"], options)]
    headline = {"answer": f"{result['answer']}) {result['text']}" if result["answer"] else "none that can be read"}
    title, page = "MedVLM-R1 demonstration", run.path / "report.html"
    write_report(page, title=title, headline=headline, settings=settings, rows=[], tables=tables, samples=[sample])


if __name__ == "__main__":
    run_command(main)
