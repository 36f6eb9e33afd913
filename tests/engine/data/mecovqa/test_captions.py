"""Captions of stage 1 are read; what cannot be used is one line."""

import json

import pytest

from engine.data.mecovqa.captions import load_captions
from engine.errors import InputError
from tests.engine.data.mecovqa.conftest import CT


def line(image: str = f"images/{CT}", caption="<image>\nA CT image\nof a liver.", **keys) -> str:
    return json.dumps({"id": "1", "image": image, "caption": caption, "source": "mine", **keys})


def test_a_caption_is_the_answer_to_its_image(root):
    (root / "captions.jsonl").write_text(line() + "\n" + line("photo.png", "Plain.", source=3) + "\n")
    (root / "captions_test.jsonl").write_text(line("photo.png"))
    first, second = load_captions(root)
    assert first["answer"] == "A CT image\nof a liver." and first["question"] == "" and first["kind"] == "caption"
    assert (first["origin"], second["origin"], second["answer"]) == ("mine", None, "Plain.") and len(first["images"]) == 1
    assert len(load_captions(root, split="test")) == 1 and len(load_captions([root, root / "captions.jsonl"], limit=3)) == 3


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("{", "not a JSON object"),
        (line(caption="<image>\n "), "no caption"),
        (line(caption=3), "no caption"),
        (line(caption="\ud800"), "caption has half a character"),
        (line("images/gone"), "image 'images/gone': no such image file"),
        (line("../x.png"), "leaves"),
        (json.dumps({"caption": "a"}), "unusable image"),
    ],
)
def test_a_bad_caption_is_one_line(root, bad, reason):
    (root / "captions.jsonl").write_text(line() + "\n" + bad)
    with pytest.raises(InputError, match=f"captions.jsonl: row 1: .*{reason}"):
        load_captions(root)
    assert len(load_captions(root, on_bad_row="skip")) == 1
