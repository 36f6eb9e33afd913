"""What a SAM is exported as: networks that compute what the model does, of any prompt, and how an image enters them."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine.export.aoti import trace
from engine.export.parity import check_parity
from engine.export.part import Exportable, as_tuple
from models.checkpoint import CheckpointError
from models.exported import Source
from models.sam.export import PromptedMasks, export_sam, preprocessing
from models.sam.image_encoder import ImageEncoder
from models.sam.loading import sam_kind
from models.sam.predictor import Predictor
from models.sam.sam import Sam, lite_medsam, tiny_sam
from models.starter.encoder import starter_sam

SOURCE = Source("a model", "0" * 64, "a test")


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(3)
    return starter_sam().eval()


def small_vit():
    """SAM-Med2D's encoder, small: windows, a global block, adapters."""
    torch.manual_seed(4)
    return Sam(
        ImageEncoder(32, 2, 2, global_blocks=(1,), image_size=64, adapters=True), 64, 4, "imagenet", "stretch_nearest"
    ).eval()


POINTS, LABELS = [[[9.0, 12.0], [40.0, 20.0]], [[30.0, 31.0], [5.0, 60.0]]], [[1.0, 0.0], [1.0, 1.0]]
BOXES = [[4.0, 6.0, 50.0, 40.0], [20.0, 3.0, 60.0, 61.0]]


@pytest.mark.parametrize("kind", ["box", "points", "both"])
@torch.no_grad()
def test_a_row_of_labelled_points_is_the_prompt_that_the_model_reads(sam, kind):
    points, labels, boxes = torch.tensor(POINTS), torch.tensor(LABELS), torch.tensor(BOXES)
    embedding = sam.image_encoder(torch.randn(1, 3, 64, 64))
    corners, corner_labels = boxes.unflatten(1, (2, 2)), torch.tensor([[2.0, 3.0]]).expand(2, -1)
    no_box, no_label = torch.full((2, 1, 2), 17.0), torch.full((2, 1), -1.0)  # wherever it lies
    given, rows, row_labels = {
        "box": ({"boxes": boxes[None]}, corners, corner_labels),
        "points": (
            {"points": points[None], "labels": labels[None]},
            torch.cat([points, no_box], 1),
            torch.cat([labels, no_label], 1),
        ),
        "both": (
            {"points": points[None], "labels": labels[None], "boxes": boxes[None]},
            torch.cat([points, corners], 1),
            torch.cat([labels, corner_labels], 1),
        ),
    }[kind]
    expected = sam.decode(embedding, multimask_output=False, **given)
    found = PromptedMasks(sam.prompt_encoder, sam.mask_decoder)(embedding, rows, row_labels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [starter_sam, small_vit])
def test_the_traced_networks_hold_no_op_of_ours_and_compute_what_eager_does(build):
    model: Exportable = export_sam(build().eval(), "sam_med2d", SOURCE)
    runs = {}
    for part in model.parts:
        program = trace(part, model.dimensions, torch.device("cpu"))
        assert not [node for node in program.graph.nodes if "vesalius" in str(node.target)]
        module = program.module()
        runs[part.name] = lambda inputs, part=part, module=module: as_tuple(module(*(inputs[name] for name in part.inputs)))
        assert check_parity(part, runs[part.name], {"prompts": (2, 5), "points": (2, 6)}, torch.float32).mask_iou == 1
    assert model.check(runs) == {"whole_mask_iou": 1.0}


def test_parts_that_do_not_fit_together_are_found(sam):
    model = export_sam(sam, "sam_med2d", SOURCE)
    runs = {
        part.name: lambda inputs, part=part: as_tuple(part.module(*(inputs[name] for name in part.inputs))) for part in model.parts
    }
    mirrored = {**runs, "image_encoder": lambda inputs: (runs["image_encoder"](inputs)[0].flip(-1),)}
    with torch.no_grad(), pytest.raises(ValueError, match=r"encoder and decoder together have an IoU of 0\.\d+ with eager's"):
        model.check(mirrored)


def as_the_manifest_says(facts, image):
    """[3, S, S] of an image, by the manifest's `preprocessing` alone."""
    size, (width, height) = facts["size"], image.size
    filters = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}
    if facts["resize"] == "square":
        width, height = size, size
    else:
        width, height = (int(side * size / max(image.size) + 0.5) for side in (width, height))
    pixels = np.asarray(image.resize((width, height), filters[facts["filter"]])).astype(np.float64)
    if facts["value_range"] == "minmax":
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    pixels = (pixels - facts["mean"]) / facts["std"]
    whole = np.full((size, size, 3), facts["pad_value"])
    whole[:height, :width] = pixels
    return torch.from_numpy(whole).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 41), (300, 411), (64, 64)])
@pytest.mark.parametrize("build", [starter_sam, small_vit, lite_medsam], ids=lambda build: build.__name__)
def test_the_manifest_says_how_an_image_enters(build, size, monkeypatch):
    model = build().eval()
    if model.fit == "centre":
        model.fit = "corner"  # the fit of no published model
    seen = []
    model.image_encoder = torch.nn.Identity()
    model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    image = Image.fromarray((np.random.default_rng(5).random((*size[::-1], 3)) * 200 + 20).astype("uint8"))
    Predictor(model).set_image(image)
    torch.testing.assert_close(seen[0].double(), as_the_manifest_says(preprocessing(model), image), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [lite_medsam, tiny_sam], ids=lambda build: build.__name__)
def test_a_checkpoint_is_told_by_its_tensors(build, tmp_path):
    torch.save({"model": build().state_dict()}, tmp_path / "weights.pth")
    assert sam_kind(tmp_path / "weights.pth") == build.__name__


def test_tensors_of_no_sam_are_one_line(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"weights.pth: its tensors are those of no SAM \(expected one of tiny_sam, lite_medsam"
    ):
        sam_kind(tmp_path / "weights.pth")
