"""Images and masks become a set that loads, and data roots are checked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.command.main import run_command
from engine.data.masked_questions import load_masked_questions
from engine.data.positions import locate, read_positions, same_places
from engine.errors import InputError
from recipes.prs_med_prepare import main

COUNT = 20


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Path:
    """Twenty images and masks in different formats, two slices a patient."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("images/deep", "masks/deep"):
        Path(name).mkdir(parents=True)
    for i in range(COUNT):
        name, ending = f"deep/{i // 2:02d}_{i % 2}", ".jpg" if i % 3 else ".bmp"
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(f"images/{name}{ending}")
        save_mask(f"masks/{name}_mask.png", random.integers(0, 32), random.integers(0, 40))
    return tmp_path


def save_mask(path: str, y: int, x: int) -> None:
    mask = np.zeros((40, 48), np.uint8)
    mask[y : y + 8, x : x + 8] = 1
    Image.fromarray(mask).save(path)


def prepare(*flags: str, name: str = "mine") -> dict:
    flags = ["--images", "images", "--masks", "masks", "--modality", "chest, CT slice", "--finding", "nodule", *flags]
    return main(["--data_root", "root", "--dataset", name, *flags])


@pytest.mark.parametrize("rule", ["prs-med", "our-dataset"])
def test_what_is_made_loads_and_says_what_the_masks_show(rule):
    headline = prepare("--rule", rule)
    assert [headline[f"{split}_rows"] for split in ("train", "val", "test")] == [14, 2, 4] and headline["left_out"] == 0
    rows = load_masked_questions("root", split=None)
    for row in rows:
        truth = locate(np.asarray(row["mask"]), rule)
        assert same_places(truth, read_positions(row["answer"])) and same_places(truth, read_positions(row["position"]))
        assert "nodule" in row["question"] + row["answer"] and row["dataset"] == "mine" and row["label"] is None
        original = next(Path("images/deep").glob(Path(row["image_id"]).stem.removeprefix("deep_") + ".*"))
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(original).convert("RGB")))
    questions = {split: {r["question"] for r in rows.records if r["split"] == split} for split in ("train", "test")}
    assert not questions["train"] & questions["test"]
    report = json.loads(Path("root/mine/report.json").read_text())
    assert sum(report["places"]["test"].values()) == 4 and report["options"]["rule"] == rule
    shares = [count for places in report["places"].values() for place, count in places.items() if place == headline["majority"]]
    assert headline["majority_share"] == sum(shares) / COUNT


def test_the_same_seed_makes_the_same_files():
    prepare(name="a")
    prepare(name="b")
    prepare("--seed", "7", name="c")
    texts = [Path(f"root/annotations/{name}.csv").read_text().replace(f"{name}/t", "x/t") for name in "abc"]
    assert texts[0].replace("a/val", "x/val") == texts[1].replace("b/val", "x/val") != texts[2]


def test_slices_of_a_patient_and_equal_images_stay_together(folders):
    Image.open("images/deep/00_0.bmp").save("images/copy.png")
    save_mask("masks/copy.png", 0, 0)
    prepare("--group", r"deep/(\d+)_")
    by_patient = {}
    for record in load_masked_questions("root", split=None).records:
        by_patient.setdefault(re.search(r"(\d+)_|copy", record["image_id"])[0], set()).add(record["split"])
    assert len(by_patient) == 11 and all(len(splits) == 1 for splits in by_patient.values())
    prepare(name="plain")
    splits = {
        Path(r["image_id"]).stem: r["split"] for r in load_masked_questions("root", "annotations/plain.csv", split=None).records
    }
    assert splits["copy"] == splits["deep_00_0"]


def test_empty_and_missing_masks_are_left_out_and_listed():
    save_mask("masks/deep/00_0_mask.png", 40, 48)
    Path("masks/deep/00_1_mask.png").unlink()
    assert prepare()["left_out"] == 2
    lines = json.loads(Path("root/mine/report.json").read_text())["left_out"]
    assert "00_1.jpg: no mask of this name" in lines[0] and "00_0_mask.png: empty mask, no position" in lines[1]


def test_a_damaged_image_stops_or_is_left_out():
    Path("images/deep/03_0.bmp").write_bytes(b"BM")
    with pytest.raises(InputError, match=r"03_0.bmp.*truncated or damaged"):
        prepare()
    assert not list(Path("root").glob("*")) or not Path("root/mine").exists()
    assert prepare("--on_bad_row", "skip")["left_out"] == 1


def test_images_and_masks_may_share_a_folder():
    for path in Path("masks/deep").iterdir():
        path.rename(Path("images/deep") / path.name)
    assert main(["--data_root", "root", "--dataset", "one", "--images", "images", "--masks", "images"])["train_rows"] == 14


def test_parts_of_a_mask_are_united_and_counted():
    """BUSI: x.png, x_mask.png, x_mask_1.png, here for five images, in one folder."""
    for path in Path("masks/deep").iterdir():
        path.rename(Path("images/deep") / path.name)
    for i in range(5):
        save_mask(f"images/deep/{i:02d}_0_mask_1.png", 30, 2)
    headline = main(["--data_root", "root", "--dataset", "busi", "--images", "images", "--masks", "images"])
    assert (headline["united_masks"], headline["left_out"]) == (5, 0)
    united = json.loads(Path("root/busi/report.json").read_text())["united_masks"]
    rows = load_masked_questions("root", split=None)
    for record, pair in zip(rows.records, rows.handles, strict=True):
        parts = Path("images/deep", Path(record["image_id"]).stem.removeprefix("deep_"))
        masks = [
            np.asarray(Image.open(f"{parts}_mask{number}.png"))
            for number in ("", "_1")
            if Path(f"{parts}_mask{number}.png").exists()
        ]
        assert np.array_equal(np.asarray(pair.open()[1]) > 0, np.any(masks, axis=0))
        assert (len(masks) == 2) == (f"{record['image_id'].replace('_images', '_masks')}" in united)


@pytest.mark.parametrize("rule", ["prs-med", "our-dataset"])
@pytest.mark.parametrize("ending", ["_mask", "_seg", "_segmentation", "_lesion", "_mask_1"])
@pytest.mark.parametrize("folder", ["", "patient/"])
def test_what_is_prepared_is_what_training_reads(rule, ending, folder):
    for split in ("train", "test"):
        for i in range(3):
            for kind in ("images", "masks"):
                Path(f"root/s/{split}_{kind}/{folder}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 40), (i, 0, 99 * (split == "test"))).save(f"root/s/{split}_images/{folder}{i}.png")
            save_mask(f"root/s/{split}_masks/{folder}{i}{ending}.png", 2 + i, 3)
    headline = main(["--data_root", "root", "--dataset", "s", "--rule", rule])
    assert (headline["train_rows"], headline["test_rows"], headline["left_out"]) == (3, 3, 0)
    assert [len(load_masked_questions("root", split=split)) for split in ("train", "test")] == [3, 3]
    assert main(["--data_root", "root"])["bad_rows"] == 0


def test_labels_that_touch_stop_the_command_and_mask_values_decides():
    mask = np.zeros((40, 48), np.uint8)
    mask[4:24, 4:24], mask[8:14, 8:14] = 1, 2
    Image.fromarray(mask).save("masks/deep/00_0_mask.png")
    with pytest.raises(InputError, match="00_0_mask.png.*it has the values 0, 1 and 2, .*--mask_values"):
        prepare()
    assert not Path("root/mine").exists()
    assert prepare("--on_bad_row", "skip", name="without")["left_out"] == 1
    assert prepare("--mask_values", "2", name="inner")["left_out"] == COUNT - 1
    (row,) = load_masked_questions("root", "annotations/inner.csv", split=None)
    assert np.array_equal(np.asarray(row["mask"]) > 0, mask == 2)


def test_what_is_written_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open("images/deep/00_1.jpg").convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_90).save("images/deep/00_1.jpg", exif=exif, quality=100, subsampling=0)
    prepare()
    (written,) = Path("root/mine").glob("*_images/deep_00_1.png")
    with Image.open(written) as image:
        assert image.size == (48, 40) and np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 3


def test_a_report_does_not_replace_what_is_read(tmp_path):
    prepare()
    Path("link.json").symlink_to("root/annotations/mine.csv")
    before = Path("root/annotations/mine.csv").read_text()
    with pytest.raises(InputError, match="--report link.json: is the file that --ann_paths names"):
        main(["--data_root", "root", "--report", "link.json"])
    assert Path("root/annotations/mine.csv").read_text() == before


def test_split_folders_that_are_there_are_annotated():
    for split, names in {"train": ["00_0", "00_1", "01_0"], "test": ["02_0"]}.items():
        for kind in ("images", "masks"):
            Path(f"root/head/{split}_{kind}").mkdir(parents=True)
        for name in names:
            image = next(Path("images/deep").glob(f"{name}.*"))
            image.rename(f"root/head/{split}_images/{image.name}")
            Path(f"masks/deep/{name}_mask.png").rename(f"root/head/{split}_masks/{name}.png")
    headline = main(["--data_root", "root", "--dataset", "head", "--rule", "our-dataset"])
    assert (headline["train_rows"], headline["test_rows"]) == (3, 1)
    assert "head/train_images/" in Path("root/annotations/head.csv").read_text()
    assert len(load_masked_questions("root")) == 3


def test_a_data_root_is_checked(mini_data, tmp_path):
    headline = main(["--data_root", str(mini_data / "prs_med")])
    assert headline["missing_sets"] == ["lung_CT", "lung_Xray"] and headline["bad_rows"] == headline["missing_files"] == 0
    assert headline["sets"]["polyp_endoscopy"] == {"train": 4, "test": 1}
    prepare()
    next(Path("root/mine/train_masks").iterdir()).unlink()
    headline = main(["--data_root", "root", "--report", "report.json"])
    assert (headline["missing_files"], headline["bad_rows"]) == (1, 1)
    assert "no such file" in json.loads(Path("report.json").read_text())["bad_rows"][0]


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--images", "images"], "--dataset is missing"),
        (["--dataset", "a"], "--data_root is missing"),
        (["--data_root", "root", "--dataset", "a", "--masks", "m"], "--images is missing"),
        (["--data_root", "root", "--dataset", "../a", "--images", "images"], "--dataset '../a': expected a name"),
        (["--data_root", "root", "--dataset", "a", "--images", "gone"], "gone: no such folder (expected one of images)"),
        (["--data_root", "root", "--dataset", "a", "--images", "masks"], "masks: no image with a mask"),
        (
            ["--data_root", "root", "--dataset", "a", "--images", "images", "--masks", "images"],
            "images: no image with a mask (expected masks in images of the same name, or ending in _mask, _masks, _seg, ",
        ),
        (
            ["--data_root", "root", "--dataset", "a", "--images", "images", "--mask_values", "x"],
            "--mask_values x: expected values (1",
        ),
        (["--data_root", "root", "--dataset", "a"], "no split folders"),
        (
            ["--data_root", "root", "--dataset", "a", "--fractions", "1,1,1"],
            "--fractions 1,1,1: expected three fractions whose sum",
        ),
        (["--data_root", "root", "--dataset", "a", "--group", "("], "--group (: not a regular expression"),
        (["--data_root", "gone"], "gone: no such folder (expected a data root"),
    ],
)
def test_bad_arguments_are_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(main, flags)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and line in err.splitlines()[-1] and "Traceback" not in err


def test_nothing_is_replaced():
    prepare()
    with pytest.raises(InputError, match=r"mine.csv: exists already"):
        prepare()
    Path("root/annotations/mine.csv").unlink()
    with pytest.raises(InputError, match="root/mine: exists already"):
        prepare()


def test_what_systems_leave_beside_images_is_no_image():
    for folder in ("images/deep", "masks/deep", "images/__MACOSX/deep", "images/.ipynb_checkpoints"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in ("._00_0.png", "._00_0_mask.png", ".DS_Store", "Thumbs.db"):
            Path(folder, name).write_bytes(b"\0\5\x16\7")
    Image.new("RGB", (48, 40)).save("images/.ipynb_checkpoints/00_0-checkpoint.png")
    assert prepare()["left_out"] == 0
    Path("root/annotations/._mine.csv").write_bytes(b"\0\5\x16\7")
    assert len(load_masked_questions("root", split=None)) == COUNT
