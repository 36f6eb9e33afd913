"""Requests that no well-behaved client sends: each is refused in one line, and the server stands."""

import json
import logging
import os
import time

import httpx2
import numpy as np
import pytest

from engine.viewer.arrays import pack_array
from engine.viewer.leases import Leases
from engine.viewer.routes import Viewer
from engine.viewer.server import listen, served
from tests.engine.viewer.bright import Bright

SHAPE = [9, 40, 50]
BOX = {"bbox_coords": [[4, 5], [8, 33], [10, 35]], "include_interaction": True}
POINT = {"coordinates": [4, 20, 22], "include_interaction": True}
DRAWN = {"include_interaction": True, "interaction_bbox": [[4, 5], [8, 20], [9, 30]]}
ADD = "add_{}_interaction".format
ARRAYS = ["set_image", ADD("initial_seg"), ADD("scribble"), ADD("lasso")]
OTHERS = "set_target_buffer set_do_autozoom reset_interactions undo predict heartbeat release claim".split()
ROUTES = [*ARRAYS, *OTHERS, ADD("bbox"), ADD("point")]


def refused_in_one_line(response, status, message):
    detail = response.json()["detail"]
    assert response.status_code == status and message in detail and "\n" not in detail and len(detail) < 300, detail


@pytest.mark.parametrize(
    "route, body, message",
    [
        (ADD("bbox"), BOX | {"bbox_coords": [[4, 5], [8, 33]]}, "bbox_coords: expected [low, high] of each of three axes"),
        (ADD("bbox"), BOX | {"bbox_coords": [[9, 10], [8, 33], [1, 9]]}, "the box is empty in the volume of [9, 40, 50] voxels"),
        (ADD("bbox"), BOX | {"bbox_coords": [[3, 5], [8, 33], [1, 9]]}, "the box is not flat"),
        (ADD("bbox"), BOX | {"bbox_coords": [[4, 1e300], [8, 33], [1, 9]]}, "bbox_coords: expected 2 numbers"),
        (ADD("bbox"), BOX | {"include_interaction": 1}, "include_interaction: expected true or false"),
        (ADD("point"), POINT | {"coordinates": [4, -1, 22]}, "the point [4, -1, 22] lies outside the volume of [9, 40, 50] voxels"),
        (ADD("point"), POINT | {"coordinates": [4, float("nan"), 22]}, "coordinates: expected 3 numbers"),
        (ADD("point"), b'{"a": 1, "a": 2}', "the body cannot be read (expected a JSON object)"),
        (ADD("point"), b"[" * 60_000, "the body cannot be read (expected a JSON object)"),
        (ADD("point"), b'{"coordinates": [%s, 1, 2]}' % (b"9" * 5000), "the body cannot be read"),
        ("set_target_buffer", {"shape": [9, 40, 51], "dtype": "uint8"}, "shape: expected that of the image, [9, 40, 50]"),
        ("set_target_buffer", {"shape": SHAPE, "dtype": "object"}, "dtype: expected one of bool, int8"),
        ("set_do_autozoom", {}, "do_autozoom: expected true or false"),
    ],
)
def test_json_that_asks_for_the_impossible(ready, route, body, message):
    refused_in_one_line(ready.http.post(f"/{route}", content=body if isinstance(body, bytes) else json.dumps(body)), 400, message)
    assert ready.http.post("/undo", content="{}").headers["x-meta"] == '{"ran_prediction":false,"bbox":null,"unfinished":false}'


@pytest.mark.parametrize(
    "route, meta, array, message",
    [
        ("set_image", {}, np.zeros((9, 40, 50)), "an image of shape [9, 40, 50] (expected [1 or 3, X, Y, Z])"),
        (
            "set_image",
            {"image_properties": {"spacing": [1, 1, 0]}},
            np.zeros((1, 2, 3, 4)),
            "spacing: expected 3 numbers, more than 0",
        ),
        ("set_image", [], np.zeros((1, 2, 3, 4)), "X-Meta cannot be read (expected a JSON object)"),
        ("set_image", {}, np.zeros((1, 30, 40, 50)), "an array of 480,000 bytes (expected at most 200,000)"),
        (ADD("scribble"), {"include_interaction": True}, np.zeros(SHAPE, np.uint8), "nothing is drawn"),
        (
            ADD("scribble"),
            {"include_interaction": True},
            np.ones((9, 40, 49)),
            "has the shape [9, 40, 49] (expected that of its box)",
        ),
        (ADD("lasso"), {"include_interaction": True}, np.ones(SHAPE, np.uint8), "the lasso is not flat"),
        (ADD("lasso"), DRAWN | {"interaction_bbox": [[0, 1], [0, 2], [49, 51]]}, np.ones((1, 2, 2)), "interaction_bbox: exp"),
        (ADD("initial_seg"), {}, np.ones((9, 40)), "a mask of shape [9, 40] (expected [9, 40, 50])"),
    ],
)
def test_arrays_that_do_not_fit(ready, route, meta, array, message):
    refused_in_one_line(ready.send(route, meta, array), 400, message)


def test_things_come_in_their_order_and_are_no_larger_than_is_allowed(ready, volume):
    http = ready.http
    refused_in_one_line(http.post("/set_image", content=b"x" * 300_000), 413, "a body of more than 265,536 bytes")
    pieces = (b"x" * 1000 for _ in range(300))  # of a length that is not declared
    refused_in_one_line(http.post("/set_image", content=pieces), 413, "a body of more than 265,536 bytes")
    refused_in_one_line(http.post("/predict", content=b" " * 70_000), 413, "a body of more than 65,536 bytes")
    ready.send("set_image", {}, volume)
    refused_in_one_line(http.post("/predict", json={}), 400, "there is no target buffer yet (expected set_target_buffer first)")
    http.headers["X-Lease-Token"] = http.post("/claim").json()["lease_token"]
    refused_in_one_line(http.post(f"/{ADD('point')}", json=POINT), 400, "there is no image yet (expected set_image first)")
    http.headers["X-Lease-Token"] = "0" * 32
    refused_in_one_line(http.post("/predict", json={}), 410, "the session has ended, or there never was one")
    refused_in_one_line(http.get("/predict"), 405, "Method Not Allowed")
    refused_in_one_line(http.post("/train"), 404, "Not Found")


def test_without_a_key_no_page_of_the_web_is_answered_and_with_one_only_its_owner(ready):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        refused_in_one_line(ready.http.get("/capabilities", headers=headers), 421, "this server answers to this machine only")
    for headers in ({"Origin": "http://localhost:3000"}, {"Host": "[::1]:80"}):
        assert ready.http.get("/capabilities", headers=headers).status_code == 200
    viewer = Viewer(Bright(), Leases(1, 100.0, time.monotonic), 1000)
    with listen("127.0.0.1", 0) as listener, served(viewer, listener, "a-long-secret") as url:
        with httpx2.Client(base_url=url, headers={"Host": "lab.example"}) as client:
            assert client.get("/healthz").json() == {"ok": True}
            for given in ({}, {"Authorization": "Bearer a-long-secreT"}, {"Authorization": "a-long-secret"}):
                refused_in_one_line(
                    client.get("/capabilities", headers=given), 401, "expected the header Authorization: Bearer KEY"
                )
            assert client.post("/claim", headers={"Authorization": "Bearer a-long-secret"}).status_code == 200


def test_no_log_line_and_no_answer_tells_of_the_patient(ready, volume, caplog):
    caplog.set_level(logging.DEBUG)
    secret = {"image_properties": {"PatientName": "Anna Geheim"}, "shape": SHAPE, "dtype": "bool"} | POINT
    answers = [ready.send("set_image", secret, volume), ready.http.post("/Anna Geheim")]
    answers += [ready.http.post(f"/{route}", json=secret) for route in ("set_target_buffer", "predict", ADD("point"), ADD("bbox"))]
    logged = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))  # the client's own
    assert "a prediction in" in logged and ready.http.headers["X-Lease-Token"] not in logged
    assert "Geheim" not in logged + "".join(answer.text + str(answer.headers) for answer in answers)


def test_fuzzed_requests_neither_break_the_server_nor_make_it_forget(ready, server, volume, caplog):
    random = np.random.default_rng(0)
    small = (volume[0] > 0).astype(np.uint8)
    packed = [pack_array(volume), pack_array(small), pack_array(small[4:5, 8:20, 9:30]), b""]
    odd = [0, 4, 5, -1, 8.5, 33, 49, 50, 1e9, True, None, "1", [], [1, 2], {}, SHAPE]

    def draw(options):
        return options[random.integers(len(options))]

    def values():
        good = BOX | POINT | DRAWN | {"shape": SHAPE, "dtype": "uint8", "do_autozoom": True, "run_prediction": True}
        box = [[draw(odd[:8]) for _ in range(2)] for _ in range(3)]
        spoilt = {name: draw([*odd, box]) for name in [*good, "image_properties"] if random.random() < 0.15}
        return good | spoilt

    def damaged(content):
        content = bytearray(content)
        for _ in range(random.integers(1, 4)):
            kind, place = random.integers(3), int(random.integers(len(content) + 1))
            content[place : place + 1 + kind] = random.bytes(int(random.integers(3)))
        return bytes(content)

    seen = set()
    for _ in range(int(os.environ.get("VESALIUS_FUZZ", 400))):
        route, text = draw(ROUTES), json.dumps(values()).encode()
        content = draw([draw(packed), packed[min(ARRAYS.index(route), 2)]]) if route in ARRAYS else text
        content = damaged(content) if random.random() < 0.3 else content
        meta = bytes(letter for letter in (damaged(text) if random.random() < 0.1 else text) if 32 <= letter < 127)
        answer = ready.http.request(draw(["POST"] * 9 + ["GET"]), f"/{route}", content=content, headers={"X-Meta": meta.decode()})
        assert answer.status_code < 500 or answer.status_code == 503, (route, meta, content)
        assert answer.status_code == 200 or "\n" not in answer.json()["detail"]
        seen.add((route, answer.status_code))
        if route in ("claim", "release", "set_image"):
            server.clock.now += 1000.0  # all leases end
            ready.begin()
    assert "Traceback" not in caplog.text
    assert {route for route, status in seen if status == 200} == set(ROUTES), "each was answered"
    assert ready.http.post("/undo", json={}).status_code == 200
