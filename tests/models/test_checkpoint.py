"""Checkpoints are found and read without running their code; what is wrong with one is said in one line that names it."""

import argparse
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import (
    CheckpointError,
    check_keys,
    check_weights,
    indexed_files,
    local_folder,
    read_json,
    read_state_dict,
    reading,
    weight_files,
)


class Exploit:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Exploit()}))
    torch.save({"model": Exploit()}, tmp_path / "evil_zip.pth")
    for name in ("evil.pth", "evil_zip.pth"):
        with pytest.raises(CheckpointError, match="not a file of tensors"):
            read_state_dict(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_beside_the_weights_do_no_harm(tmp_path, zipped):
    """As a training loop leaves them; in files of numpy 1 too, whose module has another name."""
    beside = {"loss": np.float64(1), "epoch": np.int64(2), "best": np.bool_(True), "score": np.float32(3)}
    torch.save({"model": {"a": torch.ones(2)}, **beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_state_dict(tmp_path / "x.pth")["a"], torch.ones(2))
    if not zipped:
        content = (tmp_path / "x.pth").read_bytes()
        assert b"numpy._core.multiarray" in content
        (tmp_path / "old.pth").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        assert torch.equal(read_state_dict(tmp_path / "old.pth")["a"], torch.ones(2))


def test_what_else_a_pickle_needs_is_named(tmp_path):
    for thing, name in ((argparse.Namespace(a=1), "argparse.Namespace"), (Path("x"), "Path"), (np.zeros(2), "_reconstruct")):
        torch.save({"model": {"a": torch.ones(2)}, "other": thing}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=rf"x\.pth: not a file of tensors alone, it also needs \S*{name}") as error:
            read_state_dict(tmp_path / "x.pth")
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("absent.pth", "absent.safetensors", "empty.pth", "text.safetensors", "list.pth"):
        with pytest.raises(CheckpointError, match=name) as error:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(error.value)


def test_keys_are_compared_by_name_and_shape():
    expected = {name: torch.zeros(2, 3) for name in "abcdefg"}
    check_keys(expected, dict(expected), "file")
    given = {"a": torch.zeros(3, 2), "b": torch.zeros(2, 3), "x": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        check_keys(expected, given, "file")
    assert str(error.value) == "file: c, d, e, f and 1 more missing; x unexpected; a is [3, 2] instead of [2, 3] of another shape"


def test_a_folder_is_told_from_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_folder("someone/something") is None
    for path in (tmp_path / "whole", "./whole", "whole"):
        folder = local_folder(path)
        assert folder is not None and folder.samefile(tmp_path / "whole")
    for path in (str(tmp_path / "absent"), "./absent", "other"):
        with pytest.raises(OSError, match=f"{path}: no checkpoint there .expected a folder with config.json"):
            local_folder(path)


def test_weights_are_in_the_files_that_the_index_names_or_in_the_only_one(tmp_path):
    with pytest.raises(CheckpointError, match="no weights"):
        weight_files(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-1.safetensors", "model-2.safetensors"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="holds model.safetensors and an index of other files"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path) == [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\b", "C:x", "a\0b"])
def test_an_index_names_files_of_its_own_folder(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="index.json: names .* expected a file of the same folder"):
        indexed_files(index)


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": 3}']
)
def test_an_index_has_a_weight_map(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index.json: expected a weight_map"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"[1]", "expected a JSON object, not a list"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is not a JSON number"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b'{"a": 1', "not JSON"),
    ],
)
def test_json_that_says_nothing_is_refused_by_name(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "folder.json").mkdir()
    for name in ("config.json", "folder.json"):
        with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
            read_json(tmp_path / name)


def test_a_pickle_or_safetensors_that_is_cut_is_found_without_reading_it(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    for name in ("whole.bin", "old.bin", "whole.safetensors"):
        check_weights(tmp_path / name)
    for name in ("whole.bin", "whole.safetensors"):
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes((tmp_path / name).read_bytes()[:-50])
        with pytest.raises(CheckpointError, match=f"cut_{name}: not a whole file of tensors"):
            check_weights(cut)


def test_whatever_a_library_raises_is_one_line_that_names_the_file():
    for raised in (KeyError("a"), TypeError("two\nlines"), ZeroDivisionError(), RuntimeError("x" * 500)):
        name = type(raised).__name__
        with pytest.raises(CheckpointError, match=f"config.json: cannot be used .{name}") as found, reading("config.json"):
            raise raised
        assert "\n" not in str(found.value) and len(str(found.value)) < 250
    with pytest.raises(CheckpointError, match="^as it is$"), reading("config.json"):
        raise CheckpointError("as it is")


def test_a_name_given_twice_in_a_checkpoints_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"a": {"vocab_size": 5, "vocab_size": 6}}')
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON \('vocab_size' is given twice\)"):
        read_json(tmp_path / "config.json")
