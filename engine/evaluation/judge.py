"""A language model as judge: does the answer say the same place as the truth? (PRS-Med, arXiv:2505.11872, appendix A.3)

Three prompts are asked, each answered yes or no. accuracy of a prompt = yes / all, of the judge = mean over the prompts (the paper
reports the mean of two judges, Qwen 3 and Llama 3.1). The judge is any server that speaks OpenAI's protocol (vLLM, SGLang, Ollama,
llama.cpp, OpenAI): `POST URL/chat/completions`. It is asked greedily; a reply counts as yes if yes is its first word that is yes or
no, thoughts between <think> tags left out. A reply with neither counts as no and is counted in `unclear`.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

import numpy as np

from engine.errors import InputError
from engine.http_session import HTTPSession, is_web_address
from engine.progress import progress

INSTRUCTION = "Instruction: Answer the question related to the position content, return only yes or no.\n"
PROMPTS = (  # the appendix's, as a public re-implementation transcribes them
    "As a medical image specialist.\n" + INSTRUCTION + "Given the following question and answer with the ground truth, is the "
    "position in the answer similar or same with the ground truth and match with the question?\n\nQuestion: {question}\n"
    "Ground Truth: {truth}\nPrediction: {answer}\n\nReturn yes if they are similar. Return no if they are different.",
    "As a doctor.\n" + INSTRUCTION + "Check if the location information provided in the prediction aligns with the position "
    "mentioned in the ground truth and is relevant to the question.\n\nQuestion: {question}\nGround Truth: {truth}\n"
    "Prediction: {answer}\n\nRespond with Yes if the positions are similar. Respond with No if they are different.",
    "As you are a doctor and you are looking to the medical image.\n" + INSTRUCTION + "Evaluate whether the predicted answer "
    "captures the same or similar positional context as the ground truth, based on the provided question.\n\nQuestion: {question}\n"
    'Groundtruth: {truth}\nPrediction: {answer}\n\nAnswer with "Yes" if the position is similar, otherwise "No".',
)
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_REPLY = 2**20  # bytes


@dataclass
class Judge:
    """A model behind `url` (.../v1). `timeout` is in seconds, for each of at most `tries` attempts at a question."""

    url: str
    model: str
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0  # seconds before the second attempt, doubled before each further one
    workers: int = 8
    max_tokens: int = 512
    api_key: str | None = field(default_factory=lambda: os.environ.get(KEY_VARIABLE), repr=False)

    def __post_init__(self):
        if not is_web_address(self.url):
            raise InputError(f"--judge_url {self.url}: expected http://HOST[:PORT]/v1 or https://...")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError(f"{KEY_VARIABLE}: expected printable ASCII characters")
        self.url = self.url.rstrip("/").removesuffix("/chat/completions")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        self.session = HTTPSession(self.url, timeout=self.timeout, tries=self.tries, pause=self.pause, headers=headers)

    def reply(self, prompt: str) -> str:
        """The model's text. InputError, naming the server and the reason, where it gives none."""
        messages = [{"role": "user", "content": prompt}]
        question = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        try:
            return _text_of(self.session.read("POST", "/chat/completions", LONGEST_REPLY, json=question))
        except OSError as error:
            reason = str(error)
        except ValueError as error:
            reason = f"not a chat completion: {error}"
        raise InputError(f"--judge_url {self.url}: no answer from {self.model!r} ({reason})")

    def judge(self, cases: Sequence[dict]) -> list[list[bool | None]]:
        """For each case {question, truth, answer}, whether each of PROMPTS was answered yes; None where unclear.

        The first question that gets no answer ends it all with an InputError; no further ones are sent.
        """
        prompts = [fill(prompt, **case) for case in cases for prompt in PROMPTS]
        with ThreadPool(self.workers) as pool, self.session:  # a pool that is left without waiting for its threads
            replies = pool.imap(self.reply, prompts)
            shown = progress(replies, desc="judging", total=len(prompts), unit="reply")
            verdicts = [read_verdict(text) for text in shown]
        return [verdicts[i : i + len(PROMPTS)] for i in range(0, len(verdicts), len(PROMPTS))]


def fill(prompt: str, *, question: str, truth: str, answer: str) -> str:
    """The prompt with its three texts, which may hold braces."""
    texts = {"question": question, "truth": truth, "answer": answer}
    return re.sub(r"\{(question|truth|answer)\}", lambda match: texts[match[1]], prompt)


def read_verdict(text: str) -> bool | None:
    """Yes or no, whichever word comes first; None without either."""
    spoken = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", " ", text)
    found = re.search(r"\b(yes|no)\b", spoken, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def judge_scores(verdicts: Sequence[Sequence[bool | None]]) -> dict[str, float]:
    """accuracy (mean over the prompts), std (over the prompts) and unclear (fraction of replies); fractions."""
    yes = np.array([[verdict is True for verdict in of_case] for of_case in verdicts], dtype=float).mean(axis=0)
    unclear = np.mean([[verdict is None for verdict in of_case] for of_case in verdicts])
    return {"accuracy": float(yes.mean()), "std": float(yes.std()), "unclear": float(unclear)}


def _text_of(data: bytes) -> str:
    """The text of a chat completion; ValueError if it is something else."""
    try:
        return json.loads(data)["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from None
