"""The judge against a real server on a free port: what is sent, what is read, and what happens when it fails."""

import threading

import pytest

from engine.errors import InputError
from engine.evaluation.judge import PROMPTS, Judge, fill, judge_scores, read_verdict
from tests.judge_server import says, serve

CASE = {"question": "Where {x}?", "truth": "in position top left", "answer": "In the {truth} top left."}


def test_each_case_is_asked_with_the_three_prompts():
    with serve(lambda body, _: says("Yes." if "As a doctor." in body["messages"][0]["content"] else "No")) as server:
        verdicts = Judge(server.url, "qwen3", api_key="secret").judge([CASE, CASE])
    assert verdicts == [[False, True, False]] * 2
    assert {body["path"] for body in server.bodies} == {"/v1/chat/completions"}
    assert all(body["model"] == "qwen3" and body["temperature"] == 0 for body in server.bodies)
    assert sorted(body["messages"][0]["content"] for body in server.bodies) == sorted(fill(p, **CASE) for p in PROMPTS * 2)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert judge_scores(verdicts) == pytest.approx({"accuracy": 1 / 3, "std": 2**0.5 / 3, "unclear": 0})


def test_texts_with_braces_are_not_templates():
    prompt = fill(PROMPTS[0], **CASE)
    assert "Question: Where {x}?" in prompt and "Prediction: In the {truth} top left." in prompt


def test_a_busy_server_is_asked_again_and_the_reason_told_once(capsys):
    with serve(lambda body, number: says("yes") if number == 3 else (503, b"busy")) as server:
        assert Judge(server.url + "/chat/completions", "m", pause=0.01).reply("?") == "yes" and len(server.bodies) == 3
    assert capsys.readouterr().err.count("HTTP 503 busy; trying again") == 1


def test_after_a_failure_it_can_be_asked_again():
    answers = [(401, b"no key")]
    with serve(lambda *_: answers[-1] if len(answers) == 1 else answers.pop()) as server:
        judge = Judge(server.url, "m", pause=0.01)
        with pytest.raises(InputError, match="HTTP 401 no key"):
            judge.judge([CASE])
        answers[:] = [says("yes"), (503, b"busy")]
        assert judge.judge([CASE]) == [[True] * 3]


@pytest.mark.parametrize(
    "answer, requests, message",
    [
        (lambda *_: (429, b"slow\ndown"), 3, "(HTTP 429 slow down)"),
        (lambda *_: (401, {"error": "bad key"}), 1, '(HTTP 401 {"error": "bad key"})'),
        (lambda *_: (302, b"elsewhere"), 1, "(HTTP 302 elsewhere)"),
        (lambda *_: (200, b"<html>"), 1, "(not a chat completion: "),
        (lambda *_: (200, b"[" + b" " * 2**24), 1, "(not a chat completion: "),
        (lambda *_: (200, {"choices": []}), 1, "(not a chat completion: IndexError"),
    ],
)
def test_a_server_that_does_not_answer_is_one_line(answer, requests, message):
    with serve(answer) as server, pytest.raises(InputError) as error:
        Judge(server.url, "m", tries=3, pause=0.01).reply("?")
    assert f"--judge_url {server.url}: no answer from 'm' {message}" in str(error.value) and "\n" not in str(error.value)
    assert len(server.bodies) == requests


def test_a_silent_server_is_left_after_the_timeout():
    release = threading.Event()
    with serve(lambda *_: (release.wait(5), says("yes"))[1]) as server:
        with pytest.raises(InputError, match="timed out"):
            Judge(server.url, "m", tries=1, timeout=0.2).reply("?")
        release.set()


def test_no_server_is_one_line_and_ends_at_once(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(InputError, match="no answer from 'm' .*refused"):
        Judge("http://127.0.0.1:9/v1", "m", tries=2, pause=0.01).judge([CASE] * 50)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/v1", "localhost:8000", "http://", "http://host:port/v1", "http://[::1"]
)
def test_only_web_addresses_are_asked(url):
    with pytest.raises(InputError, match="expected http://HOST"):
        Judge(url, "m")


def test_a_key_that_no_header_can_hold_is_not_printed():
    with pytest.raises(InputError, match="^OPENAI_API_KEY: expected printable ASCII characters$"):
        Judge("http://127.0.0.1:9/v1", "m", api_key="secret\n")


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Yes", True),
        ("no.", False),
        ("No, although yes would", False),
        ("<think>no, or yes?</think>\n\nYes", True),
        ("<think>yes yes", None),
        ("**Yes**", True),
        ("nothing known yesterday", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_the_first_word(text, verdict):
    assert read_verdict(text) is verdict


def test_unclear_replies_count_as_no():
    assert judge_scores([[True, None, True], [True, None, None]]) == pytest.approx(
        {"accuracy": 0.5, "std": (1 / 6) ** 0.5, "unclear": 0.5}
    )
