"""What `--loader dali` makes of images on a CPU: what the processors make of them by Pillow"""

import importlib.util
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from engine.data.images import ImageError, open_image
from engine.data.loaders import dali
from engine.data.loaders.dali import Pictures
from engine.data.loaders.undecoded import Undecoded, as_picture, read_undecoded
from engine.data.masked_questions import load_masked_questions
from engine.data.questions import load_questions
from engine.data.sources import ImageFile
from engine.errors import InputError
from engine.training.config.sft import SFTConfig
from models.loading import load_policy
from models.sam.frame import Frame
from models.sam.sam import PIXEL_MEAN, PIXEL_STD
from models.views import View
from tests.engine.training import grpo_run, sft_run, test_masks
from tests.tiny_qwen import save_tiny

MINI = Path(__file__).resolve().parents[5] / "shared" / "data" / "mini"
with_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="nvidia-dali is not installed (extra dali)")
with_mini = pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/mini is not here")
EQUAL = 1e-3  # levels of 256: what normalising rounds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processor(model):
    return load_policy(model).processor


def mini_images() -> list[Path]:
    return sorted((MINI / "images").rglob("*.jpg"))


def undecoded(path):
    return read_undecoded(ImageFile(path))


def levels_apart(one, other, std):
    """The largest difference of normalised pixels [..., 3, ...] whose channels have deviations `std`, in levels."""
    return ((one - other).abs() * std).max().item() * 255


@with_dali
@with_mini
def test_patches_are_the_processors_for_every_real_image(processor):
    """Scaled down and, being stamps, up: more than two batches of files."""
    files = mini_images()
    assert len(files) == 145
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    images = [undecoded(file) for file in files]
    assert all(isinstance(image, Undecoded) for image in images)
    images += [open_image(file).resize((13, 17)) for file in files[:8]]
    std = torch.tensor(processor.view.std).repeat_interleave(2 * processor.view.patch[0] ** 2)
    for image, made in zip(images, Pictures(processor.view)(images), strict=True):
        expected = processor.encode(prompt, [as_picture(image)], "a key")
        without = processor.encode_sizes(prompt, [(image.height, image.width)], "a key")
        assert torch.equal(without.input_ids, expected.input_ids) and without.image_keys == expected.image_keys
        assert torch.equal(without.image_grid_thw[0], expected.image_grid_thw[0])
        assert made.dtype == torch.float32 and levels_apart(made, expected.pixel_values[0], std) <= EQUAL


@with_dali
@with_mini
def test_frames_of_images_and_masks_are_sams(side=256):
    """The longest side becomes `side`, the rest is zero; masks by nearest, as Pillow's."""
    masks = {file: sorted((MINI / "masks" / file.parent.name).glob(f"{file.stem}__*")) for file in mini_images()}
    pairs = [(image, first) for image, (first, *_) in ((image, found) for image, found in masks.items() if found)]
    assert len(pairs) > 90
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    view = View(
        lambda height, width: Frame.fit((height, width), side, "corner").resized,
        tuple((mean / 255).flatten().tolist()),
        tuple((std / 255).flatten().tolist()),
        bicubic=False,
        side=side,
    )
    values = [np.asarray(Image.open(mask).convert("L")) for _, mask in pairs]
    found = Pictures(view).with_masks([undecoded(image) for image, _ in pairs], values)
    for (file, _), mask, (made, drawn) in zip(pairs, values, found, strict=True):
        pixels = np.asarray(open_image(file))
        frame = Frame.fit(pixels.shape[:2], side, "corner")
        expected = frame.pad((frame.resize(pixels) - mean) / std)
        assert made.shape == (3, side, side) and levels_apart(made, expected, std / 255) <= EQUAL
        height, width = frame.resized
        nearest = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        assert drawn.shape == (1, side, side) and not drawn[:, height:].any() and not drawn[:, :, width:].any()
        assert np.array_equal(drawn[0, :height, :width], nearest)


@with_dali
@with_mini
def test_prs_meds_views_are_its_processors():
    processor = test_masks.build().processor
    files = mini_images()[::12]
    expected = processor._images([open_image(file) for file in files])
    for name, view in processor.views.items():
        made = torch.stack(Pictures(view)([undecoded(file) for file in files]))
        std = torch.tensor(view.std)[:, None, None]
        assert made.shape == expected[name].shape and levels_apart(made, expected[name], std) <= EQUAL


def deep_png(path):
    rows = b"".join(b"\0" + struct.pack(">40H", *range(i * 100, i * 100 + 40 * 997, 997)) for i in range(30))
    header = struct.pack(">IIBBBBB", 40, 30, 16, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(content)
    return path


@with_dali
def test_what_dali_does_not_read_comes_decoded(tmp_path, processor):
    turned = Image.Exif()
    turned[274] = 6
    noise = Image.effect_noise((70, 50), 60).convert("RGB")
    noise.save(tmp_path / "turned.jpg", exif=turned)
    noise.quantize().save(tmp_path / "palette.png")
    files = [tmp_path / "turned.jpg", tmp_path / "palette.png", deep_png(tmp_path / "deep.png"), get_testdata_file("CT_small.dcm")]
    images = [undecoded(Path(file)) for file in files]
    assert not any(isinstance(image, Undecoded) for image in images)
    noise.save(tmp_path / "plain.png")
    images.insert(2, undecoded(tmp_path / "plain.png"))  # among them, and its place is kept
    std = torch.tensor(processor.view.std).repeat_interleave(2 * processor.view.patch[0] ** 2)
    for image, made in zip(images, Pictures(processor.view)(images), strict=True):
        expected = processor.image_processor(images=[as_picture(image)], return_tensors="pt")["pixel_values"]
        assert levels_apart(made, expected, std) <= EQUAL


@with_dali
def test_a_damaged_file_is_one_line_and_the_next_batch_is_made(tmp_path, processor):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(file, "JPEG")
    whole = Undecoded(file.getvalue(), "whole.jpg", (64, 64))
    cut = Undecoded(file.getvalue()[:700], "cut.jpg", (64, 64))
    pictures = Pictures(processor.view)
    before = pictures([whole])
    with pytest.raises(ImageError, match="cut.jpg: truncated or damaged image"):
        pictures([whole, cut])
    assert torch.equal(pictures([whole])[0], before[0])


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--loader dali: nvidia-dali is not installed \(pip install 'vesalius\[dali\]'\)"):
        SFTConfig(output_dir=str(tmp_path), loader="dali")


def questions_of(folder, count=8):
    """A file of questions about PNG and JPEG images."""
    rows = []
    for i in range(count):
        name = f"{i}.{'png' if i % 2 else 'jpg'}"
        x, y = np.meshgrid(np.arange(90 + 7 * i), np.arange(60))
        Image.fromarray(np.stack([x + y, 2 * y, 255 - x], 2).astype(np.uint8)).save(folder / name)
        rows.append({"image": name, "question": "What is it?", "options": ["CT", "MRI", "X-ray"], "answer": "CT"})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "train.json"


@with_dali
@with_mini
@pytest.mark.parametrize("kind", ["sft", "grpo", "masks"])
def test_five_steps_are_those_without_it_and_resume_to_the_bit(model, tmp_path, kind):
    """On a CPU the pixels are the same; rounding of their normalised values is not."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-4}

    def trainer(name, loader):
        chosen = settings | {"loader": loader}
        if kind == "masks":
            torch.manual_seed(0)
            return test_masks.make_trainer(tmp_path / name, data=load_masked_questions(MINI / "prs_med", limit=8), **chosen)
        rows = load_questions(questions_of(tmp_path))
        for row in rows.records:
            row["text"] = row["answer"]
        if kind == "sft":
            return sft_run.make_trainer(model, tmp_path / name, data=rows, **chosen)
        return grpo_run.make_trainer(model, tmp_path / name, rows=rows, num_iterations=2, dynamic_sampling=True, **chosen)

    torchs = trainer("torch", "torch")
    torchs.train()
    dalis = trainer("dali", "dali")  # not before: what a trainer seeds is its own run's
    dalis.train()
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (torchs, dalis)]
    assert len(losses[0]) == 5 and losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    pictures = dalis.pictures.pictures
    assert all(one._pipeline for one in (pictures.values() if kind == "masks" else [pictures]))  # it has decoded
    resumed = trainer("resumed", "dali")
    resumed.train(resume_from_checkpoint=str(tmp_path / "dali" / "checkpoint-3"))
    for one, other in zip(dalis.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
