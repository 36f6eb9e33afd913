"""What pretrained vision towers bring along, for small ones that start from nothing: they have seen images with captions and masks.

    loss = BCE(words of the caption | mean of the patches' features)  +  what each patch knows of lesions and places (`patch_loss`)
           + BCE(share of lesion in each cell of the mask decoder's image)

Linear layers, then thrown away, read all this. It is what a CLIP knows of captions, and SAM's encoder of things with edges.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.mecovqa.rows import MeCoVQA
from engine.progress import progress
from engine.training.warm_up.masked import patch_loss

BATCH = 16


def teach_towers(policy: Any, captions: MeCoVQA, masked: MeCoVQA, *, steps: int, learning_rate: float, seed: int) -> None:
    """Train the vision tower of `policy`, and its mask decoder's image encoder, on the images of `masked`, square each.

    `policy.model` has `image_features(images)`, [N, D] each, and `visual_model.image_encoder`, [B, 3, S, S] -> [B, C, h, h].
    """
    torch.manual_seed(seed)
    order, model = random.Random(seed), policy.model
    said = {record["image_id"]: record["answer"].rstrip(".").split() for record in captions.records}
    vocabulary = sorted({word for words in said.values() for word in words})
    encode, prompt = policy.processor.encode, [{"role": "user", "content": [{"type": "image"}]}]
    inputs, masks, words = [], [], []
    for row in (masked[i] for i in range(len(masked)) if masked.record(i)["image_id"] in said):
        inputs.append(encode(prompt, row["images"]).image)
        masks.append(torch.from_numpy(np.asarray(row["masks"][0]) > 0).float())
        words.append(torch.tensor([float(word in said[row["image_id"]]) for word in vocabulary]))
    sam = model.visual_model.image_encoder
    with torch.no_grad():
        features, cells = model.image_features(inputs[:1])[0], sam(inputs[0].sam_pixels[None])
    word_head, patch_head = nn.Linear(features.shape[1], len(vocabulary)), nn.Linear(features.shape[1], 3)
    cell_head = nn.Conv2d(cells.shape[1], 1, 1)
    towers = [model.vision_tower.vision_tower, model.vision_tower.convnext_encoder, sam]
    frozen = [p for tower in towers for p in tower.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    parameters = [p for module in (*towers, word_head, patch_head, cell_head) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    sam.train()
    for _ in (bar := progress(range(steps), desc="teaching the vision towers", unit="step")):
        chosen = order.sample(range(len(inputs)), BATCH)
        images, truth = [inputs[i] for i in chosen], torch.stack([masks[i] for i in chosen])[:, None]
        seen = torch.stack(model.image_features(images))
        loss = F.binary_cross_entropy_with_logits(word_head(seen.mean(1)), torch.stack([words[i] for i in chosen]))
        loss = (
            loss
            + patch_loss(patch_head(seen), truth)
            + _cell_loss(cell_head(sam(torch.stack([i.sam_pixels for i in images]))), truth)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    sam.eval()
    for parameter in frozen:
        parameter.requires_grad_(False)


def _cell_loss(logits: Tensor, masks: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.adaptive_avg_pool2d(masks, logits.shape[-1]))
