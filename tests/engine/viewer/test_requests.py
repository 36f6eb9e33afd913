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

ROUTES = "set_image set_target_buffer set_do_autozoom reset_interactions undo predict add_bbox_interaction add_point_interaction "
ROUTES += "add_scribble_interaction add_lasso_interaction add_initial_seg_interaction heartbeat release claim"
ROUTES = ROUTES.split()
SHAPE = [9, 40, 50]
BOX = {"bbox_coords": [[4, 5], [8, 33], [10, 35]], "include_interaction": True}
POINT = {"coordinates": [4, 20, 22], "include_interaction": True}
DRAWN = {"include_interaction": True, "run_prediction": True}


@pytest.fixture
def ready(http, volume):
    """An image and a target are there."""
    assert send(http, "set_image", {}, volume).status_code == 200
    assert http.post("/set_target_buffer", json={"shape": SHAPE, "dtype": "uint8"}).status_code == 200
    return http


def send(http, route, meta, array):
    headers = {"X-Meta": meta if isinstance(meta, str) else json.dumps(meta)}
    return http.post(f"/{route}", content=array if isinstance(array, bytes) else pack_array(array), headers=headers)


def refused_in_one_line(response, status, message):
    detail = response.json()["detail"]
    assert response.status_code == status and message in detail and "\n" not in detail and len(detail) < 300, detail


@pytest.mark.parametrize(
    "route, body, message",
    [
        (
            "add_bbox_interaction",
            BOX | {"bbox_coords": [[4, 5], [8, 33]]},
            "bbox_coords: expected [low, high] of each of three axes",
        ),
        ("add_bbox_interaction", BOX | {"bbox_coords": [[4, 5], [8, 33], [10]]}, "bbox_coords: expected 2 numbers"),
        ("add_bbox_interaction", BOX | {"bbox_coords": [[4, 5], [8, 8], [1, 9]]}, "is empty (expected [low, high]"),
        (
            "add_bbox_interaction",
            BOX | {"bbox_coords": [[9, 10], [8, 33], [1, 9]]},
            "lies outside the volume of [9, 40, 50] voxels",
        ),
        ("add_bbox_interaction", BOX | {"bbox_coords": [[3, 5], [8, 33], [1, 9]]}, "is not flat"),
        ("add_bbox_interaction", BOX | {"bbox_coords": [[4, 1e300], [8, 33], [1, 9]]}, "bbox_coords: expected 2 numbers"),
        ("add_bbox_interaction", BOX | {"include_interaction": 1}, "include_interaction: expected true or false"),
        ("add_bbox_interaction", BOX | {"run_prediction": None}, "run_prediction: expected true or false"),
        ("add_point_interaction", POINT | {"coordinates": [4, 40, 22]}, "the point [4, 40, 22] lies outside the volume"),
        ("add_point_interaction", POINT | {"coordinates": [4, -1, 22]}, "lies outside"),
        ("add_point_interaction", POINT | {"coordinates": [4, True, 22]}, "coordinates: expected 3 numbers"),
        ("add_point_interaction", POINT | {"coordinates": "4,5,6"}, "coordinates: expected 3 numbers"),
        ("add_point_interaction", b'{"coordinates": [NaN, 1, 2]}', "the body cannot be read (expected JSON)"),
        ("add_point_interaction", b'{"a": 1, "a": 2}', "the body cannot be read (expected JSON)"),
        ("add_point_interaction", b"[" * 60_000, "the body cannot be read (expected JSON)"),
        ("add_point_interaction", b'{"coordinates": [%s, 1, 2]}' % (b"9" * 5000), "the body cannot be read (expected JSON)"),
        ("add_point_interaction", b"\xff\xfe{}", "the body cannot be read (expected JSON)"),
        ("add_point_interaction", [], "the body is not what was expected, a JSON object"),
        ("set_target_buffer", {"shape": [9, 40, 51], "dtype": "uint8"}, "shape: expected that of the image, [9, 40, 50]"),
        ("set_target_buffer", {"shape": SHAPE, "dtype": "object"}, "dtype: expected one of bool, int16"),
        ("set_target_buffer", {"shape": SHAPE, "dtype": ["u1"]}, "dtype: expected one of bool, int16"),
        ("set_do_autozoom", {}, "do_autozoom: expected true or false"),
    ],
)
def test_json_that_asks_for_the_impossible(ready, route, body, message):
    refused_in_one_line(ready.post(f"/{route}", content=body if isinstance(body, bytes) else json.dumps(body)), 400, message)
    assert ready.post("/undo", content="{}").headers["x-meta"] == '{"ran_prediction":false,"bbox":null,"unfinished":false}'


@pytest.mark.parametrize(
    "route, meta, array, message",
    [
        ("set_image", {}, np.zeros((9, 40, 50)), "an image of shape [9, 40, 50] (expected [1 or 3, X, Y, Z])"),
        ("set_image", {}, np.zeros((2, 9, 4, 5)), "an image of shape [2, 9, 4, 5]"),
        ("set_image", {"image_properties": {"spacing": [1, 1]}}, np.zeros((1, 2, 3, 4)), "spacing: expected 3 numbers"),
        (
            "set_image",
            {"image_properties": {"spacing": [1, 1, 0]}},
            np.zeros((1, 2, 3, 4)),
            "spacing: expected 3 numbers, more than 0",
        ),
        ("set_image", "{", np.zeros((1, 2, 3, 4)), "X-Meta cannot be read (expected JSON)"),
        ("set_image", {}, np.zeros((1, 30, 40, 50)), "an array of 480,000 bytes (expected at most 200,000)"),
        ("set_image", {}, b"", "the packed array is cut short"),
        ("add_scribble_interaction", DRAWN, np.zeros(SHAPE, np.uint8), "nothing is drawn"),
        ("add_scribble_interaction", DRAWN, np.ones((9, 40, 49), np.uint8), "has the shape [9, 40, 49] (expected that of its box)"),
        ("add_lasso_interaction", DRAWN, np.ones(SHAPE, np.uint8), "the lasso is not flat"),
        (
            "add_lasso_interaction",
            DRAWN | {"interaction_bbox": [[0, 1], [0, 2], [49, 51]]},
            np.ones((1, 2, 2)),
            "interaction_bbox: exp",
        ),
        ("add_lasso_interaction", DRAWN | {"interaction_bbox": [[0, 1], [0, 2], [1.5, 3.5]]}, np.ones((1, 2, 2)), "whole numbers"),
        ("add_initial_seg_interaction", {}, np.ones((9, 40)), "a mask of shape [9, 40] (expected [9, 40, 50])"),
    ],
)
def test_arrays_that_do_not_fit(ready, route, meta, array, message):
    refused_in_one_line(send(ready, route, meta, array), 400, message)


def test_things_come_in_their_order(http, volume):
    refused_in_one_line(http.post("/add_point_interaction", json=POINT), 400, "there is no image yet (expected set_image first)")
    send(http, "set_image", {}, volume)
    refused_in_one_line(http.post("/predict", json={}), 400, "there is no target buffer yet (expected set_target_buffer first)")
    http.headers["X-Lease-Token"] = "0" * 32
    refused_in_one_line(http.post("/predict", json={}), 410, "the session has ended, or there never was one")
    assert http.post("/release").json() == {"released": True}
    refused_in_one_line(http.get("/predict"), 405, "Method Not Allowed")
    refused_in_one_line(http.post("/train"), 404, "Not Found")


def test_a_body_is_no_larger_than_is_allowed_whatever_it_says(http):
    refused_in_one_line(http.post("/set_image", content=b"x" * 300_000), 413, "a body of 300000 bytes (expected at most 265,536)")
    pieces = (b"x" * 1000 for _ in range(300))  # of a length that is not declared
    refused_in_one_line(http.post("/set_image", content=pieces), 413, "a body of more than 265,536 bytes")
    refused_in_one_line(http.post("/predict", content=b" " * 70_000), 413, "expected at most 65,536")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example"}, 421),
        ({"Origin": "null"}, 421),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "[::1]:80"}, 200),
    ],
)
def test_a_page_of_the_web_is_not_answered_where_there_is_no_key(http, headers, status):
    assert http.get("/capabilities", headers=headers).status_code == status


def test_with_a_key_only_its_owner_is_answered():
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
    secret = {"image_properties": {"spacing": [1, 1, 1], "PatientName": "Anna Geheim"}, "run_prediction": False}
    answers = [send(ready, "set_image", secret, volume), send(ready, "set_image", json.dumps(secret)[:-1], volume)]
    answers += [ready.post("/set_target_buffer", json=secret | {"shape": SHAPE, "dtype": "bool"}), ready.post("/Anna Geheim")]
    answers += [ready.post("/predict", json=secret), ready.post("/add_point_interaction", json=secret | POINT)]
    logged = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))  # the client's own
    told = logged + "".join(answer.text + str(answer.headers) for answer in answers)
    assert "a prediction in" in logged and "Geheim" not in told and ready.headers["X-Lease-Token"] not in logged


def test_fuzzed_requests_neither_break_the_server_nor_make_it_forget(ready, server, volume, caplog):
    random = np.random.default_rng(0)
    small = (volume[0] > 0).astype(np.uint8)
    numbers = [0, 1, 4, 5, -1, 8.5, 33, 49, 50, 1e9, True, None, "1", [], [1, 2], {}]
    packed = [pack_array(volume), pack_array(small), pack_array(small[4:5, 8:20, 9:30]), b"", b"NNIA"]
    flags = [True, True, False, None]

    def draw(options):
        return options[random.integers(len(options))]

    def values():
        box = [[draw(numbers[:8]) for _ in range(2)] for _ in range(3)]
        return {
            "bbox_coords": draw([box, BOX["bbox_coords"], draw(numbers)]),
            "interaction_bbox": draw([None, box, *[[[4, 5], [8, 20], [9, 30]]] * 3]),
            "coordinates": draw([POINT["coordinates"], [draw(numbers[:9]) for _ in range(3)], draw(numbers)]),
            "include_interaction": draw(flags),
            "run_prediction": draw(flags),
            "do_autozoom": draw(flags),
            "shape": draw([SHAPE, [1, 2, 3], draw(numbers)]),
            "dtype": draw(["uint8", "bool", "O", "float32", 5]),
            "image_properties": draw([None, {"spacing": draw([[1, 2, 3], "x", [0, 0, 0]])}, 7]),
        }

    def damaged(content):
        content = bytearray(content)
        for _ in range(random.integers(1, 4)):
            kind, place = random.integers(3), int(random.integers(len(content) + 1))
            content[place : place + 1 + kind] = random.bytes(int(random.integers(3)))
        return bytes(content)

    seen = set()
    for _ in range(int(os.environ.get("VESALIUS_FUZZ", 300))):
        route, text = draw(ROUTES), json.dumps(values()).encode()
        content = text
        if route.startswith(("set_im", "add_s", "add_l", "add_i")):
            content = draw([draw(packed), packed[0] if "image" in route else packed[1] if "initial" in route else packed[2]])
        content = damaged(content) if random.random() < 0.3 else content
        meta = bytes(letter for letter in (damaged(text) if random.random() < 0.1 else text) if 32 <= letter < 127)
        answer = ready.request(draw(["POST"] * 9 + ["GET"]), f"/{route}", content=content, headers={"X-Meta": meta.decode()})
        assert answer.status_code < 500 or answer.status_code == 503, (route, meta, content)
        assert answer.status_code == 200 or "\n" not in answer.json()["detail"]
        seen.add((route, answer.status_code))
        if route in ("claim", "release", "set_image"):
            server.clock.now += 1000.0  # all leases end
            ready.headers["X-Lease-Token"] = ready.post("/claim").json()["lease_token"]
            send(ready, "set_image", {}, volume)
            ready.post("/set_target_buffer", json={"shape": SHAPE, "dtype": "uint8"})
    assert "Traceback" not in caplog.text
    assert {route for route, status in seen if status == 200} == set(ROUTES), "each was answered"
    assert ready.post("/undo", json={}).status_code == 200
