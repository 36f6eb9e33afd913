"""A vision-language model: a file of an image and a question to a greedy answer, by our binary and by transformers' generate."""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bench.medsam_dice import read_images
from bench.serve.providers import Server, Worker, closing_all, cpu_seconds, data_uri, resident_mb, start_all
from engine.errors import InputError
from engine.progress import progress

QUESTION = "What imaging technique is used for this picture?\nA) CT, B) MRI, C) X-Ray, D) Ultrasound"
TOKENS = 64  # an answer has at most


class Case(NamedTuple):
    """A question about an image."""

    image: Path
    question: str


def prepare(data: Path, number: int, work: Path) -> list[Case]:
    """Images of the mini data set, made smaller where they have more than 280 pixels a side."""
    cases = []
    for i, (_, image, _) in zip(range(number), read_images(data), strict=False):
        image.thumbnail((280, 280), Image.Resampling.BICUBIC)
        image.save(work / f"vlm{i}.png")
        cases.append(Case(work / f"vlm{i}.png", QUESTION))
    return cases


def ask(worker: Worker, case: Case) -> tuple[str, int]:
    """The answer, and how many tokens it has."""
    if not isinstance(worker, Server):
        answer = worker.ask({"image": str(case.image), "question": case.question, "tokens": TOKENS})
        return answer["text"], answer["tokens"]
    image = {"type": "image_url", "image_url": {"url": data_uri(case.image)}}
    content = [image, {"type": "text", "text": case.question}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0}
    answer = worker.ask({"route": "/v1/chat/completions", "json": body})
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def compare(binary: Path, bundle: Path, checkpoint: Path, cases: list[Case], repetitions: int, work: Path) -> dict:
    """Answers are compared, then timed: the VLM's part of the last line."""
    eager = [sys.executable, "-m", "bench.serve.vlm_worker", str(checkpoint)]
    starts = {
        "cpp": lambda log: Server([str(binary), str(bundle), "--serve", "0"], log),
        "eager": lambda log: Worker(eager, log),
    }
    workers: dict[str, Worker] = {}
    with closing_all(workers):
        start_all(starts, workers, work)
        for case in cases:
            expected, found = (ask(workers[name], case) for name in ("eager", "cpp"))
            if found != expected:
                raise InputError(f"the greedy answers differ: {found[0]!r} by the binary, {expected[0]!r} by transformers")
        rates: dict[str, list[float]] = {name: [] for name in workers}
        for _ in progress(range(repetitions), desc="answer", unit="round"):
            for name, worker in workers.items():
                before = cpu_seconds(worker.watched)
                tokens = sum(ask(worker, case)[1] for case in cases)
                rates[name].append(tokens / max(0.01, cpu_seconds(worker.watched) - before))
        resident, _ = resident_mb(workers["cpp"].watched)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in rate.items():
        print(f"{name:12} {value:8.1f} tokens a second of CPU time")
    return {
        "vlm_tokens_per_s_cpp": round(rate["cpp"], 1),
        "vlm_tokens_per_s_eager": round(rate["eager"], 1),
        "vlm_speedup_eager": round(rate["cpp"] / rate["eager"], 2),
        "vlm_rss_mb": round(resident, 1),
    }
