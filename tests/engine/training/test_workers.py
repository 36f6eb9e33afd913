"""A data loader's workers open and encode rows, for every trainer; what is learnt does not change."""

import multiprocessing

import pytest
import torch

from tests.engine.training import grpo_run, sft_run, test_masks
from tests.tiny_qwen import save_tiny

pytestmark = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="workers here share no queue with their parent"
)


class Rows(list):
    """Rows that note in which process they were opened."""

    def __init__(self, rows):
        super().__init__(rows)
        self.opened = multiprocessing.get_context("fork").SimpleQueue()

    def __getitem__(self, index):
        self.opened.put(multiprocessing.current_process().name)
        return super().__getitem__(index)

    def processes(self) -> set[str]:
        found = set()
        while not self.opened.empty():
            found.add(self.opened.get())
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def grpo(model, folder, **settings):
    return grpo_run.make_trainer(model, folder, max_steps=2, rows=Rows(grpo_run.questions()), **settings)


def sft(model, folder, **settings):
    return sft_run.make_trainer(model, folder, max_steps=2, data=Rows(sft_run.rows()), **settings)


def masks(model, folder, **settings):
    torch.manual_seed(0)
    return test_masks.make_trainer(folder, max_steps=2, data=Rows(test_masks.rows() * 4), **settings)


@pytest.mark.parametrize("make_trainer", [grpo, sft, masks])
def test_workers_open_and_encode_the_rows_and_change_nothing(model, tmp_path, make_trainer):
    checksums, opened = [], []
    for workers in (0, 2):
        trainer = make_trainer(model, tmp_path / str(workers), dataloader_num_workers=workers)
        data = trainer.train_dataset if isinstance(trainer.train_dataset, Rows) else trainer.train_dataset.rows
        trainer.train()
        checksums.append(grpo_run.checksum(trainer.model))
        opened.append(data.processes())
    assert checksums[0] == checksums[1]
    assert opened[0] == {"MainProcess"} and "MainProcess" not in opened[1] and opened[1]
