"""MedVLM-R1, distillation: a teacher's right answers become a set with reasoning, which `recipes.medr1_sft` trains on.

    python -m recipes.medvlm_r1_distill
    python -m recipes.medvlm_r1_distill --answers teacher.jsonl --image_root data/MR --output_dir runs/taught
    python -m recipes.medvlm_r1_distill --data data/MR --endpoint http://localhost:8000/v1 --teacher_model Qwen2.5-VL-72B-Instruct
    python -m recipes.medr1_sft --dataset_name runs/taught --model_name_or_path Qwen/Qwen2-VL-2B-Instruct

MedVLM-R1 (arXiv:2502.19634) learns to reason from rewards alone; this is what to compare it with, and a start for it. A teacher is

--answers     a file of answers, a JSON array or JSON lines: `image`, `problem`, `solution` as in docs/your_own_data.md, and
              `completion` or `completions`, one text or several (`engine/data/formats/answer_files.py`). Evaluation files of
              medvlm_r1_eval and medr1_eval, and the published scripts' results, are read too: with `--image_root` at the folder of
              their images.
--endpoint    a server that speaks OpenAI's protocol; images are sent as data URLs, names of files are not. Replies are kept as they
              come: the same command with the same --output_dir asks only for what is missing.
--model       a checkpoint here, sampled on this machine.

Kept is an answer that is `<think>...</think><answer>...</answer>` (`--form nothink`: the answer alone) and right by the reader of
answers that evaluates (engine/data/options/answers.py), each once, at most `--per_question` to a question: the first ones.

With no flags the starter policy teaches: 4 answers to each of 240 starter training questions.

The folder gets train.jsonl with images/, rejected.jsonl (a reason for each other answer), report.json and report.html (counts by
reason and by modality). The last line is JSON: questions, answers, kept, questions_kept, rejected (by reason), by_modality (the
same of each), bad_rows, output, seconds.
"""

import time
from dataclasses import asdict

from engine.command.arguments import parse_arguments
from engine.command.distill_settings import AnswerSelection, Distillation, check_teacher
from engine.command.main import run_command
from engine.errors import InputError
from engine.processes import are_several

TEMPLATES = {"think": "medvlm_train_complex", "nothink": "medr1_train_nothink"}
STARTER = {"limit": 240}


def main(argv: list[str]) -> dict:
    started = time.perf_counter()
    kinds = (AnswerSelection, Distillation)
    unless = ("answers", "data", "model", "endpoint")
    chosen, args = parse_arguments(
        kinds, argv, recipe="medvlm_r1_distill", description=__doc__, starter=STARTER, starter_unless=unless
    )
    check_teacher(args, chosen)
    if are_several():
        raise InputError("medvlm_r1_distill runs in one process (several GPUs: serve the teacher, and name it by --endpoint)")

    # Imported once the flags are known to be good, since these take seconds.
    from engine.command.run_folder import open_run
    from engine.data.formats.answer_files import load_answers
    from engine.files import refuse_overwriting
    from engine.runs.distill import SET, ask_teacher, distill, given_answers
    from engine.runs.evaluate import load_questions_of
    from engine.runs.replies import Replies

    for flag, paths in (("--answers", chosen.answers), ("--data", args.data)):
        for path in paths or []:
            refuse_overwriting({"--output_dir": args.output_dir and f"{args.output_dir}/{SET}"}, {flag: path})
    if chosen.answers:
        questions = load_answers(chosen.answers, image_root=args.image_root, on_bad_row=args.on_bad_row, limit=args.limit)
    else:
        questions = load_questions_of(args)
    asked = None if chosen.answers else teacher(args, chosen.form)
    run = open_run("medvlm_r1_distill", args.output_dir)
    run.write_json("config.json", {"answers": asdict(chosen), "teacher": asdict(args)})
    if asked is None:
        answered = given_answers(questions)
    else:
        answered = ask_teacher(asked, questions, args.samples, Replies(run.path, what_decides(args, chosen.form)))
    return distill(run, questions, answered, chosen) | {"seconds": time.perf_counter() - started}


def teacher(args: Distillation, form: str):
    """Who is asked: the model behind `--endpoint`, or `--model` on this machine."""
    from engine.tasks.templates import build_prompt

    def prompt_of(row: dict) -> list[dict]:
        return build_prompt(TEMPLATES[form], row)

    if args.endpoint and args.teacher_model:
        from engine.chat_session import KEY_VARIABLE, ChatSession, key_in
        from engine.runs.teachers import RemoteTeacher

        key = {"api_key": key_in(args.api_key_env), "key_variable": args.api_key_env or KEY_VARIABLE}
        session = ChatSession(args.endpoint, args.teacher_model, flag="--endpoint", timeout=args.timeout, **key)
        request = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
        return RemoteTeacher(session, prompt_of, request, args.max_pixels, args.workers)

    from engine.rollout.sampling import SamplingParams
    from engine.runs.teachers import LocalTeacher
    from models.loading import load_policy

    sampling = SamplingParams(args.temperature)
    return LocalTeacher(args.load(load_policy), prompt_of, sampling, args.max_new_tokens, args.seed, args.batch_size)


def what_decides(args: Distillation, form: str) -> dict:
    """What a teacher's replies depend on, besides the questions."""
    who = args.teacher_model or args.model or "the starter policy"
    settings = {"teacher": who, "form": form, "temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    return settings | {"max_pixels": args.max_pixels} | ({} if args.endpoint else {"seed": args.seed})


if __name__ == "__main__":
    run_command(main)
