"""HAM10000's files become a folder that trains, split by lesion, and what is wrong with them is said."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.command.main import run_command
from engine.data.lesions import RECORD_KEYS, load_skin
from engine.data.starter.lesions import build_starter_skin
from engine.errors import InputError
from recipes.skin_prepare import main

LESIONS, IMAGES = 12, 20
BOX = (8, 10, 28, 30)


@pytest.fixture(autouse=True)
def rows(tmp_path, monkeypatch) -> list[list]:
    """HAM10000's layout: 20 images, in two folders, of 12 lesions; a square in each mask."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for folder in ("part_1", "part_2", "masks"):
        Path("HAM", folder).mkdir(parents=True)
    rows = []
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 256, (45, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"HAM/part_{1 + i % 2}/ISIC_{i:02d}.jpg")
        save_mask(i)
        rows.append(
            [f"HAM_{i % LESIONS}", f"ISIC_{i:02d}", ("nv", "mel", "bkl")[i % LESIONS % 3], "histo", "80.0", "male", "scalp"]
        )
    rows[3][4] = ""
    write(rows)
    return rows


def save_mask(number: int, box: tuple[int, int, int, int] = BOX, size: tuple[int, int] = (60, 45)) -> None:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    mask.save(f"HAM/masks/ISIC_{number:02d}_segmentation.png")


def write(rows: list[list]) -> None:
    with open("HAM/metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"], *rows])


def prepare(*flags: str, output: str = "out") -> dict:
    return main(["--metadata", "HAM/metadata.csv", "--output", output, *flags])


def read(name: str) -> list | dict:
    return json.loads(Path("out", name).read_text(), parse_constant=pytest.fail)


def test_records_are_in_the_published_format(rows):
    headline = prepare()
    assert (headline["train_rows"], headline["test_rows"], headline["bad_rows"]) == (16, 4, 0)
    records = read("ham10000_with_spatial_data.json")
    assert [record["image_id"] for record in records] == [row[1] for row in rows]
    assert all(tuple(record) == RECORD_KEYS for record in records)
    assert records[0] == {
        "lesion_id": "HAM_0",
        "image_id": "ISIC_00",
        "dx": "nv",
        "dx_type": "histo",
        "age": 80.0,
        "sex": "male",
        "localization": "scalp",
        "bbox": [8.0, 10.0, 28.0, 30.0],
        "area_coverage": 19 * 19 / (60 * 45),
        "spatial_description": "lesion located in center-center region",
        "mask_available": True,
    }
    assert records[3]["age"] is None
    table = list(csv.reader(Path("out/ham10000_with_spatial_data.csv").open()))
    assert tuple(table[0]) == RECORD_KEYS and len(table) == IMAGES + 1
    assert table[1][4] == "80.0" and table[1][7] == "[8.0, 10.0, 28.0, 30.0]" and table[1][10] == "True" and table[4][4] == ""


def test_the_folder_trains_and_holds_the_files_as_they_are():
    prepare()
    train, test = load_skin("out", question="box"), load_skin("out", split="test")
    assert (len(train), len(test)) == (16, 4) and train[0]["images"][0].size == (60, 45)
    assert train.record(0)["solution"].endswith("Its bounding box is [8, 10, 28, 30].") and Path(train.record(0)["mask"]).is_file()
    for folder, original in (("images", "part_1/ISIC_02.jpg"), ("masks", "masks/ISIC_02_segmentation.png")):
        assert Path("out", folder, Path(original).name).read_bytes() == Path("HAM", original).read_bytes()
    assert len(load_skin("out/ham10000_with_spatial_data.csv")) == IMAGES


def test_no_lesion_is_in_both_parts_and_those_of_an_image_split_are_counted():
    shares = set()
    for seed in range(5):
        headline = prepare("--seed", str(seed), "--overwrite")
        parts = [{record["lesion_id"] for record in read(f"{split}.json")} for split in ("train", "test")]
        assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == LESIONS
        assert headline["lesions_shared_by_image_split"] == len(read("report.json")["lesions_shared_by_image_split"])
        shares.add(frozenset(parts[1]))
        first = read("test.json")
    assert len(shares) > 1 and headline["lesions_shared_by_image_split"] > 0
    prepare("--seed", "4", "--overwrite")
    assert read("test.json") == first


def test_lesions_that_share_an_image_stay_together(rows):
    """The same pixels under ten names and lesions: with test_fraction 0.5 chance would part them."""
    for i in range(10):
        Path(f"HAM/part_{1 + i % 2}/ISIC_{i:02d}.jpg").write_bytes(Path("HAM/part_1/ISIC_00.jpg").read_bytes())
    prepare("--test_fraction", "0.5")
    parts = Counter(split for split in ("train", "test") for record in read(f"{split}.json") if record["image_id"] < "ISIC_10")
    assert len(parts) == 1


def test_rows_without_an_image_are_left_out_and_those_without_a_mask_kept():
    os.remove("HAM/part_1/ISIC_04.jpg")
    os.remove("HAM/masks/ISIC_07_segmentation.png")
    headline = prepare()
    assert (headline["missing_images"], headline["missing_masks"], headline["bad_rows"]) == (1, 1, 0)
    assert headline["train_rows"] + headline["test_rows"] == IMAGES - 1
    assert read("report.json")["missing_images"] == ["ISIC_04"] and read("report.json")["missing_masks"] == ["ISIC_07"]
    (record,) = [record for record in read("ham10000_with_spatial_data.json") if record["image_id"] == "ISIC_07"]
    nulls = {"bbox": None, "area_coverage": None, "spatial_description": None, "mask_available": False}
    assert {key: record[key] for key in nulls} == nulls
    table = list(csv.DictReader(Path("out/ham10000_with_spatial_data.csv").open()))
    assert [row["bbox"] for row in table if row["mask_available"] == "False"] == [""]


def damage(what: str, rows: list[list]) -> None:
    if what == "empty mask":
        save_mask(5, (0, 0, 0, 0))
    if what == "broken mask":
        Path("HAM/masks/ISIC_05_segmentation.png").write_bytes(b"\x89PNG")
    if what == "mask of another shape":
        save_mask(5, size=(60, 60))
    if what == "broken image":
        Path("HAM/part_2/ISIC_05.jpg").write_bytes(b"\xff\xd8\xff")
    if what == "dx":
        rows[5][2] = "wart"
    if what == "age":
        rows[5][4] = "old"
    if what == "again":
        rows[5][1] = "ISIC_04"
    if what == "lesion":
        rows[5][0] = " "
    if what == "cells":
        rows[5].append("more")
    write(rows)


@pytest.mark.parametrize(
    "what, line",
    [
        ("empty mask", "mask 'ISIC_05_segmentation.png' is empty (expected a whole JPEG or PNG image and a mask"),
        ("broken mask", "mask 'ISIC_05_segmentation.png': truncated or damaged image"),
        ("mask of another shape", "mask 'ISIC_05_segmentation.png' is 60 x 60, its image 60 x 45 (expected"),
        ("broken image", "image 'ISIC_05.jpg': truncated or damaged image"),
        ("dx", "dx 'wart' (expected one of akiec, bcc, bkl, df, mel, nv, vasc; rows count from 0)"),
        ("age", "age 'old' (expected years, or nothing; rows count from 0)"),
        ("again", "image_id 'ISIC_04' again (expected each image once; rows count from 0)"),
        ("lesion", "empty lesion_id (expected lesion_id to be filled; rows count from 0)"),
        (
            "cells",
            "8 cells (expected 7, as the header has: text with a separator in it stands in double quotes; rows count from 0)",
        ),
    ],
)
def test_bad_rows_stop_the_command_or_are_listed(rows, what, line):
    damage(what, rows)
    with pytest.raises(InputError) as error:
        prepare()
    said = str(error.value).replace("row 5, line 7: ", "row 5: ")  # of what a table alone shows
    assert said.startswith(f"HAM/metadata.csv: row 5: {line}") and "\n" not in said
    assert not Path("out").exists() and not list(Path().glob(".out*"))
    assert prepare("--on_bad_row", "skip")["bad_rows"] == 1
    assert read("report.json")["bad_rows"] == [str(error.value)]
    assert len(read("ham10000_with_spatial_data.json")) == IMAGES - 1


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--metadata", "HAM/metadata.csv"], "--output is missing"),
        (["--output", "out"], "--metadata is missing: the CSV file with the columns lesion_id,image_id,dx,"),
        (["--metadata", "gone.csv", "--output", "out"], "gone.csv: cannot be read: No such file"),
        (
            ["--metadata", "wrong.csv", "--output", "out"],
            "wrong.csv: no column lesion_id, dx_type, age, sex, localization (expected",
        ),
        (
            ["--metadata", "HAM/metadata.csv", "--output", "out", "--images", "gone"],
            "gone: no such folder (expected one of images)",
        ),
        (["--metadata", "HAM/metadata.csv", "--output", "out", "--masks", "gone"], "gone: no such folder (expected one of masks)"),
        (
            ["--metadata", "HAM/metadata.csv", "--output", "out", "--images", "HAM/masks"],
            "HAM/metadata.csv: no row is left; the first: no image",
        ),
        (
            ["--metadata", "HAM/metadata.csv", "--output", "out", "--test_fraction", "1"],
            "--test_fraction 1.0: expected a number, more than",
        ),
        (["--metadata", "HAM/metadata.csv", "--output", "out", "--test_fraction", "0.01"], "HAM/metadata.csv: no lesion for test"),
        (["--metadata", "HAM/metadata.csv", "--output", "HAM"], "HAM: exists already (--overwrite replaces it)"),
        (["--metadata", "HAM/metadata.csv", "--output", "HAM", "--overwrite"], "HAM: was not made by this command"),
    ],
)
def test_what_cannot_be_used_is_one_line(flags, line):
    Path("wrong.csv").write_text("image_id,dx\n")
    with pytest.raises(InputError) as error:
        main(flags)
    assert str(error.value).startswith(line.replace("HAM: ", f"{Path('HAM').absolute()}: ")) and "\n" not in str(error.value)


def test_images_and_masks_may_be_named_apart():
    flags = ["--images", "HAM/part_1", "HAM/part_2", "--masks", "HAM/masks"]
    assert prepare(*flags)["missing_masks"] == 0
    assert prepare("--images", "HAM/part_1", output="half")["missing_images"] == IMAGES // 2


@pytest.mark.parametrize("flags", [(), ("--masks", "HAM/GroundTruth")])
def test_masks_named_like_their_images_are_masks(flags):
    """They lie in a folder that sorts before the images'."""
    Path("HAM/GroundTruth").mkdir()
    for path in sorted(Path("HAM/masks").iterdir()):
        path.rename(Path("HAM/GroundTruth", path.name.replace("_segmentation", "")))
    headline = prepare(*flags)
    assert (headline["train_rows"], headline["test_rows"], headline["missing_masks"]) == (16, 4, 0)
    for i in range(IMAGES):
        assert Path(f"out/images/ISIC_{i:02d}.jpg").read_bytes() == Path(f"HAM/part_{1 + i % 2}/ISIC_{i:02d}.jpg").read_bytes()
        assert Image.open(f"out/masks/ISIC_{i:02d}_segmentation.png").getbbox() == BOX


def test_a_mask_alone_is_no_image():
    Path("HAM/part_2/ISIC_05.jpg").unlink()
    Path("HAM/masks/ISIC_05_segmentation.png").rename("HAM/masks/ISIC_05.png")
    with pytest.raises(InputError, match="row 5.*: image 'ISIC_05.png' is black and white: a mask and no image"):
        prepare()
    assert not Path("out").exists()


def test_parts_of_a_mask_are_united_and_counted():
    save_mask(5, (40, 5, 44, 9))
    Path("HAM/masks/ISIC_05_segmentation.png").rename("HAM/masks/ISIC_05_segmentation_1.png")
    save_mask(5)
    assert prepare()["united_masks"] == 1 and read("report.json")["united_masks"] == ["ISIC_05"]
    assert Image.open("out/masks/ISIC_05_segmentation.png").getbbox() == (8, 5, 44, 30)


def test_what_is_written_is_upright_and_black_and_white():
    """So that the published scripts, which know of neither, read it right."""
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.open("HAM/part_1/ISIC_02.jpg").convert("RGB")
    image.rotate(180).save("HAM/part_1/ISIC_02.jpg", exif=exif, quality=100, subsampling=0)
    for number, levels in ((2, {255: 1}), (3, {255: 0, 0: 1})):
        path = Path(f"HAM/masks/ISIC_{number:02d}_segmentation.png")
        Image.open(path).point(lambda level, levels=levels: levels.get(level, 0)).save(path)
    prepare("--mask_values", "1-255", "--on_bad_row", "skip")
    with Image.open("out/images/ISIC_02.jpg") as written:
        assert np.abs(np.asarray(written).astype(int) - np.asarray(image)).mean() < 6
    assert set(np.unique(Image.open("out/masks/ISIC_02_segmentation.png"))) == {0, 255}
    (record,) = [record for record in read("ham10000_with_spatial_data.json") if record["image_id"] == "ISIC_02"]
    assert record["bbox"] == [8.0, 10.0, 28.0, 30.0]


def test_a_black_lesion_is_unclear_and_mask_values_decides():
    path = Path("HAM/masks/ISIC_05_segmentation.png")
    Image.open(path).point(lambda level: 255 - level).save(path)
    with pytest.raises(InputError, match="row 5.*: mask 'ISIC_05_segmentation.png': it has the values 0 and 255, .*--mask_values"):
        prepare()


def test_a_folder_that_holds_what_is_read_is_not_replaced():
    prepare()
    Path("link").symlink_to("out")
    for flags in (["--images", "out/images"], ["--images", "link/images", "--masks", "HAM/masks"]):
        with pytest.raises(InputError, match="--output .*out: holds what --images names"):
            prepare("--overwrite", *flags)
    assert len(list(Path("out/images").iterdir())) == IMAGES


def test_the_command_ends_with_one_line_of_json(capfd):
    run_command(main, ["--metadata", "HAM/metadata.csv", "--output", "out"])
    printed = capfd.readouterr()
    assert json.loads(printed.out)["train_rows"] == 16 and printed.out.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        run_command(main, ["--metadata", "HAM/metadata.csv", "--output", "out"])
    printed = capfd.readouterr()
    assert end.value.code == 2 and printed.out == "" and printed.err.endswith("exists already (--overwrite replaces it)\n")


def test_with_no_flags_drawn_lesions_are_made_once_and_lie_in_their_boxes():
    headline = main([])
    folder = build_starter_skin()
    assert headline["output"] == str(folder) and headline["bad_rows"] == headline["missing_masks"] == 0
    written = (folder / "train.json").stat().st_mtime_ns
    assert main([]) == headline and (folder / "train.json").stat().st_mtime_ns == written
    assert not list(folder.parent.glob(f".{folder.name}.*"))
    train, test = load_skin(folder, question="box"), load_skin(folder, split="test")
    assert (len(train), len(test)) == (headline["train_rows"], headline["test_rows"])
    assert len({row["dx"] for row in test.records}) == 7 and len({row["spatial_description"] for row in test.records}) == 9
    for row in train.select(range(0, len(train), 10)):
        x1, y1, x2, y2 = map(int, row["bbox"])
        mask = np.asarray(Image.open(row["mask"])) > 0
        assert mask[y1:y2, x1:x2].sum() == mask.sum() > 100 and row["images"][0].size == mask.shape


def test_real_images_are_prepared(mini_data):
    root = mini_data / "ham10000_mini"
    headline = main(["--metadata", str(root / "HAM10000_metadata.csv"), "--output", "out"])
    assert (headline["train_rows"], headline["test_rows"]) == (27, 7)
    assert headline["missing_images"] == headline["missing_masks"] == headline["bad_rows"] == 0
    for row in load_skin("out", boxes_only=True).records:
        mask = np.asarray(Image.open(row["mask"]).convert("L")) > 0
        x1, y1, x2, y2 = map(int, row["bbox"])
        inside = mask[y1:y2, x1:x2]
        assert (
            inside.sum() > 0.9 * mask.sum() and inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        )


@pytest.mark.parametrize("separator, name", [("\t", "metadata.tab"), (";", "metadata.csv"), ("\t", "metadata.tsv")])
def test_the_metadata_may_be_separated_otherwise(rows, separator, name):
    expected = prepare()
    table = Path("HAM/metadata.csv").read_text().replace(",", separator)
    Path("HAM/metadata.csv").unlink()
    Path("HAM", name).write_text(table.replace("image_id", "Image_ID"))
    made = main(["--metadata", f"HAM/{name}", "--output", "other"])
    assert {**made, "output": ""} == {**expected, "output": ""} and made["bad_rows"] == 0
    assert Path("other/train.json").read_bytes() == Path("out/train.json").read_bytes()
