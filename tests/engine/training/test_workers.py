"""A data loader's workers open and encode rows, for every trainer; what is learnt does not change."""

import multiprocessing
import os
import pickle
import signal

import pytest
import torch

from engine.command.main import _message
from engine.data.images import image_error
from engine.data.loaders.workers import worker_errors
from engine.errors import InputError
from engine.tasks.mecovqa.task import MeCoVQATask
from engine.training.encoded_rows import EncodedRows
from tests.engine.training import grpo_run, sft_run, test_masks
from tests.tiny_qwen import save_tiny

pytestmark = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="workers here share no queue with their parent"
)


class Rows(list):
    """Rows that note in which process they were opened; in a worker, row `bad` does what `meets_bad` says."""

    bad, meets_bad = None, None

    def __init__(self, rows, method="fork"):
        super().__init__(rows)
        self.opened = multiprocessing.get_context(method).SimpleQueue()

    def __getitem__(self, index):
        self.opened.put(multiprocessing.current_process().name)
        if index == self.bad and multiprocessing.parent_process() is not None:
            self.meets_bad()
        return super().__getitem__(index)

    def __reduce__(self):  # without which a list's items come before its attributes
        return _rows, (list(iter(self)), self.opened)

    def processes(self) -> set[str]:
        found = set()
        while not self.opened.empty():
            found.add(self.opened.get())
        return found


def _rows(rows, opened):
    made = Rows(rows)
    made.opened = opened
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def grpo(model, folder, method="fork", **settings):
    return grpo_run.make_trainer(model, folder, rows=Rows(grpo_run.questions(), method), **settings)


def sft(model, folder, method="fork", **settings):
    return sft_run.make_trainer(model, folder, data=Rows(sft_run.rows(), method), **settings)


def masks(model, folder, method="fork", **settings):
    torch.manual_seed(0)
    return test_masks.make_trainer(folder, data=Rows(test_masks.rows() * 4, method), **settings)


TRAINERS = pytest.mark.parametrize("make_trainer", [grpo, sft, masks])


def rows_of(trainer) -> Rows:
    return trainer.train_dataset if isinstance(trainer.train_dataset, Rows) else trainer.train_dataset.rows


@TRAINERS
def test_a_run_that_is_resumed_with_workers_is_the_one_without(model, tmp_path, make_trainer):
    """Into its second epoch, where the order of rows is another."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model, tmp_path / "whole", **settings)
    whole.train()
    ahead = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    resumed = make_trainer(model, tmp_path / "resumed", **settings, **ahead)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rows_of(whole).processes() == {"MainProcess"}
    opened = rows_of(resumed).processes()
    assert opened and "MainProcess" not in opened


def test_spawned_workers_change_nothing(model, tmp_path):
    checksums = []
    for method, workers in (("fork", 0), ("spawn", 1)):
        settings = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": method} if workers else {}
        trainer = grpo(model, tmp_path, method, max_steps=1, **settings)
        trainer.train()
        checksums.append(grpo_run.checksum(trainer.model))
    [opened] = rows_of(trainer).processes()
    assert checksums[0] == checksums[1] and opened.startswith("SpawnProcess")


@TRAINERS
def test_what_a_spawned_worker_is_given_can_be_pickled(model, tmp_path, make_trainer):
    trainer = make_trainer(model, tmp_path)
    plain = [trainer.train_dataset.rows.copy() if hasattr(trainer.train_dataset, "rows") else list(trainer.train_dataset)]
    there = pickle.loads(pickle.dumps((plain, getattr(trainer.train_dataset, "processor", None), trainer.data_collator)))
    assert len(there[0][0]) == len(plain[0]) and callable(there[2])


def test_what_scores_is_not_given_to_workers():
    task = MeCoVQATask(rewards=[lambda prompts, completions: [1.0]])
    rows = pickle.loads(pickle.dumps(EncodedRows([], task, None)))
    assert rows.task.target({"answer": "CT"}) == "CT" and len(task.rewards) == 1


def changed():
    raise image_error("a.png", "truncated or damaged image: no whole header")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("meets_bad", "line"),
    [(changed, "a.png: truncated or damaged image: no whole header"), (killed, "a worker of the data loader has ended")],
)
def test_a_worker_that_fails_is_one_line(model, tmp_path, meets_bad, line):
    trainer = sft(model, tmp_path, max_steps=3, dataloader_num_workers=2)
    Rows.bad, Rows.meets_bad = 5, staticmethod(meets_bad)
    try:
        with pytest.raises(InputError) as error:
            trainer.train()
    finally:
        Rows.bad, Rows.meets_bad = None, None
    assert _message(error.value).startswith(line) and "\n" not in _message(error.value)


@pytest.mark.parametrize("ends", [True, False])
def test_what_breaks_off_since_its_worker_has_ended_is_told_from_other_losses(ends):
    loader = iter(torch.utils.data.DataLoader([0], num_workers=1))
    with pytest.raises(InputError if ends else ConnectionResetError), worker_errors():
        if ends:
            os.kill(loader._workers[0].pid, signal.SIGKILL)  # of which PyTorch may hear before the next line or after it
        raise ConnectionResetError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataloader_multiprocessing_context": "thread", "dataloader_num_workers": 1}, "_context thread: expected fork"),
        ({"dataloader_multiprocessing_context": "spawn"}, "_context spawn without workers: give --dataloader_num_workers too"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor 2 without workers"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers without workers"),
        ({"dataloader_in_order": False, "dataloader_num_workers": 1}, "--dataloader_in_order false is not supported"),
    ],
)
def test_settings_that_cannot_work_are_one_line(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        sft_run.SFTConfig(output_dir=str(tmp_path), **settings)


def test_what_a_gpu_copies_is_pinned(model, tmp_path, monkeypatch):
    """PyTorch pins what it knows, and asks the rest; without a GPU it pins nothing, so a copy stands for it here."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor.shape) or tensor.clone())
    row = sft(model, tmp_path).train_dataset[0]
    [found] = torch.utils.data._utils.pin_memory.pin_memory([row])
    encoded = row["encoded"]
    assert set(pinned) == {encoded.input_ids.shape, encoded.pixel_values[0].shape} and len(pinned) == 2
    assert torch.equal(found["encoded"].pixel_values[0], encoded.pixel_values[0])
    assert found["encoded"].image_keys == encoded.image_keys and found["problem"] == row["problem"]
