"""vesalius-seg --serve: what it answers, what it refuses, and that it stands whatever comes."""

import base64
import hashlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from engine.data.images import decode_image
from tests.engine.serve.pictures import smooth, write_pictures
from tests.engine.serve.small_segmenter import SmallSegmenter, overlap

BOX = [20, 10, 90, 70]
WAIT = 120  # seconds: a machine's share may be small


class Client:
    """One connection; `address` is (host, port)."""

    def __init__(self, address):
        self.connection = http.client.HTTPConnection(*address, timeout=WAIT)

    def ask(self, method, path, body=None, **headers):
        """Status and content; a body that is not bytes is sent as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
        response = self.connection.getresponse()
        return response.status, response.read()

    def segment(self, body):
        status, content = self.ask("POST", "/segment", body)
        return status, json.loads(content)

    def metric(self, name):
        """The sum over its labels."""
        _, text = self.ask("GET", "/metrics")
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text.decode(), re.MULTILINE))


@pytest.fixture(scope="module")
def start(binaries, small_bundle):
    @contextmanager
    def server(*flags):
        command = [binaries / "vesalius-seg", small_bundle, "--serve", "0", *map(str, flags)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            process.address = ("127.0.0.1", int(json.loads(line)["address"].rpartition(":")[2]))
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT) == 0, process.stderr.read()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    return server


@pytest.fixture(scope="module")
def served(start):
    with start("--max_body", 1 << 20) as process:
        yield process.address


@pytest.fixture
def client(served):
    return Client(served)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))["rgb.png"].read_bytes()  # 131 x 90


def uri(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def as_mask(entry):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["png"])))) > 0


def large(seed):
    """A PNG of 2000 x 1500, which takes the server a while."""
    file = io.BytesIO()
    Image.fromarray(np.resize(smooth(64, 64, 3, seed), (1500, 2000, 3)).astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def raw(address, content, patience=WAIT):
    """What comes back for these bytes, until the server closes."""
    with socket.create_connection(address, patience) as connection:
        connection.sendall(content)
        received = b""
        while piece := connection.recv(1 << 16):
            received += piece
        return received


def test_masks_are_those_of_python_and_an_image_is_sent_once(client, picture):
    points = [[[60.5, 40, 1]], [[60, 40, 1], [25, 15, 0]], []]
    boxes = [BOX, [1, 1, 40, 40], [50, 20, 131, 90]]
    status, first = client.segment({"image": uri(picture), "boxes": boxes, "points": points})
    assert status == 200 and (first["width"], first["height"]) == (131, 90)
    assert first["image_id"] == hashlib.sha256(picture).hexdigest()
    expected = SmallSegmenter().segment(decode_image(picture, "rgb.png"), list(zip(boxes, points, strict=True)))
    for ours, (mask, iou) in zip(first["masks"], expected, strict=True):
        assert overlap(as_mask(ours), mask) >= 0.995 and abs(ours["iou"] - iou) < 1e-4 and ours["area"] == as_mask(ours).sum()
    status, again = client.segment({"image_id": first["image_id"], "boxes": boxes, "points": points})
    assert status == 200 and again == first


def test_more_prompts_than_one_run_takes_are_answered_in_order(client, picture):
    boxes = [[x, 5, x + 30, 60] for x in range(0, 100, 5)]  # the bundle takes 8 at a time
    _, together = client.segment({"image": uri(picture), "boxes": boxes})
    alone = [client.segment({"image_id": together["image_id"], "boxes": [box]})[1]["masks"][0] for box in boxes]
    assert [mask["png"] for mask in together["masks"]] == [mask["png"] for mask in alone]


BAD = {
    "no JSON": (b"{", "no JSON object"),
    "a list": ([1], "no JSON object"),
    "deep": (b"[" * 100_000, "no JSON object"),
    "no image": ({"boxes": [BOX]}, "either image or image_id"),
    "two images": ({"image": "", "image_id": "", "boxes": [BOX]}, "either image or image_id"),
    "an image that is no text": ({"image": 3, "boxes": [BOX]}, "image: expected text"),
    "no data URI": ({"image": "http://localhost/a.png", "boxes": [BOX]}, "data URI"),
    "no base64": ({"image": "data:image/png;base64,????", "boxes": [BOX]}, "not base64"),
    "no PNG": ({"image": uri(b"text"), "boxes": [BOX]}, "neither PNG nor JPEG"),
    "an unknown key": ({"image": uri(b"text"), "box": BOX}, "'box' is not known"),
    "no prompt": ({"image": uri(b"text")}, "boxes, points, or both"),
    "a short box": ({"image": uri(b"text"), "boxes": [[1, 2, 3]]}, "[x1, y1, x2, y2]"),
    "a box of text": ({"image": uri(b"text"), "boxes": [["1", 2, 3, 4]]}, "[x1, y1, x2, y2]"),
    "an endless box": (b'{"image_id": "a", "boxes": [[0, 0, 1e999, 1]]}', ""),
    "unequal numbers": ({"image": uri(b"text"), "boxes": [BOX], "points": [[], []]}, "1 boxes and points for 2"),
    "a bad label": ({"image": uri(b"text"), "points": [[[1, 2, 3]]]}, "labels 1 (inside) or 0"),
    "many boxes": ({"image": uri(b"text"), "boxes": [BOX] * 65}, "at most 64"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_request_is_400_and_says_why(client, what):
    body, words = BAD[what]
    status, answer = client.segment(body)
    assert status == 400 and words in answer["error"]["message"], answer


def test_a_prompt_outside_the_image_is_400_and_a_truncated_image_too(client, picture):
    status, answer = client.segment({"image": uri(picture), "boxes": [[0, 0, 132, 90]]})
    assert status == 400 and "in an image of 131 x 90" in answer["error"]["message"]
    status, answer = client.segment({"image": uri(picture), "points": [[[5, 91, 1]]]})
    assert status == 400 and "outside the image" in answer["error"]["message"]
    status, answer = client.segment({"image": uri(picture[: len(picture) // 2]), "boxes": [BOX]})
    assert status == 400 and "truncated or damaged PNG" in answer["error"]["message"]
    assert client.segment({"image_id": "0" * 64, "boxes": [BOX]})[0] == 404


def test_paths_methods_and_types_that_are_not_there(client):
    assert client.ask("GET", "/nothing")[0] == 404
    assert client.ask("GET", "/segment")[0] == 405
    assert client.ask("POST", "/healthz", {})[0] == 405
    assert client.ask("POST", "/segment", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert client.ask("GET", "/healthz", Host="elsewhere.example")[0] == 421


def test_health_metrics_and_a_page_that_loads_nothing_from_elsewhere(client):
    status, health = client.ask("GET", "/healthz")
    assert status == 200 and {"status": "ok", "kind": "segmenter", "intended_use": "Tests."}.items() <= json.loads(health).items()
    before = client.metric("vesalius_requests_total")
    status, page = client.ask("GET", "/")
    assert status == 200 and b"<canvas" in page and not re.search(rb"(src|href)=|https?:|@import|url\(", page)
    assert client.metric("vesalius_requests_total") == before + 2  # the page, and the metrics before it
    assert client.metric("vesalius_resident_bytes") > 1 << 20


def test_what_is_too_large_is_refused(served):
    assert Client(served).ask("POST", "/segment", b" " * ((1 << 20) + 1))[0] == 413
    chunks = (
        b"POST /segment HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"10000\r\n%s\r\n" % bytes(1 << 16) * 20
    )
    assert raw(served, chunks).startswith(b"HTTP/1.1 413 ")
    assert raw(served, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert raw(served, b"\x00\xff nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert Client(served).ask("GET", "/healthz")[0] == 200


def test_a_body_that_is_announced_is_waited_for(served, picture):
    with socket.create_connection(served, WAIT) as connection:
        body = json.dumps({"image": uri(picture), "boxes": [BOX]}).encode()
        header = f"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(header.encode() + b"Expect: 100-continue\r\nConnection: close\r\n\r\n")
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_a_slow_client_is_told_and_others_do_not_wait_for_it(start):
    with start("--patience", 1) as server:
        for begun in (b"POST /seg", b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"):
            with socket.create_connection(server.address, WAIT) as slow:
                slow.sendall(begun)
                assert Client(server.address).ask("GET", "/healthz")[0] == 200
                assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert raw(server.address, b"") == b""  # who says nothing is left without an answer


def test_requests_beyond_the_queue_are_503_and_the_others_answered(start):
    with start("--queue", 1) as server:
        bodies = [json.dumps({"image": uri(large(seed)), "boxes": [BOX]}).encode() for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda body: Client(server.address).ask("POST", "/segment", body)[0], bodies))
        assert set(statuses) == {200, 503}
        assert Client(server.address).segment({"image": uri(large(0)), "boxes": [BOX]})[0] == 200


def test_requests_that_wait_together_are_answered_together(start, picture):
    with start() as server:
        first = Client(server.address)
        _, known = first.segment({"image": uri(picture), "boxes": [BOX]})
        boxes = [[x, 5, x + 30, 60] for x in range(0, 96, 6)]
        alone = [first.segment({"image_id": known["image_id"], "boxes": [box]})[1]["masks"][0] for box in boxes]
        batches, requests = (first.metric(f"vesalius_batch{kind}_total") for kind in ("es", "ed_requests"))
        with ThreadPoolExecutor(len(boxes) + 1) as pool:
            busy = pool.submit(Client(server.address).segment, {"image": uri(large(1)), "boxes": [BOX]})
            asked = [pool.submit(Client(server.address).segment, {"image_id": known["image_id"], "boxes": [box]}) for box in boxes]
            for ours, theirs in zip([done.result()[1]["masks"][0] for done in asked], alone, strict=True):
                assert (
                    abs(ours.pop("iou") - theirs.pop("iou")) < 1e-6 and ours == theirs
                )  # its last bit depends on who is answered too
            assert busy.result()[0] == 200
        batches, requests = (
            first.metric(f"vesalius_batch{kind}_total") - before for kind, before in (("es", batches), ("ed_requests", requests))
        )
        assert requests == 17 and batches < 17


def test_a_token_is_demanded_where_one_is_set(start, tmp_path, picture):
    (tmp_path / "token").write_text("secret\n")
    with start("--token_file", tmp_path / "token") as server:
        client = Client(server.address)
        assert client.ask("GET", "/")[0] == client.ask("GET", "/healthz")[0] == 200
        for authorization in ({}, {"Authorization": "Bearer secreT"}, {"Authorization": "secret"}):
            assert client.ask("GET", "/metrics", **authorization)[0] == 401
            assert client.ask("POST", "/segment", {"image": uri(picture), "boxes": [BOX]}, **authorization)[0] == 401
        allowed = {"Authorization": "Bearer secret"}
        assert client.ask("POST", "/segment", {"image": uri(picture), "boxes": [BOX]}, **allowed)[0] == 200


def test_the_audit_has_a_line_a_request_and_nothing_of_the_image(start, tmp_path, picture, small_bundle):
    file = tmp_path / "audit.jsonl"
    bodies = [json.dumps({"image": uri(picture), "boxes": [box]}).encode() for box in (BOX, [0, 0, 999, 999])]
    with start("--audit", file) as server:
        answers = [Client(server.address).ask("POST", "/segment", body) for body in bodies]
        Client(server.address).ask("GET", "/healthz")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    model = hashlib.sha256((small_bundle / "manifest.json").read_bytes()).hexdigest()
    for line, body, (status, answer) in zip(lines, bodies, answers, strict=True):
        assert line.pop("time").endswith("Z")
        hashes = {"input": hashlib.sha256(body).hexdigest(), "output": hashlib.sha256(answer).hexdigest()}
        assert line == {"route": "/segment", "status": status, "model": model, **hashes}
    assert [status for status, _ in answers] == [200, 400]


def test_sigterm_finishes_what_is_in_flight(start):
    with start() as server:
        idle = Client(server.address)
        assert idle.ask("GET", "/healthz")[0] == 200
        bodies = [json.dumps({"image": uri(large(seed)), "boxes": [BOX]}).encode() for seed in range(3)]
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(Client(server.address).ask, "POST", "/segment", body) for body in bodies]
            while idle.metric("vesalius_queue_waiting") == 0 and not all(one.done() for one in asked):
                pass  # until one is with the model and others wait
            server.send_signal(signal.SIGTERM)
            assert [one.result()[0] for one in asked] == [200, 200, 200]
        assert server.wait(WAIT) == 0
        with pytest.raises(OSError):
            socket.create_connection(server.address, WAIT)


def test_an_address_that_is_taken_is_one_line(binaries, small_bundle, served):
    command = [binaries / "vesalius-seg", small_bundle, "--serve", str(served[1])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "cannot be listened on" in ran.stderr


def exchange(address, picture, number):
    """The request of this number, a third of which are bad: whether it was answered rightly."""
    image, bad = uri(picture), number % 3 == 0
    if not bad:
        status, answer = Client(address).segment({"image": image, "boxes": [[number % 90, 5, number % 90 + 30, 60]]})
        return status == 200 and len(answer["masks"]) == 1
    kind = number // 3 % 4
    if kind == 0:
        return Client(address).segment({"image": image[: -4 * (number % 50 + 9)], "boxes": [BOX]})[0] == 400
    if kind == 1:
        return Client(address).ask("POST", "/segment", b'{"image": ' * number)[0] == 400
    if kind == 2:
        return raw(address, b"BREW /pot HTCPCP/1.0\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    with socket.create_connection(address, WAIT) as gone:  # leaves in the middle
        gone.sendall(b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
    return True


def test_two_hundred_requests_of_eight_clients_a_third_of_them_bad(start, picture):
    with start("--queue", 8) as server, ThreadPoolExecutor(8) as pool:
        for numbers in (range(100), range(100, 200)):
            assert all(pool.map(lambda number: exchange(server.address, picture, number), numbers))
            resident = Client(server.address).metric("vesalius_resident_bytes")
            if numbers.start == 0:
                after_half = resident
        assert resident - after_half < 32 << 20
        assert Client(server.address).metric("vesalius_connections") == 1  # its own
