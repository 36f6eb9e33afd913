"""The published prompt templates, letter for letter: a model is trained and tested with exactly these strings."""

from engine.errors import InputError

_MEDVLM_COMPLEX = (
    "\n{Question} \nYour task: \n1. Think through the question step by step, enclose your reasoning process in <think>...</think> "
    "tags. \n2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.\n"
    "3. No extra information or text outside of these tags.\n"
)
TEMPLATES: dict[str, str] = {
    "medr1_train_think": (
        "{Question} Your task: 1. Think through the question step by step, enclose your reasoning process in "
        "<think>...</think> tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags. 3. No extra information or text outside of these tags."
    ),
    "medr1_train_nothink": (
        "{Question} Your task: 1. Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. "
        "2. No extra information or text outside of this tag."
    ),
    "medr1_eval_think": (
        "{Question} Think through the question step by step in <think>...</think> tags. Then provide the correct single-letter "
        "choice (A, B, C, D,...) inside <answer>...</answer> tags."
    ),
    "medr1_eval_nothink": (
        "{Question} Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
    ),
    "medr1_zeroshot": "{Question} Provide the correct single-letter choice (A, B, C, D,...).",
    # MedVLM-R1's strings stand indented in its source, and the indentation is part of them: 8 spaces in training, 4 in evaluation.
    "medvlm_train_complex": _MEDVLM_COMPLEX.replace("\n", "\n" + 8 * " "),
    "medvlm_eval_complex": _MEDVLM_COMPLEX.replace("\n", "\n" + 4 * " "),
    "medvlm_eval_simple": "\n    {Question} \n    Your task: provide the correct single-letter choice (A, B, C, D,...).\n    ",
}


def build_prompt(template: str, row: dict) -> list[dict]:
    """One user message: an image entry per image of `row`, then the template `TEMPLATES[template]` filled with its problem.

    There is no system message: neither paper's code sends one (the chat template of Qwen2-VL adds its own default).
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r} (expected one of {', '.join(TEMPLATES)})")
    text = TEMPLATES[template].replace("{Question}", row["problem"])
    images = [{"type": "image"} for _ in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]
