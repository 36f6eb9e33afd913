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
    "medr1_sft": "{Question}",
    # MedVLM-R1's strings stand indented in its source, and the indentation is part of them: 8 spaces in training, 4 in evaluation.
    "medvlm_train_complex": _MEDVLM_COMPLEX.replace("\n", "\n" + 8 * " "),
    "medvlm_eval_complex": _MEDVLM_COMPLEX.replace("\n", "\n" + 4 * " "),
    "medvlm_eval_simple": "\n    {Question} \n    Your task: provide the correct single-letter choice (A, B, C, D,...).\n    ",
}

# Med-R1's scripts for supervised fine-tuning give the task in a system message, and the question before its image.
SYSTEM = {"medr1_sft": "Your task: Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."}


def build_prompt(template: str, row: dict) -> list[dict]:
    """One user message: an image entry per image of `row`, then the template `TEMPLATES[template]` filled with its problem.

    There is a system message where `SYSTEM` has one, and then the images come last. The papers' other prompts have none (the chat
    template of Qwen2-VL adds its own default).
    """
    if template not in TEMPLATES:
        raise InputError(f"unknown template {template!r} (expected one of {', '.join(TEMPLATES)})")
    text = [{"type": "text", "text": TEMPLATES[template].replace("{Question}", row["problem"])}]
    images = [{"type": "image"} for _ in row["images"]]
    if template in SYSTEM:
        return [{"role": "system", "content": SYSTEM[template]}, {"role": "user", "content": text + images}]
    return [{"role": "user", "content": images + text}]
