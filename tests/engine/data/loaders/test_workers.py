"""Signals of a group are no business of a data loader's workers."""

import os
import signal

import pytest
from torch.utils.data import DataLoader

from engine.data.loaders.workers import shield_workers

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals that wait are POSIX's")


class Signalled:
    """Items are what a worker holds back, asked for after it was sent SIGINT and SIGTERM."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_signals_are_the_parents_alone(method):
    loader = DataLoader(Signalled(), batch_size=None, num_workers=1, multiprocessing_context=method)
    shield_workers(loader)
    assert list(loader) == [[signal.SIGINT, signal.SIGTERM]] * 2
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT, signal.SIGTERM}
