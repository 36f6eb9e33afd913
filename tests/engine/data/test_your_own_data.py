"""Every example of docs/your_own_data.md is read as the document says."""

import re
from pathlib import Path

import pytest
from PIL import Image

from engine.data.questions import load_questions

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "your_own_data.md"
NAMES = ("own.csv", "own.tsv", "own.json", "own.jsonl", "own.parquet", "omnimedvqa.json", "slake.json")


@pytest.fixture
def examples(tmp_path, monkeypatch) -> dict[str, str]:
    """{file: its text in the document, or the code that makes it}, in a folder with the images that they name."""
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for number in range(1, 6):
        Image.new("RGB", (8, 6), (40 * number, 0, 0)).save(f"scans/{number}.png")
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names = [name for name in re.findall(r"`([a-z]+\.[a-z]+)`", text) if name in NAMES]
    assert len(blocks) == len(NAMES) and set(names) == set(NAMES)
    return dict(zip(dict.fromkeys(names), (block[1] for block in blocks), strict=True))


@pytest.mark.parametrize(
    "name, answers",
    {
        "own.csv": "BABAC",
        "own.tsv": "BAB",
        "own.json": "BAAAA",
        "own.jsonl": "BBB",
        "own.parquet": "ABABB",
        "omnimedvqa.json": "ABA",
        "slake.json": "AB",
    }.items(),
)
def test_each_example_is_read(examples, name, answers):
    if name.endswith(".parquet"):
        exec(examples[name], {})
    else:
        Path(name).write_text(examples[name], encoding="utf-8")
    questions = load_questions(name)
    assert "".join(record["answer"] for record in questions.records) == answers
    assert all(image.size == (8, 6) for row in range(len(answers)) for image in questions[row]["images"])
