"""A vision-language model: a file of an image and a question to a greedy answer, by each of several processes."""

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bench.medsam_dice import read_images
from bench.serve.providers import Server, Worker, closing_all, cpu_seconds, data_uri, peer_python, resident_mb, start_all
from engine.errors import InputError
from engine.files import cache_folder
from engine.progress import progress

QUESTION = "What imaging technique is used for this picture?\nA) CT, B) MRI, C) X-Ray, D) Ultrasound"
TOKENS = 64  # an answer has at most
SIDE = 28  # of a token, in pixels
PEERS = {"mistralrs": (), "xllamacpp": ("gguf", "safetensors"), "onnxruntime-genai": ()}  # and what they are installed with
Start = Callable[[Path], Worker]  # of a provider's process, given a file for its log


class Case(NamedTuple):
    """A question about an image."""

    image: Path
    question: str


def prepare(data: Path, number: int, work: Path) -> list[Case]:
    """Images of the mini data set, of at most 280 pixels a side and whole tokens, so that no runtime has to resize them."""
    cases = []
    for i, (_, image, _) in zip(range(number), read_images(data), strict=False):
        image.thumbnail((280, 280), Image.Resampling.BICUBIC)
        image = image.resize([max(SIDE, side // SIDE * SIDE) for side in image.size], Image.Resampling.BICUBIC)
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


def providers(binary: Path, bundle: Path, checkpoint: Path, work: Path) -> dict[str, Start]:
    """How each of them is started."""
    return {
        "cpp": lambda log: Server([str(binary), str(bundle), "--serve", "0"], log),
        "eager": lambda log: python_worker(checkpoint, log),
        **{peer: lambda log, peer=peer: peer_worker(peer, checkpoint, work / peer, log) for peer in PEERS},
    }


def python_worker(checkpoint: Path, log: Path) -> Worker:
    return Worker([sys.executable, "-m", "bench.serve.vlm_worker", str(checkpoint)], log)


def peer_worker(peer: str, checkpoint: Path, folder: Path, log: Path) -> Worker:
    python = peer_python(peer, cache_folder() / "bench", *PEERS[peer])
    return Worker([str(python), str(Path(__file__).with_name("vlm_peer.py")), peer, str(checkpoint), str(folder)], log)


def compare(starts: Mapping[str, Start], cases: list[Case], repetitions: int, work: Path) -> dict:
    """Answers are compared, then timed: the VLM's part of the last line. Ours must be eager's; of a peer's is said how many are."""
    workers: dict[str, Worker] = {}
    with closing_all(workers):
        left_out = start_all(starts, workers, work)
        expected = [ask(workers["eager"], case) for case in cases]
        same: dict[str, int] = {}
        for name in [name for name in workers if name != "eager"]:
            try:
                found = [ask(workers[name], case) for case in cases]
            except RuntimeError as error:
                left_out[name] = str(error)
                workers.pop(name).close()
                continue
            same[name] = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
            if name == "cpp" and found != expected:
                raise InputError(f"the greedy answers differ: {found!r} by the binary, {expected!r} by transformers")
        rates: dict[str, list[float]] = {name: [] for name in workers}
        for _ in progress(range(repetitions), desc="answer", unit="round"):
            for name, worker in workers.items():
                before = cpu_seconds(worker.watched)
                tokens = sum(ask(worker, case)[1] for case in cases)
                rates[name].append(tokens / max(0.01, cpu_seconds(worker.watched) - before))
        resident, _ = resident_mb(workers["cpp"].watched)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in rate.items():
        print(f"{name:18} {value:8.1f} tokens a second of CPU time; {same.get(name, len(cases))} of {len(cases)} answers eager's")
    for name, why in left_out.items():
        print(f"{name:18} left out: {why}")
    best = max((name for name in rate if name in PEERS), key=lambda name: rate[name], default=None)
    return {
        "vlm_tokens_per_s_cpp": round(rate["cpp"], 1),
        "vlm_tokens_per_s_eager": round(rate["eager"], 1),
        "vlm_speedup_eager": round(rate["cpp"] / rate["eager"], 2),
        "vlm_tokens_per_s_best_peer": round(rate[best], 1) if best else None,
        "vlm_best_peer": best,
        "vlm_tokens_per_s": {name: round(value, 1) for name, value in rate.items()},
        "vlm_same_answers": {name: f"{number} of {len(cases)}" for name, number in same.items()},
        "vlm_left_out": left_out,
        "vlm_rss_mb": round(resident, 1),
    }
