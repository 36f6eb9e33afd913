"""Replayed decoding, with a capture that needs no GPU: its replay computes again what was captured, into the same outputs."""

import numpy as np
import pytest
import torch

from models.sam import two_way_transformer
from models.sam.predictor import GRAPHED_PROMPTS, Predictor
from models.sam.replay import KINDS, Replay
from models.sam.sam import Sam

BOX, POINT = {"boxes": [[4.0, 4.0, 40.0, 30.0]]}, {"points": [[[20.0, 20.0]]], "labels": [[1.0]]}


class Captures:
    """Stands for `capture_on_cuda`: of a graph it has what matters here, that replays read and write the tensors of the capture."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        outputs = tuple(output.clone() for output in run())

        def replay():
            self.replayed += 1
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return replay, outputs


@pytest.fixture
def eager_and_replayed(monkeypatch):
    """A predictor as it is here, another that replays as on CUDA, and its captures; of one model, and with one image."""
    monkeypatch.setattr(two_way_transformer, "FOLDED_ON", ("cpu",))
    torch.manual_seed(0)
    model = Sam(torch.nn.Conv2d(3, 256, 8, stride=8), 64, 8, "imagenet", "corner").requires_grad_(False)
    eager, replayed, captures = Predictor(model), Predictor(model), Captures()
    replayed._decode = Replay(replayed._run, replayed._reads, captures)
    for predictor in (eager, replayed):
        predictor.set_image(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return eager, replayed, captures


def test_a_kind_that_comes_again_is_replayed_on_what_is_asked_then(eager_and_replayed):
    eager, replayed, captures = eager_and_replayed
    kept = []
    for x in range(4):
        for prompts in (BOX, POINT, BOX | POINT):
            moved = {name: (np.asarray(prompt) + (0 if name == "labels" else x)).tolist() for name, prompt in prompts.items()}
            for multimask in (False, True):
                kept.append(
                    (replayed.predict(multimask_output=multimask, **moved), eager.predict(multimask_output=multimask, **moved))
                )
    assert captures.captured == 6 and captures.replayed == 6 * 3
    for mine, exact in kept:  # compared at the end: no later replay has written over an earlier answer
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    for predictor in (eager, replayed):
        predictor.set_image(np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    assert torch.equal(replayed.predict(**BOX).logits, eager.predict(**BOX).logits) and captures.replayed == 6 * 3 + 1


def test_graphs_are_dropped_where_weights_change(eager_and_replayed):
    eager, replayed, captures = eager_and_replayed
    decoder = replayed.model.mask_decoder

    def written():
        decoder.transformer.final_attn_token_to_image.k_proj.weight.mul_(-3.0)

    def moved():
        decoder.iou_token.weight.data = decoder.iou_token.weight.data * 3

    def matrices_dropped():
        decoder.train().eval()

    for change in (written, moved, matrices_dropped):
        for _ in range(3):
            replayed.predict(**BOX)
        before, (captured, count) = replayed.predict(**BOX).logits, (captures.captured, captures.replayed)
        with torch.no_grad():
            change()
        after = [replayed.predict(**BOX).logits for _ in range(2)]
        assert (captures.captured, captures.replayed) == (captured + 1, count + 1)  # eager, then captured anew
        assert torch.equal(after[0], after[1]) and torch.equal(after[0], eager.predict(**BOX).logits)
        assert change is matrices_dropped or not torch.equal(after[0], before)


def test_many_prompts_launch_their_kernels_and_old_kinds_go(eager_and_replayed):
    eager, replayed, captures = eager_and_replayed
    boxes = np.tile(BOX["boxes"], (GRAPHED_PROMPTS + 1, 1))
    for _ in range(3):
        many = replayed.predict(boxes=boxes)
    assert captures.captured == 0 and torch.equal(many.logits, eager.predict(boxes=boxes).logits)
    for count in [*range(1, KINDS + 2), 1]:
        replayed.predict(boxes=boxes[:count])
    assert captures.captured == 0  # of KINDS + 1 kinds the first is forgotten, and seen as new


def test_without_a_graph_the_reason_is_said_once_and_masks_are_the_same(eager_and_replayed, caplog):
    eager, replayed, _ = eager_and_replayed

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    replayed._decode = Replay(replayed._run, replayed._reads, refuse)
    for prompts in (BOX, BOX, BOX, POINT, POINT):
        assert torch.equal(replayed.predict(**prompts).logits, eager.predict(**prompts).logits)
    [record] = caplog.records
    assert record.message.endswith("one by one: operation not permitted when stream is capturing")
