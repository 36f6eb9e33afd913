"""Images are found by names as other systems write them, and never outside the root."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from engine.data.formats.names import find_named
from engine.data.questions import load_questions
from engine.errors import InputError


def test_accents_may_be_composed_or_not_in_folders_and_files(folder):
    composed, apart = (unicodedata.normalize(form, "Läsionen/Ödem é.png") for form in ("NFC", "NFD"))
    mixed = f"{composed.split('/')[0]}/{apart.split('/')[1]}"
    Path(apart).parent.mkdir()
    Image.new("RGB", (8, 6)).save(apart)
    for name in (composed, apart, mixed):
        assert find_named(folder, name).exists()


@pytest.mark.skipif(os.sep == "\\", reason="a name cannot hold a backslash")
def test_backslashes_separate_folders_unless_a_file_has_them(folder):
    Path("b").mkdir()
    Image.new("RGB", (8, 6)).save("b/c.png")
    assert find_named(folder, "b\\c.png") == folder / "b" / "c.png"
    Image.new("RGB", (8, 6)).save("b\\c.png")
    assert find_named(folder, "b\\c.png") == folder / "b\\c.png"


@pytest.mark.parametrize("name", ["..\\..\\x.png", "b\\..\\..\\x.png", "../x.png", "imgs/../../x.png"])
def test_no_spelling_leaves_the_root(folder, name):
    Image.new("RGB", (8, 6)).save(folder.parent / "x.png")
    Path("rows.json").write_text(json.dumps([{"image": name, "question": "Is it?", "answer": "yes"}]))
    with pytest.raises(InputError, match="row 0: image path .* leaves"):
        load_questions("rows.json")


def test_a_name_of_a_megabyte_is_a_short_line():
    Path("rows.json").write_text(json.dumps([{"image": "data:image/png;base64," + "A" * 10**6, "question": "?", "answer": "no"}]))
    with pytest.raises(InputError, match="no such image file") as error:
        load_questions("rows.json")
    assert len(str(error.value)) < 500
