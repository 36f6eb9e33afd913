"""`recipes.medvlm_r1_demo`: one image, one question, an answer with its reasoning and the probability of each option."""

import math

import pytest
import torch

from engine.data.questions import load_questions
from engine.data.starter.questions import build_starter_data
from engine.errors import InputError
from engine.evaluation.option_probabilities import option_probabilities
from engine.rollout.answers import GreedyAnswers
from engine.tasks.templates import build_prompt
from models.loading import load_policy
from recipes.medvlm_r1_demo import main


def test_a_starter_question_is_answered_with_its_reasoning(tmp_path):
    result = main(["--row", "1", "--output_dir", str(tmp_path)])
    assert result["reasoning"].startswith("The picture looks like") and result["text"] in result["reasoning"]
    assert result["answer"] == max(result["probabilities"], key=result["probabilities"].get)
    assert sum(result["probabilities"].values()) == pytest.approx(1)
    page = (tmp_path / "report.html").read_text()
    assert "probability" in page.lower() and "<img" in page


def test_an_image_of_ones_own_with_options_apart(tmp_path):
    row = load_questions(build_starter_data(), split="test")[0]
    row["images"][0].save(tmp_path / "x.png")
    flags = ["--image", str(tmp_path / "x.png"), "--question", "What is it?", "--options", "CT", "MRI", "X-Ray"]
    result = main([*flags, "--prompt_type", "train_complex", "--max_new_tokens", "40", "--output_dir", str(tmp_path / "run")])
    assert list(result["probabilities"]) == ["A", "B", "C"]


def test_probabilities_are_those_of_whole_answers():
    """Against transformers: the log-probability of each answer's tokens behind the prompt, one after the other."""
    policy = load_policy(None, dtype=torch.float32)
    policy.model.eval().requires_grad_(False)
    row = load_questions(build_starter_data(), split="test")[3]
    prompt = build_prompt("medvlm_train_complex", row)
    (said,) = (a.text for a in GreedyAnswers(policy, lambda _: prompt, 40)([row]))
    found = option_probabilities(policy, prompt, row["images"], said, list(row["options"]))
    before, _, rest = said.rpartition("<answer>")
    after = rest.partition("</answer>")[2]
    batch = policy.batch([policy.processor.encode(prompt, row["images"])])
    sums = {}
    for letter in row["options"]:
        [ids] = policy.processor.answer_ids([f"{before}<answer> {letter} </answer>{after}"])
        state, logits = policy.prefill(batch, 1, len(ids))
        total = 0.0
        for token in ids:
            total += logits.log_softmax(-1)[0, token].item()
            logits = state.step(torch.tensor([token]))
        sums[letter] = total
    whole = sum(map(math.exp, sums.values()))
    assert found == pytest.approx({letter: math.exp(value) / whole for letter, value in sums.items()}, rel=1e-3)


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--question", "Which? A) CT, B) MRI"], "--image is missing"),
        (["--image", "x.png"], "--question is missing"),
        (["--image", "x.png", "--question", "Which?"], "no options can be read"),
        (["--image", "x.png", "--question", "Which?", "--options", "CT"], "no options can be read"),
        (["--image", "x.png", "--question", "Which? A) CT, B) MRI"], "x.png: no such image file"),
        (["--row", "300"], "--row 300: expected at most 299"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main(flags)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
