"""SA-Med2D-20M's names say what they mean, and other names are none."""

import json

import pytest

from engine.data.mecovqa.samed2d import SAMed2DName, class_of, family, read_classes, read_index, read_name
from engine.errors import InputError


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ct_00--CAD_PE--001--x_0125--0000_002.png", SAMed2DName("ct_00", "CAD_PE", "001", "x_0125", "0000", 2)),
        ("images/ct_00--CAD_PE--001--x_0125", SAMed2DName("ct_00", "CAD_PE", "001", "x_0125")),
        ("masks\\x_ray--covid--a--2d_none--0001_000.PNG", SAMed2DName("x_ray", "covid", "a", "2d_none", "0001", 0)),
        ("mr_t1--BraTS--a--b--z_0003.png", SAMed2DName("mr_t1", "BraTS", "a--b", "z_0003")),
        ("mr_t1--BraTS--a--b--z_0003--0010_011.png", SAMed2DName("mr_t1", "BraTS", "a--b", "z_0003", "0010", 11)),
        ("x_ray--a--v1.2--2d_none.png", SAMed2DName("x_ray", "a", "v1.2", "2d_none")),
        ("ct_00--a--0000_002.png", None),
        ("ct_00----001--x_0125.png", None),
        ("photo.png", None),
        ("", None),
    ],
)
def test_names_are_read(name, expected):
    assert read_name(name) == expected


def test_the_name_of_a_mask_has_that_of_its_image():
    mask, image = read_name("ct_00--CAD_PE--001--x_0125--0000_002.png"), read_name("ct_00--CAD_PE--001--x_0125.png")
    assert mask.image == image.image == "ct_00--CAD_PE--001--x_0125"


def test_prefixes_have_families():
    prefixes = {"ct_00": "CT", "mr_flair": "MR", "x_ray": "X-ray", "fundus_photography": "Fundus photography", "eeg_1": "eeg"}
    assert {prefix: family(prefix) for prefix in prefixes} == prefixes and family(None) == "unknown"


def test_the_mapping_names_the_class_of_a_mask(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"CAD_PE": {"pulmonary embolism": "0000"}}))
    classes = read_classes(path)
    assert class_of(read_name("ct_00--CAD_PE--001--x_0125--0000_002.png"), classes) == "pulmonary embolism"
    assert class_of(read_name("ct_00--CAD_PE--001--x_0125--0001_002.png"), classes) is None
    assert class_of(read_name("ct_00--other--001--x_0125--0000_002.png"), classes) is None


def test_files_of_another_form_are_one_line(tmp_path):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"images/a.png": ["masks/a.png"]}))
    assert read_index(path) == {"images/a.png": ["masks/a.png"]}
    for content in ("[]", "{", '{"a": 3}', '{"a": [3]}', '{"a": {"b": []}}', "[" * 100_000):
        path.write_text(content)
        for read in (read_index, read_classes):
            with pytest.raises(InputError, match=r"index.json: .*expected an object") as error:
                read(path)
            assert "\n" not in str(error.value)
