"""How likely a model holds each option of a question, behind the reasoning that it gave.

p(option) = p(answer with that option's letter | image, question, reasoning), of all options together 1
"""

from collections.abc import Sequence

import torch
from PIL import Image

from engine.evaluation.attacks import target_losses
from engine.rollout.policy import Message, Policy


@torch.no_grad()
def option_probabilities(
    policy: Policy, prompt: list[Message], images: Sequence[Image.Image], text: str, letters: Sequence[str]
) -> dict[str, float]:
    """{letter: probability} of the answers that are the model's own `text` with this letter in its last `<answer>`.

    A text without tags is taken for reasoning, and the letter follows it in tags.
    """
    before, tag, rest = text.rpartition("<answer>")
    _, end, after = rest.partition("</answer>")
    start = before + tag if tag and end else f"{text}<answer>"
    targets = [policy.processor.answer_ids([f"{start} {letter} </answer>{after}"])[0] for letter in letters]
    encoded = policy.processor.encode(prompt, images)
    losses = target_losses(policy, policy.batch([encoded] * len(letters)), targets)
    return dict(zip(letters, (-losses.double()).softmax(0).tolist(), strict=True))
