"""`recipes.medvlm_r1_distill`: right answers of a file, a server or a small model become a set, which `medr1_sft` trains on."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.chat_session import ChatSession, Reply, read_reply
from engine.command.main import run_command
from engine.data.questions import load_questions
from engine.errors import InputError
from models.loading import load_policy
from recipes.medr1_sft import main as fine_tune
from recipes.medvlm_r1_distill import main
from tests.judge_server import says, serve
from tests.tiny_qwen import noise_image, save_tiny

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "BACABC"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def data(tmp_path) -> Path:
    """Six questions; the letter of question i is LETTERS[i]."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    rows = []
    for i, letter in enumerate(LETTERS):
        noise_image(i).save(tmp_path / "data" / "images" / f"{i}.png")
        listed = ["CT", "MRI", "X-Ray"]
        rows.append({"image": f"images/{i}.png", "problem": f"Which is {i}?", "options": listed, "solution": letter})
        rows[-1]["modality"] = "MRI" if i < 4 else "CT"
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def right(i: int, words: str = "I look.") -> str:
    return f"<think>{words}</think><answer>{LETTERS[i]}</answer>"


def number_of(body: dict) -> int:
    """Which of the questions a request asks."""
    (text,) = (part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
    return int(re.search(r"Which is (\d)\?", text)[1])


def asking(server, data, output, *flags) -> list[str]:
    where = ["--endpoint", server.url, "--teacher_model", "big", "--data", str(data), "--output_dir", str(output)]
    return [*where, "--samples", "1", "--timeout", "5", *flags]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_answers_becomes_a_set_that_fine_tuning_learns(data, tmp_path):
    """Kept, listed and counted; a few steps of medr1_sft learn exactly what was kept, asked for a thought."""
    rows = json.loads((data / "train.json").read_text())
    given = [
        {"completions": [right(0, "one"), right(0, "two"), right(0, "one")]},
        {"completion": right(1)},
        {"completion": "<think>no</think><answer>A</answer>"},
        {"completion": "A"},
        {"completions": [right(4), "<think>x</think><answer>A or B</answer>"]},
        {"completion": right(5)},
    ]
    answers = data / "teacher.jsonl"
    answers.write_text("\n".join(json.dumps(row | own) for row, own in zip(rows, given, strict=True)))
    output = tmp_path / "taught"
    headline = main(["--answers", str(answers), "--per_question", "2", "--output_dir", str(output)])
    expected = {"questions": 6, "answers": 9, "kept": 5, "questions_kept": 4}
    assert {key: headline[key] for key in expected} == expected
    assert headline["rejected"] == {"form": 1, "unreadable": 1, "wrong": 1, "duplicate": 1}
    assert {name: own["kept"] for name, own in headline["by_modality"].items()} == {"CT": 2, "MRI": 3}
    kept = lines(output / "train.jsonl")
    assert [row["completion"] for row in kept] == [right(0, "one"), right(0, "two"), right(1), right(4), right(5)]
    assert [row["original"] for row in kept] == ["0.png", "0.png", "1.png", "4.png", "5.png"]
    assert len(list((output / "images" / "train").iterdir())) == 4
    rejected = lines(output / "rejected.jsonl")
    assert [(line["row"], line["reason"], line["read"]) for line in rejected] == [
        (0, "duplicate", "B"), (2, "wrong", "A"), (3, "form", None), (4, "unreadable", None)
    ]  # fmt: skip
    report = json.loads((output / "report.json").read_text())
    assert report["rejected"] == headline["rejected"] and report["by_modality"] == headline["by_modality"]
    assert "answers by modality" in (output / "report.html").read_text().lower()

    again = load_questions(output)
    assert [row["answer"] for row in again.records] == ["B", "B", "A", "B", "C"]
    assert [row["options"] for row in again.records] == [{"A": "CT", "B": "MRI", "C": "X-Ray"}] * 5
    assert again[3]["images"][0].tobytes() == Image.open(data / "images" / "4.png").convert("RGB").tobytes()

    flags = "--max_steps 4 --per_device_train_batch_size 5 --gradient_accumulation_steps 1 --learning_rate 0.003 --use_cpu true"
    model = save_tiny(tmp_path / "model")
    chosen = ["--dataset_name", str(output), "--model_name_or_path", model, "--eval_dataset_name", str(data / "train.json")]
    run = tmp_path / "student"
    fine_tune([*chosen, *flags.split(), "--max_completion_length", "4", "--eval_limit", "2", "--output_dir", str(run)])
    assert json.loads((run / "evaluation_after.json").read_text())["template"] == "medr1_train_think"
    metrics = lines(run / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    learnt = load_policy(model, dtype=torch.float32).processor.answer_ids([row["completion"] for row in kept])
    assert metrics[0]["answer_tokens"] == sum(map(len, learnt))


def test_answers_of_our_own_evaluation_are_taught(data, tmp_path):
    """evaluation.json of medvlm_r1_eval, its images named by --image_root; one answer in it is made right."""
    from recipes.medvlm_r1_eval import main as evaluate

    flags = ["--model", save_tiny(tmp_path / "model"), "--data", str(data), "--split", "train", "--max_new_tokens", "2"]
    evaluate([*flags, "--output_dir", str(tmp_path / "run"), "--output_path", str(tmp_path / "published.json")])
    for path in (tmp_path / "run" / "evaluation.json", tmp_path / "published.json"):
        written = json.loads(path.read_text())
        for i, result in enumerate(written["results"][:2]):
            result["model_output"] = right(i)
        path.write_text(json.dumps(written))
        output = tmp_path / f"taught_{path.stem}"
        headline = main(["--answers", str(path), "--image_root", str(data), "--output_dir", str(output)])
        assert (headline["questions"], headline["kept"]) == (6, 2)
        assert [row["completion"] for row in lines(output / "train.jsonl")] == [right(0), right(1)]


def test_a_server_is_shown_question_and_image_and_its_reasoning_is_kept(data, tmp_path, monkeypatch):
    def answer(body, _):
        i = number_of(body)
        if i == 5:  # as servers with a parser of reasoning have it
            message = {"content": f"<answer>{LETTERS[i]}</answer>", "reasoning_content": "I look."}
        else:
            message = {"content": [{"type": "text", "text": right(i)[:9]}, {"type": "text", "text": right(i)[9:]}]}
        return 200, {"choices": [{"message": message, "finish_reason": "length" if i == 4 else "stop"}]}

    monkeypatch.setenv("TEACHER_KEY", "sk-very-secret")
    with serve(answer) as server:
        flags = ["--api_key_env", "TEACHER_KEY", "--temperature", "0.5", "--max_new_tokens", "99", "--max_pixels", "900"]
        headline = main(asking(server, data, tmp_path / "out", *flags))
    assert headline["kept"] == 5 and headline["rejected"] == {"cut off": 1}
    assert {row["completion"] for row in lines(tmp_path / "out" / "train.jsonl")} == {right(i) for i in (0, 1, 2, 3, 5)}
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-very-secret"}
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.5, 99)
        image, text = body["messages"][0]["content"]
        assert "<think>" in text["text"] and "B) MRI" in text["text"]
        kind, _, encoded = image["image_url"]["url"].partition(",")
        sent = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert kind == "data:image/png;base64" and 0 < sent.width * sent.height <= 900
    written = "".join(path.read_text() for path in (tmp_path / "out").glob("*.*"))
    assert "sk-very-secret" not in written


def test_a_server_in_trouble_costs_no_more_than_the_questions_concerned(data, tmp_path, capsys):
    """Busy, failing, broken off, endless, no JSON, refused: the first three are asked again, the others have no answer."""
    seen: dict[int, int] = {}

    def answer(body, _):
        i = number_of(body)
        seen[i] = seen.get(i, 0) + 1
        first = seen[i] == 1
        if i == 0 and first:
            return 429, b"slow down", {"Retry-After": "2"}
        if i == 1 and first:
            return 500, b"oops"
        if i == 2 and first:
            return 200, iter([b'{"choices": [{"mess']), {"Content-Length": "500"}
        if i == 3:
            return 200, repeat(b" " * 65536)
        if i == 4:
            return 200, b'{"choices": [{"message"'
        if i == 5:
            return 400, {"error": "image too large"}
        return says(right(i))

    with serve(answer) as server:
        began = time.monotonic()
        headline = main(asking(server, data, tmp_path / "out"))
        assert time.monotonic() - began > 2, "the server asked for two seconds"
    assert headline["kept"] == 3 and headline["rejected"] == {"no answer": 3}
    assert seen == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}
    why = {line["row"]: line["why"] for line in lines(tmp_path / "out" / "rejected.jsonl")}
    assert "not a chat completion" in why[3] and "not a chat completion" in why[4] and 'HTTP 400 {"error": "image too' in why[5]
    err = capsys.readouterr().err
    assert "HTTP 429 slow down; trying again" in err and "HTTP 500 oops; trying again" in err


def test_what_had_no_answer_is_asked_again_and_nothing_else_is(data, tmp_path):
    broken = {3}

    def answer(body, _):
        i = number_of(body)
        return (200, b"<html>") if i in broken else says(right(i))

    with serve(answer) as server:
        assert main(asking(server, data, tmp_path / "out"))["kept"] == 5
        broken.clear()
        before = len(server.bodies)
        assert main(asking(server, data, tmp_path / "out"))["kept"] == 6
        assert [number_of(body) for body in server.bodies[before:]] == [3]
        before = len(server.bodies)
        flags = ["--samples", "2", "--per_question", "2"]  # one more of each
        headline = main(asking(server, data, tmp_path / "out", *flags))
        assert len(server.bodies) - before == 6 and headline["rejected"] == {"duplicate": 6}
        with pytest.raises(
            InputError, match=r"was asked for with temperature 1.0, now 0.5 \(expected the same, or another --output"
        ):
            main(asking(server, data, tmp_path / "out", "--temperature", "0.5"))


def test_a_run_killed_in_the_middle_asks_only_for_what_is_missing(data, tmp_path):
    output, kill = tmp_path / "out", True

    def answer(body, number):
        if kill and number > 3:
            while len(lines(output / "replies.jsonl")) < 3:  # the next is asked for while the last one is written
                time.sleep(0.01)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        return says(right(number_of(body)))

    with serve(answer) as server:
        flags = asking(server, data, output, "--workers", "1")
        command = [sys.executable, "-m", "recipes.medvlm_r1_distill", *flags]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL and len(server.bodies) == 4
        kill = False
        known = {line["problem"] for line in lines(output / "replies.jsonl")[1:]}
        assert 2 <= len(known) <= 3 and not (output / "train.jsonl").exists()
        with open(output / "replies.jsonl", "r+b") as file:  # and its last line is cut
            file.seek(-20, os.SEEK_END)
            file.truncate()
        assert main(flags)["kept"] == 6
        asked = [number_of(body) for body in server.bodies[4:]]
    assert sorted(asked) == sorted(set(range(6)) - {int(re.search(r"\d", text)[0]) for text in sorted(known)[:-1]})


@pytest.mark.parametrize(
    "answer, requests, message",
    [
        (lambda *_: (401, b"no such key"), None, "no answer from 'big' (HTTP 401 no such key)"),
        (lambda *_: (404, b"no such model"), None, "no answer from 'big' (HTTP 404 no such model)"),
        (lambda *_: (200, b"<html>"), 6, "no answer from 'big' (not a chat completion: "),
        (lambda *_: (400, b"no such model"), 6, "no answer from 'big' (HTTP 400 no such model)"),
        (lambda *_: (429, b"come back", {"Retry-After": "3600"}), None, "(HTTP 429 come back (come back in 3600 s))"),
        (lambda *_: says("It is C."), 6, "none of 6 answers can be kept (form 6; see rejected.jsonl)"),
    ],
)
def test_a_server_that_is_of_no_use_is_one_line(data, tmp_path, answer, requests, message):
    with serve(answer) as server, pytest.raises(InputError) as error:
        main(asking(server, data, tmp_path / "out", "--workers", "1"))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert requests is None or len(server.bodies) == requests
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_the_starter_policy_teaches_by_itself_and_goes_on(tmp_path, capsys):
    """What it draws does not depend on how far a run has come: with half of its replies gone, the same set again."""
    flags = ["--limit", "12", "--samples", "3", "--output_dir", str(tmp_path), "--max_new_tokens", "40"]
    headline = main(flags)
    assert headline["answers"] == 36 and 0 < headline["kept"] <= headline["questions"] == 12
    whole = (tmp_path / "train.jsonl").read_text()
    kept = (tmp_path / "replies.jsonl").read_text().splitlines()
    (tmp_path / "replies.jsonl").write_text("\n".join(kept[:20]))
    assert main([*flags, "--batch_size", "5"])["kept"] == headline["kept"]
    assert (tmp_path / "train.jsonl").read_text() == whole


def test_a_chat_completion_is_read_however_it_comes():
    def read(message, **choice):
        return read_reply(json.dumps({"choices": [{"message": message, **choice}]}).encode())

    assert read({"content": "a"}) == Reply("a") and read({"content": None}) == Reply("")
    assert read({"content": "a"}, finish_reason="length") == Reply("a", cut_off=True)
    assert read({"content": "a", "reasoning": " b "}) == Reply("<think>b</think>a")
    assert read({"content": "<think>a</think>", "reasoning_content": "b"}) == Reply("<think>a</think>")
    for broken in (
        b"[]",
        b"{}",
        b'{"choices": [3]}',
        b'{"choices": [{"message": 3}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
    ):
        with pytest.raises(ValueError):
            read_reply(broken)
    with pytest.raises(InputError, match="expected http://HOST"):
        ChatSession("localhost", "m", flag="--endpoint")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--answers", "a.jsonl", "--data", "d"], "--answers and --data: expected one of them"),
        (["--endpoint", "http://x/v1"], "--endpoint and --teacher_model belong together"),
        (["--endpoint", "http://x/v1", "--teacher_model", "m", "--model", "n"], "--endpoint and --model: expected one of them"),
        (["--endpoint", "x/v1", "--teacher_model", "m"], "--endpoint x/v1: expected http://HOST"),
        (["--api_key_env", "X"], "--api_key_env needs --endpoint"),
        (["--temperature", "0"], "--samples 4: the likeliest answers are all the same (expected a --temperature above 0)"),
        (["--form", "long"], "invalid choice: 'long'"),
        (["--answers", "gone.jsonl"], "gone.jsonl: no such file (expected a .json or .jsonl file of answers"),
        (["--answers", "out/train.jsonl", "--output_dir", "out"], "--output_dir out/train.jsonl: is the file that --answers names"),
    ],
)
def test_a_mistake_in_flags_is_one_line_and_nothing_is_written(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(main, flags)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_key_given_in_place_of_its_variables_name_is_not_printed(capsys):
    flags = ["--endpoint", "http://127.0.0.1:9/v1", "--teacher_model", "m", "--limit", "1", "--api_key_env", "hf_SECRET"]
    with pytest.raises(SystemExit):
        run_command(main, flags)
    err = capsys.readouterr().err
    assert "--api_key_env: the environment has no such variable" in err and "SECRET" not in err
