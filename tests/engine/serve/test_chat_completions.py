"""`vesalius-vlm --serve` speaks OpenAI's chat completions: whole, as events, and refusing what it does not do."""

import base64
import http.client
import io
import json
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests.engine.serve.test_vlm import answer

PATH = "/v1/chat/completions"


def png() -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def pictured(text="What is shown?", content: bytes | None = None) -> list:
    image = {"type": "image_url", "image_url": {"url": data_uri(png() if content is None else content)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def server(binaries, starter_bundle):
    command = [binaries / "vesalius-vlm", starter_bundle, "--serve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    yield json.loads(line)["address"].removeprefix("http://")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def post(server, body, raw=False):
    connection = http.client.HTTPConnection(server, timeout=120)
    try:
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode("utf-8")
        return response.status, text if raw else json.loads(text)
    finally:
        connection.close()


def test_an_answer_is_the_commands(server, binaries, starter_bundle, tmp_path):
    (tmp_path / "image.png").write_bytes(png())
    flags = ("--image", tmp_path / "image.png", "--prompt", "What is shown?", "--max-new-tokens", 16)
    expected = answer(binaries / "vesalius-vlm", starter_bundle, *flags)
    status, body = post(server, {"model": "any", "messages": pictured(), "max_tokens": 16})
    assert status == 200 and body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected["text"]}
    assert choice["finish_reason"] == expected["finish_reason"]
    counts = body["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (expected["prompt_tokens"], len(expected["tokens"]))


def test_a_stream_brings_the_same_answer_in_pieces(server):
    asked = {"messages": pictured(), "max_tokens": 16, "temperature": 0.9, "seed": 4}
    _, whole = post(server, asked)
    status, text = post(server, {**asked, "stream": True, "stream_options": {"include_usage": True}}, raw=True)
    events = text.split("\n\n")
    assert status == 200 and events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["id"] == chunks[0]["id"] for chunk in chunks)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]]
    assert len(pieces) > 4 and "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_a_stop_ends_the_text_before_it_also_across_events(server):
    asked = {"messages": pictured(), "max_tokens": 24}
    whole = post(server, asked)[1]["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:6]  # of several tokens
    status, body = post(server, {**asked, "stop": [stop, "never said"]})
    expected = whole[: whole.index(stop)]
    assert status == 200 and body["choices"][0]["message"]["content"] == expected and body["choices"][0]["finish_reason"] == "stop"
    _, text = post(server, {**asked, "stop": stop, "stream": True}, raw=True)
    chunks = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_smallest_nucleus_is_the_likeliest_token_at_any_temperature(server):
    greedy, drawn, other = (
        post(server, {"messages": pictured(), "max_tokens": 8, "seed": 5, **how})[1]["choices"][0]["message"]["content"]
        for how in ({}, {"temperature": 3, "top_p": 0}, {"temperature": 3})
    )
    assert drawn == greedy != other


def test_what_clients_send_to_ask_for_nothing_changes_nothing(server):
    usual = {"presence_penalty": 0.0, "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    system, alone, with_usual = (
        post(server, {"messages": [{"role": role, "content": "Brief."}, *pictured()], "max_tokens": 4, **more})[1]["choices"]
        for role, more in (("system", {}), ("developer", {}), ("developer", usual | {"n": 1, "logit_bias": {}}))
    )
    assert system == alone == with_usual


def test_a_conversation_goes_on_from_what_was_said(server):
    first = [{"role": "user", "content": "Hello?"}]
    further = [*first, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Hello?"}]
    alone, after = (post(server, {"messages": messages, "max_tokens": 4})[1]["usage"] for messages in (first, further))
    assert after["prompt_tokens"] > 2 * alone["prompt_tokens"]


@pytest.mark.parametrize(
    "body, complaint",
    [
        ([], "the body is no JSON object"),
        ({}, "messages: expected a list"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": ["hello"]}, "messages: expected a role and a content each"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content: expected a text or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "content: expected parts of type text or image_url"),
        ({"messages": [{"role": "user", "content": "a <|im_start|> b"}]}, "a text has '<|im_start|>'"),
        ({"messages": pictured(content=png()[:300])}, "image: "),
        ({"messages": pictured(content=b"no image")}, "image: "),
        ({"messages": pictured(), "max_tokens": 0}, "max_tokens: expected a whole number from 1"),
        ({"messages": pictured(), "max_tokens": 1.5}, "max_tokens: expected a whole number from 1"),
        ({"messages": pictured(), "max_tokens": 100000}, "together"),
        ({"messages": pictured(), "temperature": -1}, "temperature: expected a number from 0"),
        ({"messages": pictured(), "top_p": 1.5}, "top_p: expected a number from 0"),
        ({"messages": pictured(), "stop": ""}, "stop: expected a text"),
        ({"messages": pictured(), "stream": "yes"}, "stream: expected true or false"),
        ({"messages": pictured(), "n": 2, "presence_penalty": 0}, "'n' is not supported here"),
        ({"messages": pictured(), "logprobs": True}, "'logprobs' is not supported here"),
        ({"messages": pictured(), "tools": [{}]}, "'tools' is not supported here"),
        ({"messages": pictured("word " * 3000)}, "together"),
    ],
)
def test_what_cannot_be_answered_is_a_400_with_the_reason(server, body, complaint):
    status, answered = post(server, body)
    assert status == 400 and complaint in answered["error"]["message"], answered
    if isinstance(body, dict) and "stream" not in body:
        status, answered = post(server, {**body, "stream": True})
        assert status == 400 and complaint in answered["error"]["message"]  # told by the status, before the first event


def test_a_link_to_elsewhere_is_not_followed(server):
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
    status, answered = post(server, {"messages": [{"role": "user", "content": [image]}]})
    assert status == 400 and "error" in answered


def test_health_says_which_model_answers(server):
    connection = http.client.HTTPConnection(server, timeout=60)
    connection.request("HEAD", "/healthz")
    assert connection.getresponse().read() == b""
    connection.request("GET", "/healthz")
    told = json.loads(connection.getresponse().read())
    connection.request("GET", "/v1/models")
    assert [entry["id"] for entry in json.loads(connection.getresponse().read())["data"]] == [told["model"]["name"]]
    connection.close()
    assert told["kind"] == "vlm" and told["model"]["name"] == "policy"
