"""Frames, the predictor, and LiteMedSAM's real weights on real images."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from models.sam.everything import mask_boxes, point_grid, segment_everything, suppress_overlaps, uncovered_points
from models.sam.frame import Frame, as_pixels
from models.sam.predictor import Predictor
from models.sam.sam import Sam

REAL = [
    ("dermoscopy/ISIC_0001769.jpg", "dermoscopy/ISIC_0001769__lesion.png"),
    ("ultrasound/busi_benign_39.jpg", "ultrasound/busi_benign_39__tumor.png"),
]


@pytest.mark.parametrize("how", ["corner", "centre", "stretch", "stretch_nearest"])
def test_points_and_masks_of_a_frame_are_inverse(how):
    frame = Frame.fit((60, 100), 64, how)
    assert frame.points(torch.tensor([[0.0, 0.0], [100.0, 60.0]])).tolist() == [
        [frame.left, frame.top],
        [frame.left + frame.resized[1], frame.top + frame.resized[0]],
    ]
    inside = frame.pad(torch.ones(1, *frame.resized))
    assert inside.shape == (1, 64, 64)
    assert frame.masks(inside[None])[0, 0].shape == (60, 100)
    assert frame.masks(inside[None]).min() == 1  # nothing of the padding is left in a mask of the original


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_a_smooth_image_survives_the_frame(dtype):
    ramp = np.linspace(0, 255, 200).astype(dtype)
    pixels = as_pixels(np.tile(ramp, (100, 1)))
    frame = Frame.fit((100, 200), 64, "corner")
    back = frame.masks(frame.pad(frame.resize(pixels))[None])[0, 0]
    assert np.abs(back.numpy() - pixels[..., 0])[:, 4:-4].max() < 4


@pytest.mark.parametrize("scale", [1, 200])
def test_deep_grey_images_keep_their_own_scale(scale):
    deep = (np.arange(64 * 48).reshape(64, 48) % 251 * scale).astype(np.uint16 if scale > 1 else np.uint8)
    pixels = as_pixels(Image.fromarray(deep))
    assert pixels.shape == (64, 48, 3) and pixels.max() == 250 * scale


def test_an_image_must_be_grey_or_rgb():
    with pytest.raises(ValueError, match=r"\[H, W\] or \[H, W, 3\], not \(4, 4, 2\)"):
        as_pixels(np.zeros((4, 4, 2), np.uint8))


def box_and_truth(mini_data, mask):
    truth = np.asarray(Image.open(mini_data / "masks" / mask).convert("L")) > 127
    y, x = np.nonzero(truth)
    return truth, [x.min(), y.min(), x.max(), y.max()]


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_real_weights_make_real_masks(lite_medsam, mini_data):
    predictor = Predictor(lite_medsam)
    with pytest.raises(RuntimeError, match="set_image comes before predict"):
        predictor.predict(boxes=[[0, 0, 1, 1]])
    for image, mask in REAL:
        truth, box = box_and_truth(mini_data, mask)
        predictor.set_image(Image.open(mini_data / "images" / image))
        prediction = predictor.predict(boxes=[box, [0, 0, 20, 20]])
        assert prediction.masks.shape == (2, 1, *truth.shape)
        assert dice(prediction.masks[0, 0].numpy(), truth) > 0.9
        again = predictor.predict(boxes=[box])
        torch.testing.assert_close(again.logits[0], prediction.logits[0], atol=1e-3, rtol=1e-4)


def test_half_precision_weights_find_the_same_region(lite_medsam, mini_data):
    image, mask = REAL[0]
    truth, box = box_and_truth(mini_data, mask)
    predictor = Predictor(copy.deepcopy(lite_medsam).bfloat16())
    predictor.set_image(Image.open(mini_data / "images" / image))
    prediction = predictor.predict(boxes=[box])
    assert prediction.logits.dtype == torch.float32 and dice(prediction.masks[0, 0].numpy(), truth) > 0.9


def test_the_embedding_is_computed_once_an_image(lite_medsam, mini_data):
    calls = []
    hook = lite_medsam.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    predictor = Predictor(lite_medsam)
    predictor.set_image(np.zeros((64, 64, 3), np.uint8))
    for _ in range(3):
        first = predictor.predict(boxes=[[5, 5, 40, 40]], points=[[[20, 20]]], labels=[[1]], multimask_output=True)
        predictor.predict(mask_input=first.low_res_masks[:, :1], points=[[[20, 20]]], labels=[[1]])
    hook.remove()
    assert len(calls) == 1


def test_folding_batch_norm_changes_nothing(lite_medsam):
    torch.manual_seed(0)
    block = lite_medsam.image_encoder.layers[0].blocks[0]
    x = torch.randn(1, 64, 40, 24)
    with torch.no_grad():
        folded = block(x)
        y = x
        for conv in (block.conv1, block.conv2):
            y = torch.nn.functional.gelu(conv.bn(conv.c(y)))
        plain = torch.nn.functional.gelu(block.conv3.bn(block.conv3.c(y)) + x)
    torch.testing.assert_close(folded, plain, atol=1e-5, rtol=1e-4)


@pytest.fixture
def small_sam():
    """A Sam of random weights around one convolution: LiteMedSAM was trained for boxes alone and answers no points."""
    torch.manual_seed(0)
    model = Sam(torch.nn.Conv2d(3, 256, 8, stride=8), 64, 8, "imagenet", "corner").requires_grad_(False)
    for network in model.mask_decoder.output_hypernetworks_mlps:
        network.layers[-1].weight *= 100  # logits of a trained model's size
    return model


@pytest.mark.parametrize("hierarchical", [True, False])
def test_everything_finds_segments_that_do_not_repeat(small_sam, hierarchical):
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    asked = []
    hook = small_sam.mask_decoder.register_forward_hook(lambda _, inputs, __: asked.append(inputs[2].shape[1]))
    loose = {"points_per_side": 8, "hierarchical": hierarchical, "min_iou": -1.0, "min_stability": 0.1}
    every = segment_everything(Predictor(small_sam), image, max_overlap=1.0, **loose)
    hook.remove()
    assert (4 < sum(asked) < 49 if hierarchical else sum(asked) == 64) and len(every) > 10  # sure pixels are not asked again
    boxes = torch.tensor([segment.box for segment in every])
    assert torch.equal(boxes, mask_boxes(torch.from_numpy(np.stack([segment.mask for segment in every]))))
    scores = torch.tensor([segment.predicted_iou for segment in every])
    assert scores.sort(descending=True).values.equal(scores) and min(segment.stability for segment in every) >= 0.1
    few = segment_everything(Predictor(small_sam), image, **loose)
    assert [segment.point for segment in few] == [every[i].point for i in suppress_overlaps(boxes, scores, 0.7)]
    assert len(few) < len(every)
    with pytest.raises(ValueError, match="multiple of 4"):
        segment_everything(Predictor(small_sam), image, points_per_side=6)


def test_an_image_the_first_round_is_sure_of_needs_no_second(small_sam, monkeypatch):
    monkeypatch.setattr("models.sam.everything.SURE", -1e9)
    asked = []
    small_sam.mask_decoder.register_forward_hook(lambda _, inputs, __: asked.append(inputs[2].shape[1]))
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    assert segment_everything(Predictor(small_sam), image, points_per_side=8, min_iou=-1.0, min_stability=0.0)
    assert asked == [4]


def test_masks_are_kept_packed_and_looked_at_a_few_at_a_time(small_sam, monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    sizes, brought = [], Predictor(small_sam)
    brought.set_image(image)
    whole = type(brought.frame).masks
    monkeypatch.setattr(type(brought.frame), "masks", lambda *args: sizes.append(args[1].shape[1]) or whole(*args))
    loose = {"points_per_side": 8, "min_iou": -1.0, "min_stability": 0.1}
    together = segment_everything(Predictor(small_sam), image, **loose)
    assert max(sizes) > 4
    sizes.clear()
    monkeypatch.setattr("models.sam.everything.PIXELS_AT_ONCE", 4 * 48 * 64)
    apart = segment_everything(Predictor(small_sam), image, **loose)
    assert max(sizes) == 4
    for one, other in zip(together, apart, strict=True):
        assert one.box == other.box and np.array_equal(one.mask, other.mask) and one.mask.shape == (48, 64)
        x1, y1, x2, y2 = one.box
        assert one.packed.nbytes == -(-(x2 - x1 + 1) * (y2 - y1 + 1) // 8)


def test_nothing_found_is_an_empty_list_and_a_warning(small_sam, caplog):
    black = np.zeros((32, 48, 3), np.uint8)
    assert segment_everything(Predictor(small_sam), black, points_per_side=4, min_iou=2.0) == []
    assert "no segment: the best mask has a predicted IoU of" in caplog.text and "more than 2, and" in caplog.text


def test_the_second_round_asks_what_the_first_left_open():
    asked = point_grid(8)
    free = torch.zeros(100, 200, dtype=torch.bool)
    rest = uncovered_points(32, free)
    together = {tuple(point) for point in (torch.cat([asked, rest]) * 32).round().int().tolist()}
    assert together == {(x, y) for x in range(1, 32) for y in range(1, 32)} | {
        (4 * i + 2, 4 * j + 2) for i in range(8) for j in range(8)
    }
    assert len(asked) + len(rest) == len(together)
    free[:, :100] = True
    assert uncovered_points(32, free)[:, 0].min() == 0.5
    assert len(uncovered_points(32, torch.ones_like(free))) == 0


def test_overlapping_boxes_are_suppressed_best_first():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 5]])
    assert suppress_overlaps(boxes, torch.tensor([0.5, 0.9, 0.1, 0.2]), 0.7).tolist() == [1, 3, 2]
    assert suppress_overlaps(torch.zeros(0, 4), torch.zeros(0), 0.7).tolist() == []
