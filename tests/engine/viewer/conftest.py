"""A server in this process, with a segmenter that can be foretold and a clock that stands until it is moved."""

from types import SimpleNamespace

import httpx2
import numpy as np
import pytest

from engine.viewer.leases import Leases
from engine.viewer.routes import Viewer
from engine.viewer.server import listen, served
from tests.engine.viewer.bright import Bright

SHAPE = (9, 40, 50)


@pytest.fixture(scope="package")
def ball():
    """[9, 40, 50] bool: a ball around (4, 20, 22), in slices 1 to 7."""
    z, y, x = np.mgrid[:9, :40, :50]
    return ((z - 4) / 3.5) ** 2 + ((y - 20) / 12) ** 2 + ((x - 22) / 12) ** 2 < 1


@pytest.fixture(scope="package")
def volume(ball):
    """[1, 9, 40, 50] int16, as a CT: the ball, a rod beside it in all slices, and noise."""
    values = np.random.default_rng(0).normal(-900, 20, SHAPE)
    values[ball] += 1000
    values[:, 4:9, 40:46] += 1000
    return values.astype(np.int16)[None]


@pytest.fixture(scope="package")
def running():
    clock = SimpleNamespace(now=0.0)
    leases = Leases(2, 100.0, lambda: clock.now)
    viewer = Viewer(Bright(), leases, 200_000, lambda: clock.now)
    with listen("127.0.0.1", 0) as listener, served(viewer, listener, None) as url:
        yield SimpleNamespace(url=url, leases=leases, viewer=viewer, clock=clock)


@pytest.fixture
def server(running):
    """url, leases, viewer, and clock.now; two sessions of 100 s, none of them taken, and volumes of up to 200,000 bytes."""
    running.clock.now += 1000.0
    running.leases.sweep()
    running.clock.now = 0.0
    return running


@pytest.fixture
def http(server):
    """A client without manners, that has a lease."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        client.headers["X-Lease-Token"] = client.post("/claim").json()["lease_token"]
        yield client
