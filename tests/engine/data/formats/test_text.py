"""Files of questions by their content: encodings, gzip, JSON of either shape; what is no such file, within bounds."""

import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from engine.data.formats import text
from engine.data.questions import load_questions
from engine.errors import InputError

ROW = {"image": "a.png", "problem": "Wäs? A)CT, B)MRI", "solution": "B"}
TABLE = "image,question,A,B,answer\na.png,Wäs?,CT,MRI,B\n"


def answers(name: str) -> list[str]:
    return [record["answer"] for record in load_questions(name).records]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("content, name", [(json.dumps([ROW], ensure_ascii=False), "q.json"), (TABLE, "q.csv")])
def test_utf_8_and_utf_16_are_read_plain_and_compressed(encoding, content, name):
    Path(name).write_bytes(content.encode(encoding))
    Path(f"{name}.gz").write_bytes(gzip.compress(content.encode(encoding)))
    first, second = (load_questions(path).record(0) for path in (name, f"{name}.gz"))
    assert first["problem"].startswith("Wäs?") and {**first, "source": ""} == {**second, "source": ""}


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ROW, ROW], indent=1),
        json.dumps(ROW) + "\n" + json.dumps(ROW),
        json.dumps(ROW) + "\r\n\r\n" + json.dumps(ROW) + "\r\n",
    ],
)
def test_an_array_and_an_object_a_line_are_told_by_their_content(name, content):
    Path(name).write_bytes(content.encode())
    assert answers(name) == ["B", "B"]


def test_one_row_alone_is_a_row():
    for name in ("q.json", "q.jsonl"):
        Path(name).write_text(json.dumps(ROW))
        assert answers(name) == ["B"]


@pytest.mark.parametrize("name", ["q.json", "q.csv", "q.parquet"])
def test_a_git_lfs_pointer_is_called_one(name):
    Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=f"^{name}: a Git LFS pointer, not the file itself"):
        load_questions(name)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes and devices among files")
@pytest.mark.parametrize("name", ["q.json", "q.jsonl", "q.csv", "q.parquet"])
def test_pipes_and_devices_are_refused_at_once(name):
    os.mkfifo(name)
    with pytest.raises(InputError, match=f"^{name}: cannot be read: a named pipe, not a file$"):
        load_questions(name)
    os.remove(name)
    os.symlink("/dev/zero", name)
    with pytest.raises(InputError, match=f"^{name}: cannot be read: a device, not a file$"):
        load_questions(name)


def test_a_file_larger_than_the_bound_is_one_line_also_when_inflated(monkeypatch):
    monkeypatch.setattr(text, "MAX_BYTES", 100_000)
    with open("q.json", "wb") as file:
        file.truncate(10**12)
    with pytest.raises(InputError, match=r"^q.json: cannot be read: 1,000,000,000,000 bytes \(expected at most 100,000\)$"):
        load_questions("q.json")
    Path("q.json.gz").write_bytes(gzip.compress(b" " * 10**7))
    with pytest.raises(InputError, match="^q.json.gz: inflates to more than 100,000 bytes"):
        load_questions("q.json.gz")


def test_damaged_gzip_and_other_encodings_are_one_line():
    Path("q.json.gz").write_bytes(gzip.compress(json.dumps([ROW]).encode())[:-12])
    with pytest.raises(InputError, match="^q.json.gz: cannot be read: "):
        load_questions("q.json.gz")
    Path("q.csv").write_bytes(TABLE.encode("latin-1"))
    with pytest.raises(InputError, match="^q.csv: not UTF-8 text in line 2 "):
        load_questions("q.csv")
