"""A small Uni-MedVLM for tests of stages and checkpoints: prompts for it, what it answers with, and steps of training."""

import torch
import torch.nn.functional as F
from PIL import Image

from models.starter.uni_medvlm import build_tiny_unimed
from models.uni_medvlm.experts import ExpertLoRA
from models.uni_medvlm.tokens import SEG

CORPUS = ["Could you segment out the lesion in this image?", "What is in this region?", "A CT image with a bright lesion."] * 2
QUESTIONS = ["Could you segment out the lesion?", "What is this?"]
ANSWERS = [SEG, "A lesion."]
LORA = ExpertLoRA(r=4, alpha=8, dropout=0.0)


def small_unimed(seed=0, **settings):
    return build_tiny_unimed(CORPUS, seed=seed, **{"hidden_size": 64, "num_layers": 2, **settings})


def batch_of(policy):
    """Two prompts with images, the second with a region."""
    generator = torch.Generator().manual_seed(1)
    encoded = []
    for place, question in enumerate(QUESTIONS):
        pixels = torch.randint(0, 256, (40, 50, 3), generator=generator, dtype=torch.uint8)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        if place == 1:
            region = Image.new("L", (50, 40))
            region.paste(255, (10, 10, 40, 30))
            content.append({"type": "region", "mask": region})
        encoded.append(policy.processor.encode([{"role": "user", "content": content}], [Image.fromarray(pixels.numpy())]))
    return policy.batch(encoded)


def answer_ids(policy):
    """[2, 1, T], padded."""
    rows = [torch.tensor(ids) for ids in policy.processor.answer_ids(ANSWERS)]
    return torch.nn.utils.rnn.pad_sequence(rows, True, policy.pad_token_id)[:, None]


def computed(policy):
    """Logits of the answers' tokens [2, T, V], and the logits of the one mask, the decoder's expected IoU with them."""
    batch, ids = batch_of(policy), answer_ids(policy)

    def head(hidden, weight):
        masks, iou = policy.mask_logits(batch, hidden[:1, 0], [0])  # <SEG> is the first token of the first answer
        return hidden @ weight.T, masks[0], iou

    return policy.model(**policy.answer_inputs(batch, ids), head=head)


@torch.no_grad()
def outputs(policy):
    """`computed` in eval mode, with nothing kept of images."""
    policy.model.eval()
    policy.forget_images()
    return computed(policy)


def equal(first, second):
    """Whether two `outputs` are the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def train(policy, steps=2, learning_rate=1e-2):
    """Steps of AdamW on what is trainable, by the loss of tokens, mask, expected IoU and routers: {name: parameter before}.

    Two, since a LoRA's second matrix opens the way to its first.
    """
    model = policy.model.train()
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.forget_images()
        logits, mask, iou = computed(policy)
        loss = F.cross_entropy(logits.flatten(0, 1), answer_ids(policy).flatten()) + mask.sigmoid().mean() + iou.sum()
        auxiliary = policy.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step()
    model.eval()
    policy.forget_images()
    return before


def changed(policy, before):
    """The names of the tensors, buffers too, that are no longer as they were."""
    return {name for name, tensor in policy.model.state_dict().items() if not torch.equal(tensor, before[name])}


def disturb(module, scale=0.05):
    """Add noise to every parameter that is trainable."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
