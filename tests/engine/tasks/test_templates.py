"""Prompts are the published ones, letter for letter."""

import pytest

from engine.errors import InputError
from engine.tasks.templates import TEMPLATES, build_prompt


def test_the_training_prompt_is_med_r1s():
    message = build_prompt("medr1_train_think", {"problem": "What {is} it? A)CT, B)MRI", "images": ["one", "two"]})
    text = (
        "What {is} it? A)CT, B)MRI Your task: 1. Think through the question step by step, enclose your reasoning process in "
        "<think>...</think> tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> "
        "tags. 3. No extra information or text outside of these tags."
    )
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
    assert message == [{"role": "user", "content": content}]


def test_the_fine_tuning_prompt_is_that_of_med_r1s_scripts():
    """The task in the system message, the question before its image."""
    system, user = build_prompt("medr1_sft", {"problem": "What is it? A)CT, B)MRI", "images": ["one"]})
    task = "Your task: Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
    assert system == {"role": "system", "content": task}
    assert user == {"role": "user", "content": [{"type": "text", "text": "What is it? A)CT, B)MRI"}, {"type": "image"}]}


def test_medvlm_r1s_prompts_have_its_white_space():
    """8 spaces before each line in training, 4 in evaluation, one at the end of most lines, a line break before and after."""
    assert TEMPLATES["medvlm_train_complex"] == (
        "\n        {Question} \n        Your task: \n        1. Think through the question step by step, enclose your reasoning "
        "process in <think>...</think> tags. \n        2. Then provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags.\n        3. No extra information or text outside of these tags.\n        "
    )
    assert TEMPLATES["medvlm_eval_complex"] == (
        "\n    {Question} \n    Your task: \n    1. Think through the question step by step, enclose your reasoning process in "
        "<think>...</think> tags. \n    2. Then provide the correct single-letter choice (A, B, C, D,...) inside "
        "<answer>...</answer> tags.\n    3. No extra information or text outside of these tags.\n    "
    )
    assert TEMPLATES["medvlm_eval_simple"] == (
        "\n    {Question} \n    Your task: provide the correct single-letter choice (A, B, C, D,...).\n    "
    )


def test_every_template_holds_the_question_once():
    assert all(text.lstrip().startswith("{Question}") and text.count("{Question}") == 1 for text in TEMPLATES.values())
    assert all(("<think>" in text) == name.endswith(("_think", "_complex")) for name, text in TEMPLATES.items())


def test_an_unknown_template_is_an_error():
    with pytest.raises(InputError, match="unknown template 'think' .expected one of medr1_train_think, "):
        build_prompt("think", {"problem": "?", "images": []})
