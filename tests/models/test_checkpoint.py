"""Checkpoints are found and read without running their code; what is wrong with one is said in one line that names it."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import CheckpointError, check_keys, local_folder, read_state_dict, weight_files


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
