"""Flags of a distillation: who the teacher is, what it is asked, and which of its answers are kept."""

from dataclasses import dataclass
from typing import Any

from engine.command.evaluation_settings import PolicyArguments
from engine.command.settings import refuse, setting


@dataclass
class Distillation(PolicyArguments):
    """Which questions a teacher is asked: a model here (`--model`), or one behind `--endpoint`."""

    data: list[str] | None = setting(None, "Files or folders of questions. None: the starter training questions.")
    split: str = setting("train", "Split of a folder that holds several.")
    max_new_tokens: int = setting(512, "Longest answer in tokens.", at_least=1, at_most=2**17)
    samples: int = setting(4, "Answers to each question.", at_least=1)
    temperature: float = setting(1.0, "Of drawn answers; 0: the likeliest.", at_least=0)
    seed: int = setting(42, "Decides what a model here draws.", at_least=0)
    endpoint: str | None = setting(None, "OpenAI-compatible server of the teacher, e.g. http://localhost:8000/v1.", metavar="URL")
    teacher_model: str | None = setting(None, "The teacher's name at that server.", metavar="NAME")
    api_key_env: str | None = setting(
        None, "Variable of the environment that holds the server's API key. None: OPENAI_API_KEY, if there.", metavar="NAME"
    )
    timeout: float = setting(300.0, "Seconds to wait for the server's next byte.", more_than=0)
    workers: int = setting(8, "Questions on their way to the server at once.", at_least=1, at_most=256)


@dataclass
class AnswerSelection:
    """Answers that are there already, and which are kept."""

    answers: list[str] | None = setting(
        None, "JSON or JSONL files of a teacher's answers, or evaluation files; nobody is asked then.", metavar="FILE"
    )
    form: str = setting(
        "think", "What is asked for and kept: a thought and an answer, or an answer alone.", choices=["think", "nothink"]
    )
    per_question: int = setting(1, "Keep at most so many answers to a question, the first right ones.", at_least=1)


def check_teacher(teacher: Distillation, chosen: AnswerSelection) -> None:
    """InputError where the flags name two teachers, or half of one."""
    given: list[tuple[str, Any]] = [("--endpoint", teacher.endpoint), ("--model", teacher.model), ("--data", teacher.data)]
    beside = next((flag for flag, value in given if value is not None), None)
    pair = (teacher.endpoint is None) == (teacher.teacher_model is None)
    refuse(
        [
            (
                not (chosen.answers and beside),
                f"--answers and {beside}: expected one of them, since nobody is asked with --answers",
            ),
            (pair, "--endpoint and --teacher_model belong together"),
            (not (teacher.endpoint and teacher.model), "--endpoint and --model: expected one of them, the teacher"),
            (teacher.endpoint is not None or teacher.api_key_env is None, "--api_key_env needs --endpoint"),
            (
                teacher.temperature > 0 or teacher.samples == 1,
                f"--samples {teacher.samples}: the likeliest answers are all the same (expected a --temperature above 0)",
            ),
        ]
    )
