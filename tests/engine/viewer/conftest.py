"""A server in this process, with a segmenter that can be foretold and a clock that stands until it is moved."""

import json
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest

from engine.viewer.arrays import pack_array
from engine.viewer.leases import Leases
from engine.viewer.routes import Viewer
from engine.viewer.server import listen, served
from tests.engine.viewer.bright import Bright


@pytest.fixture(scope="package")
def ball():
    """[9, 40, 50] bool: a ball around (4, 20, 22), in slices 1 to 7."""
    z, y, x = np.mgrid[:9, :40, :50]
    return ((z - 4) / 3.5) ** 2 + ((y - 20) / 12) ** 2 + ((x - 22) / 12) ** 2 < 1


@pytest.fixture(scope="package")
def volume(ball):
    """[1, 9, 40, 50] int16, as a CT: the ball, a rod beside it in all slices, and noise."""
    values = np.random.default_rng(0).normal(-900, 20, ball.shape)
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
    running.leases.held.clear()
    running.clock.now = 0.0
    return running


@pytest.fixture
def slow(server, monkeypatch):
    """Each slice takes 15 s by the server's clock."""
    look = server.viewer.segmenter.look

    def looking(pixels):
        server.clock.now += 15
        return look(pixels)

    monkeypatch.setattr(server.viewer.segmenter, "look", looking)


@pytest.fixture
def ready(server, volume):
    """A client without manners: http, send(route, meta, array), and begin(), which gets it a lease, an image and a target."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:

        def send(route, meta, array):
            content = array if isinstance(array, bytes) else pack_array(array)
            return client.post(f"/{route}", content=content, headers={"X-Meta": json.dumps(meta)})

        def begin():
            client.headers["X-Lease-Token"] = client.post("/claim").json()["lease_token"]
            send("set_image", {}, volume)
            client.post("/set_target_buffer", json={"shape": [9, 40, 50], "dtype": "uint8"}).raise_for_status()

        begin()
        yield SimpleNamespace(http=client, send=send, begin=begin)
