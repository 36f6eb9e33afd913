"""What a pretrained vision-language model brings along, for a small one that starts from nothing: it learns to speak and to see.

    loss = CE(answer tokens)  +  mean over image tokens of BCE(share of lesion in its patch)  +  (error of its row and column)^2

Rows and columns are in -1..1; a linear layer, then thrown away, reads all three from the token. The training that follows differs
in two things:

    left and right   pictures are mirrored: the model learns to name the patient's side, as radiologists do, not the picture's
    the questions    each word is kept, left out or replaced by letters: the model looks for the lesion whatever it is asked

Shape letters: B batch, N image tokens, S side of the masks.
"""

import random
import string
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.masked_questions import MaskedQuestions
from engine.progress import progress


def warm_up(vlm: Any, collate: Callable, rows: MaskedQuestions, *, steps: int, learning_rate: float, seed: int = 0) -> None:
    """Train all weights of `vlm`, which is called as Hugging Face's LLaVA is, on `rows`, 16 a step; `collate(rows)` gives its batch
    and masks [B, 1, S, S], which fit what the vision tower sees where pictures are square."""
    torch.manual_seed(seed)
    order = random.Random(seed)
    patch_head = nn.Linear(vlm.config.text_config.hidden_size, 3)
    parameters = [*vlm.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    vlm.train()
    for _ in progress(range(steps), desc="warming up the vision-language model", unit="step"):
        batch = collate([garble(rows[i], order) for i in order.choices(range(len(rows)), k=16)])
        output = vlm(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"].flip(3),
            labels=batch["labels"],
        )
        loss = output.loss + patch_loss(patch_head(output.image_hidden_states), batch["masks"].flip(3))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    vlm.eval()


def patch_loss(read: Tensor, masks: Tensor) -> Tensor:
    """read [B * N, 3], lesion logit, row and column of each image token, and masks [B, 1, S, S] -> the second part of the loss."""
    read = read.view(len(masks), -1, 3)
    side = int(read.shape[1] ** 0.5)
    line = torch.linspace(-1, 1, side)
    share = F.adaptive_avg_pool2d(masks, side).flatten(1)
    places = torch.cartesian_prod(line, line)
    return F.binary_cross_entropy_with_logits(read[..., 0], share) + (read[..., 1:] - places).square().mean()


def garble(row: dict, order: random.Random) -> dict:
    """The row, each word of its question kept, left out or replaced by up to nine letters."""
    words = [
        order.choice((word, "", "".join(order.choices(string.ascii_lowercase, k=order.randint(1, 9)))))
        for word in row["question"].split()
    ]
    return {**row, "question": " ".join(filter(None, words))}
