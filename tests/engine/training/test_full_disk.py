"""A disk that is full in the middle of a save: one line that names the file, nothing left behind, the checkpoint before it kept."""

import resource
import shutil
from contextlib import contextmanager

import pytest

from engine.command.run_folder import open_run
from engine.errors import InputError
from engine.training.checkpoints import find_checkpoint
from tests.engine.training.grpo_run import checksum, make_trainer
from tests.engine.training.test_masks import make_trainer as make_mask_trainer
from tests.tiny_qwen import save_tiny

SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@contextmanager
def largest_file(size: int):
    """Inside, the system refuses to make a file larger: what a full disk does, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "tokenizer.json"])
def test_the_line_names_the_file(model, tmp_path, name):
    """Each file too large alone or with those before it, which PyTorch, safetensors and Python refuse in words of their own."""
    whole = make_trainer(model, tmp_path, **SAVING)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    size = (tmp_path / "checkpoint-1" / name).stat().st_size
    trainer = make_trainer(model, tmp_path, **SAVING)
    with largest_file(size - 1), pytest.raises(InputError) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'checkpoint-2'}: cannot be saved (") and "\n" not in message
    assert message.endswith(f"; the last good checkpoint is {tmp_path / 'checkpoint-1'}")
    named = message.split("cannot be saved (")[1].split(":")[0]
    larger = {path.name for path in (tmp_path / "checkpoint-1").iterdir() if path.stat().st_size >= size}
    assert named in larger | {"its .safetensors file"}, message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = make_trainer(model, tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=str(find_checkpoint(str(tmp_path), "true")))
    assert checksum(resumed.model) == checksum(whole.model)


def test_models_that_save_themselves_are_no_exception(tmp_path):
    trainer = make_mask_trainer(tmp_path, **SAVING)
    with (
        largest_file(10_000),
        pytest.raises(InputError, match=r"checkpoint-1: cannot be saved \(.+: .+\); no checkpoint was saved$"),
    ):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


def test_the_log_names_itself(tmp_path):
    run = open_run("demo", tmp_path)
    with largest_file(100), pytest.raises(OSError) as caught:
        for step in range(100):
            run.append_metrics({"step": step})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
