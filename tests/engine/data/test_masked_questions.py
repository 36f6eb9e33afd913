"""Every form of the published CSV is read, and whatever cannot be used is one line."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.data.masked_questions import COLUMNS, check_data_root, load_masked_questions
from engine.errors import InputError

SIZE = (24, 20)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """A data root with one image in the published form of each kind: masks named, images named, ISIC."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    draw("breast_tumors_ct_scan/train_images/benign (1).png", "breast_tumors_ct_scan/train_masks/benign (1).png")
    draw("head_and_neck/test_images/0204_channel_08.png", "head_and_neck/test_masks/0204_channel_08.png")
    draw("skin_rgbimage/val_images/ISIC_0000000.jpg", "skin_rgbimage/val_masks/ISIC_0000000_Segmentation.png")
    return tmp_path / "root"


def draw(image: str | None, mask: str | None, size=SIZE, mask_size=None, value: int = 255) -> None:
    random = np.random.default_rng(0)
    for name in filter(None, (image, mask)):
        Path("root", name).parent.mkdir(parents=True, exist_ok=True)
    if image:
        Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(Path("root", image))
    if mask:
        width, height = mask_size or size
        pixels = np.zeros((height, width), np.uint8)
        pixels[: height // 2, : width // 2] = value
        Image.fromarray(pixels).save(Path("root", mask))


def row(path: str, split: str = "train", **cells) -> dict:
    filled = {"image_path": path, "image_name": Path(path).name, "question": "Where, exactly?", "answer": "Top left."}
    return {**filled, "position": "top left", "split": split, **cells}


def write(name: str, *rows: dict, columns=COLUMNS) -> str:
    path = Path("root/annotations", f"{name}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


BREAST = row("breast_tumors_ct_scan/train_masks/benign (1).png")
HEAD = row("head_and_neck/test_images/0204_channel_08.png", "test")
SKIN = row("skin_rgbimage/val_masks/ISIC_0000000_Segmentation.png", "val")


def test_a_path_may_name_the_mask_or_the_image(root):
    write("breast_tumors_ct_scan", BREAST)
    write("head_and_neck", HEAD)
    write("skin_rgbimage", SKIN)
    rows = load_masked_questions(root, split=None)
    assert [(r["dataset"], r["label"], r["split"]) for r in rows.records] == [
        ("breast_tumors_ct_scan", 1, "train"),
        ("head_and_neck", None, "test"),
        ("skin_rgbimage", 4, "val"),
    ]
    for i in range(3):
        found = rows[i]
        assert found["image"].mode == "RGB" and found["mask"].mode == "L" and found["image"].size == found["mask"].size == SIZE
        assert np.asarray(found["image"]).std() > 20  # never the mask itself
        assert np.unique(np.asarray(found["mask"])).tolist() == [0, 255] and np.asarray(found["mask"])[0, 0] == 255
    assert rows.record(0)["image_id"] == "breast_tumors_ct_scan/train_images/benign (1).png"
    assert (rows.record(1)["question"], rows.record(1)["row"]) == ("Where, exactly?", 0)
    assert rows.record(2)["source"].endswith("skin_rgbimage.csv")


def test_an_image_path_of_isic_and_windows_separators_are_understood(root):
    path = write("skin_rgbimage", row("skin_rgbimage\\val_images\\ISIC_0000000.jpg", "val"))
    (found,) = load_masked_questions(root, path, split="val")
    assert found["mask"].size == SIZE and found["label"] == 4


def test_the_label_comes_from_the_set_and_not_from_the_path_of_the_root(root, tmp_path):
    root.rename(tmp_path / "brain_tumors_ct_scan")
    path = write("other", HEAD)
    Path(path).rename(tmp_path / "other.csv")
    (found,) = load_masked_questions(tmp_path / "brain_tumors_ct_scan", "other.csv", split="test")
    assert found["label"] is None


def test_annotation_files_are_found_by_list_by_folder_and_from_the_root(root):
    first, second = write("breast_tumors_ct_scan", BREAST), write("b", BREAST, BREAST)
    assert len(load_masked_questions(root, f"{first}, {second}")) == 3
    assert len(load_masked_questions(root, "annotations/b.csv")) == 2
    assert len(load_masked_questions(root, [Path(second)])) == 2
    assert len(load_masked_questions(root)) == len(load_masked_questions(root, Path("annotations"))) == 3
    assert len(load_masked_questions(root, limit=2)) == 2 and len(load_masked_questions(root).select([2, 0])) == 2


def test_masks_are_binary_whatever_their_values_and_follow_the_images_size(root):
    draw("prostate/train_images/a.png", "prostate/train_masks/a.png", value=1)
    draw("prostate/train_images/b.png", "prostate/train_masks/b.png", value=200, mask_size=(48, 40))
    write("prostate", row("prostate/train_masks/a.png"), row("prostate/train_masks/b.png"))
    for found in load_masked_questions(root):
        mask = np.asarray(found["mask"])
        assert mask.shape == SIZE[::-1] and (mask == 255).sum() == SIZE[0] * SIZE[1] / 4 and set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize(
    "bad, reason",
    [
        (row("../../etc/train_masks/x.png"), "image_path '../../etc/train_masks/x.png' leaves"),
        (row("a/../../train_masks/x.png"), "leaves"),
        (row("/etc/train_masks/x.png"), "leaves"),
        (row("breast_tumors_ct_scan/x.png"), "is in no folder of images or masks (expected <set>/<split>_masks/<file> or"),
        (row("a/train_masks/gone.png"), "mask 'a/train_masks/gone.png': no such file"),
        (row("lung_CT/train_masks/only.png"), "image 'lung_CT/train_images/only.png': no such file"),
        (row("breast_tumors_ct_scan/train_masks/benign (1).png", question=" "), "empty question"),
        (row("breast_tumors_ct_scan/train_masks/benign (1).png", split="dev"), "split 'dev' (expected one of train, val, test"),
        (
            row("lung_CT/train_masks/odd.png"),
            "mask 'odd.png' is 20 x 20, its image 24 x 20 (expected an image and a mask of one shape",
        ),
        (row("lung_CT/train_masks/cut.png"), "image 'cut.png': truncated or damaged image"),
        (row("lung_CT/train_masks/text.png"), "mask 'text.png': not an image of a known kind"),
    ],
)
def test_a_bad_row_is_one_line_and_can_be_skipped(root, bad, reason):
    draw(None, "lung_CT/train_masks/only.png")
    draw("lung_CT/train_images/odd.png", "lung_CT/train_masks/odd.png", mask_size=(20, 20))
    draw("lung_CT/train_images/cut.png", "lung_CT/train_masks/cut.png")
    cut = Path("root/lung_CT/train_images/cut.png")
    cut.write_bytes(cut.read_bytes()[:-300])
    draw("lung_CT/train_images/text.png", "lung_CT/train_masks/text.png")
    Path("root/lung_CT/train_masks/text.png").write_text("no image")
    path = write("lung_CT", BREAST, bad)
    with pytest.raises(InputError) as error:
        load_masked_questions(root, path)
    line = str(error.value)
    assert (
        re.match(re.escape(str(path)) + r": row 1(, line 3)?: ", line)
        and reason in line
        and "\n" not in line
        and "rows count from 0" in line
    )
    rows = load_masked_questions(root, path, on_bad_row="skip")
    assert len(rows) == 1 and rows.skipped == [line]


@pytest.mark.parametrize("ending", ["", "_mask", "_Segmentation", "_seg", "-segmentation", "_lesion", "_label", "_gt", "_mask_1"])
@pytest.mark.parametrize("folder", ["", "patient 1/", "a/b/"])
def test_masks_are_found_by_every_known_ending_and_in_folders(root, ending, folder):
    image, mask = f"lung_CT/train_images/{folder}x.jpg", f"lung_CT/train_masks/{folder}x{ending}.png"
    draw(image, mask)
    for path in (image, mask):
        found = load_masked_questions(root, write("lung_CT", row(path)))
        assert (
            found.record(0)["image_id"] == image and found.record(0)["dataset"] == "lung_CT" and np.asarray(found[0]["mask"]).any()
        )


def test_masks_of_one_image_are_united_unless_each_has_a_row(root):
    draw("busi/train_images/x.png", "busi/train_masks/x_mask.png")
    draw(None, "busi/train_masks/x_mask_1.png")
    Image.open("root/busi/train_masks/x_mask.png").rotate(180).save("root/busi/train_masks/x_mask_1.png")
    first, second = (row(f"busi/train_masks/x_mask{number}.png") for number in ("", "_1"))
    for path in (first, second, row("busi/train_images/x.png")):
        assert (np.asarray(load_masked_questions(root, write("busi", path))[0]["mask"]) > 0).mean() == 0.5
    rows = load_masked_questions(root, write("busi", first, second))
    assert [np.asarray(found["mask"])[0, 0] for found in rows] == [255, 0]
    assert check_data_root(root, write("busi", first))["united_masks"] == 1


def test_two_masks_of_one_image_that_are_no_parts_are_a_bad_row(root):
    draw("lung_CT/train_images/x.jpg", "lung_CT/train_masks/x_mask.png")
    draw(None, "lung_CT/train_masks/x_seg.png")
    with pytest.raises(InputError, match=r"x_mask.png and x_seg.png could each be the mask of 'x'"):
        load_masked_questions(root, write("lung_CT", row("lung_CT/train_images/x.jpg")))


def test_an_unclear_mask_is_a_bad_row_and_mask_values_decides(root):
    draw("lung_CT/train_images/x.png", "lung_CT/train_masks/x.png", value=1)
    with Image.open("root/lung_CT/train_masks/x.png") as mask:
        mask.paste(2, (0, 0, 6, 6))
        mask.save("root/lung_CT/train_masks/x.png")
    path = write("lung_CT", row("lung_CT/train_masks/x.png"))
    with pytest.raises(
        InputError, match=r"mask 'x.png': it has the values 0, 1 and 2, which .*: --mask_values says which"
    ) as error:
        load_masked_questions(root, path)
    assert "\n" not in str(error.value)
    sizes = {
        text: (np.asarray(load_masked_questions(root, path, mask_values=text)[0]["mask"]) > 0).sum() for text in ("1", "2", "1,2")
    }
    assert sizes == {"1": 120 - 36, "2": 36, "1,2": 120}
    with pytest.raises(InputError, match="--mask_values x: expected values"):
        load_masked_questions(root, path, mask_values="x")


def test_an_unquoted_comma_is_a_bad_row(root):
    path = write("a", BREAST)
    with open(path, "a") as file:
        file.write("a,b,where, please,c,d,train\n")
    with pytest.raises(
        InputError, match=r"a.csv: row 1, line 3: 7 cells \(expected 6, as the header has: text with a separator in it stands in"
    ):
        load_masked_questions(root, path)


def test_files_that_cannot_be_used_are_one_line(root):
    path = write("a", BREAST)
    write("b", columns=("image_path", "question"))
    Path("root/latin.csv").write_bytes("image_path,frage\nä".encode("latin-1"))
    for argument, message in {
        "gone.csv": "gone.csv: no such file (expected an annotation CSV, from here or from",
        "annotations/b.csv": "no column answer, position, split (expected the columns image_path,",
        "latin.csv": "latin.csv: not UTF-8 text",
    }.items():
        with pytest.raises(InputError) as error:
            load_masked_questions(root, argument)
        assert message in str(error.value)
    with pytest.raises(InputError, match=r"no rows of the split 'test' \(the files have 1 of train\)"):
        load_masked_questions(root, path, split="test")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_masked_questions("nowhere")
    with pytest.raises(InputError, match="split 'dev'"):
        load_masked_questions(root, split="dev")
    with pytest.raises(InputError, match=r"all 1 rows are bad; the first: .*a.csv: row 0, line 2: image .* no such file"):
        Path("root/breast_tumors_ct_scan/train_images/benign (1).png").unlink()
        load_masked_questions(root, path, on_bad_row="skip")


def test_a_data_root_is_checked_as_a_whole(root):
    write("breast_tumors_ct_scan", BREAST, row("breast_tumors_ct_scan/test_masks/gone.png", "test"))
    write("head_and_neck", HEAD)
    report = check_data_root(root)
    assert report["sets"] == {"breast_tumors_ct_scan": {"train": 1}, "head_and_neck": {"test": 1}}
    assert report["missing_sets"] == [
        "brain_tumors_ct_scan",
        "lung_CT",
        "lung_Xray",
        "skin_rgbimage",
        "polyp_endoscopy",
        "prostate",
    ]
    assert report["missing_files"] == ["breast_tumors_ct_scan/test_masks/gone.png"] and len(report["bad_rows"]) == 1


def test_the_real_data_are_read_whole(mini_data):
    rows = load_masked_questions(mini_data / "prs_med", split=None)
    assert len(rows) == 73 and not rows.skipped and {record["label"] for record in rows.records} == {0, 1, 4, 5}
    for record in rows.records:
        assert record["split"] in record["image_id"]
    skin = next(i for i, record in enumerate(rows.records) if record["label"] == 4)
    assert rows[skin]["image_id"].endswith(".jpg") and np.asarray(rows[skin]["mask"]).any()
