"""Parquet files by an Arrow copy: the same rows as `datasets` reads, made once, whole or not at all."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset
from PIL import Image
from pyarrow.parquet import write_table

from engine.data.formats.parquet import arrow_copy


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write(path: Path, first: int, count: int) -> Path:
    """Every kind of cell that readers of questions meet."""
    rows = [
        {
            "image": {"bytes": png(i % 256), "path": f"{i}.png"},
            "question": f"Which, {i}?",
            "options": ["a", "b", str(i)],
            "bbox": None if i % 3 else [1.0, 2.0],
            "age": i,
        }
        for i in range(first, first + count)
    ]
    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_the_rows_and_columns_are_those_that_datasets_reads(tmp_path):
    files = [write(tmp_path / "a.parquet", 0, 250), write(tmp_path / "b.parquet", 250, 3)]
    ours, theirs = (
        arrow_copy(files, tmp_path / "copies"),
        Dataset.from_parquet([str(file) for file in files], cache_dir=str(tmp_path / "c")),
    )
    assert ours.features == theirs.features and ours.to_list() == theirs.to_list() and len(ours) == 253


def test_what_hugging_face_says_of_its_columns_is_kept(tmp_path):
    rows = {"image": [{"bytes": png(3), "path": "x.png"}], "dx": ["mel"]}
    from datasets import ClassLabel, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "dx": ClassLabel(names=["nv", "mel"])})
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    copy = arrow_copy([tmp_path / "a.parquet"], tmp_path / "copies")
    assert copy.features == features and copy[0]["image"].size == (4, 4) and copy[0]["dx"] == 1


def test_a_copy_is_made_once_until_a_file_changes(tmp_path):
    file = write(tmp_path / "a.parquet", 0, 5)
    arrow_copy([file], tmp_path / "copies")
    (copy,) = (tmp_path / "copies").iterdir()
    made = copy.stat().st_mtime_ns
    assert len(arrow_copy([file], tmp_path / "copies")) == 5 and copy.stat().st_mtime_ns == made
    write(file, 0, 7)
    assert len(arrow_copy([file], tmp_path / "copies")) == 7


def test_several_at_once_get_the_same_copy(tmp_path):
    file = write(tmp_path / "a.parquet", 0, 300)
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda _: len(arrow_copy([file], tmp_path / "copies")), range(4)))
    assert lengths == [300] * 4 and len(list((tmp_path / "copies").iterdir())) == 1


@pytest.mark.parametrize("second", [b"no Parquet", None])
def test_of_files_that_do_not_go_together_nothing_is_left(tmp_path, second):
    file, other = write(tmp_path / "a.parquet", 0, 5), tmp_path / "b.parquet"
    if second is None:
        write_table(pyarrow.table({"other": [1]}), other)
    else:
        other.write_bytes(second)
    with pytest.raises(Exception, match="(?i)parquet|column"):
        arrow_copy([file, other], tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == []
