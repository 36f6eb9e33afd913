"""Teachers: who answers questions so that others may learn. A model here, or one behind a server that speaks OpenAI's protocol.

A teacher is called with questions and what is wanted, pairs (place of the question, number of the sample), and gives as they come
(place, number, reply), or in the reply's stead a text that says why there is none. It gives nothing that is not wanted.
"""

import base64
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image

from engine.chat_session import ChatSession, NoText, Reply, Unwanted
from engine.data.decoders.deep_png import is_deep_png
from engine.data.images import is_turned
from engine.data.questions import QuestionSet
from engine.rollout.policy import Message, Policy
from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams

Wanted = Sequence[tuple[int, int]]
Given = tuple[int, int, Reply | str]
Teacher = Callable[[QuestionSet, Wanted], Iterator[Given]]
AS_THEY_ARE = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}  # what every server reads, by how files begin
MAX_BYTES = 20 * 2**20  # of an image that is sent as it is


@dataclass(frozen=True)
class LocalTeacher:
    """A policy that answers by `sampling`: what it draws depends on `seed` and the question's place in its file alone."""

    policy: Policy
    prompt_of: Callable[[dict], list[Message]]
    sampling: SamplingParams
    max_new_tokens: int
    seed: int = 0
    batch_size: int = 32

    def __call__(self, questions: QuestionSet, wanted: Wanted) -> Iterator[Given]:
        samples: dict[int, list[int]] = {}
        for place, sample in wanted:
            samples.setdefault(place, []).append(sample)
        count = max((sample + 1 for _, sample in wanted), default=0)
        places = list(samples)
        for start in range(0, len(places), self.batch_size):
            chunk = places[start : start + self.batch_size]
            replies = self._answer([questions[place] for place in chunk], count)
            for place, of_place in zip(chunk, replies, strict=True):
                yield from ((place, sample, of_place[sample]) for sample in samples[place])

    def _answer(self, rows: list[dict], count: int) -> list[list[Reply]]:
        """So many replies to each row."""
        encode = self.policy.processor.encode
        batch = self.policy.batch([encode(self.prompt_of(row), row["images"], row["image_id"]) for row in rows])
        seeds = [zlib.crc32(f"{self.seed} {Path(row['source']).name} {row['row']}".encode()) for row in rows]
        limits = {"num_generations": count, "max_new_tokens": self.max_new_tokens}
        answers = rollout(self.policy, batch, self.sampling, seeds=seeds, **limits)
        said = zip(answers.texts(self.policy.processor), answers.truncated.tolist(), strict=True)
        replies = [Reply(text, cut_off) for text, cut_off in said]
        return [replies[i : i + count] for i in range(0, len(replies), count)]


@dataclass(frozen=True)
class RemoteTeacher:
    """The model of a chat session, asked with `request` (temperature, max_tokens); images go as data URLs, names stay here.

    `max_pixels`: larger images are made smaller. `workers`: questions on their way at once. InputError once the server gives no
    answer at all; where it refuses one question, or answers it with something else, that question has none.
    """

    session: ChatSession
    prompt_of: Callable[[dict], list[Message]]
    request: dict[str, Any]
    max_pixels: int | None = None
    workers: int = 8

    def __call__(self, questions: QuestionSet, wanted: Wanted) -> Iterator[Given]:
        def ask(pair: tuple[int, int]) -> Given:
            place, sample = pair
            try:
                return place, sample, self.session.ask(self._messages(questions, place), **self.request)
            except (NoText, Unwanted) as error:
                return place, sample, str(error)

        with ThreadPool(self.workers) as pool, self.session:  # a pool that is left without waiting for its threads
            yield from pool.imap_unordered(ask, wanted)

    def _messages(self, questions: QuestionSet, place: int) -> list[dict[str, Any]]:
        """The prompt in the form of the protocol."""
        handles = questions.handles[place]
        images = iter(handles)
        messages = []
        for message in self.prompt_of(questions.record(place) | {"images": handles}):
            content = message["content"]
            if not isinstance(content, str):
                content = [self._image(next(images)) if part["type"] == "image" else part for part in content]
            messages.append({"role": message["role"], "content": content})
        return messages

    def _image(self, handle: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_url(handle, self.max_pixels)}}


def data_url(handle: Any, max_pixels: int | None = None) -> str:
    """An image of a question as a data URL: an upright PNG or JPEG as it is, anything else, or what is too large, as PNG."""
    _, data = handle.read()
    kind = next((kind for start, kind in AS_THEY_ARE.items() if data.startswith(start)), None)
    image = handle.open()
    too_large = max_pixels is not None and image.width * image.height > max_pixels
    if kind is None or too_large or len(data) > MAX_BYTES or is_turned(data) or is_deep_png(data):
        if max_pixels is not None and too_large:
            scale = (max_pixels / (image.width * image.height)) ** 0.5
            size = [max(1, int(side * scale)) for side in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        content = io.BytesIO()
        image.save(content, "PNG")
        kind, data = "image/png", content.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
