"""A language model as judge: does the answer say the same place as the truth? (PRS-Med, arXiv:2505.11872, appendix A.3)

Three prompts are asked, each answered yes or no. accuracy of a prompt = yes / all, of the judge = mean over the prompts (the paper
reports the mean of two judges, Qwen 3 and Llama 3.1). The judge is any server that speaks OpenAI's protocol
(`engine.chat_session`). It is asked greedily; a reply counts as yes if yes is its first word that is yes or no, thoughts between
<think> tags left out. A reply with neither counts as no and is counted in `unclear`; where there is no reply, or it is no text, the
question counts as not judged.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np

from engine.chat_session import KEY_VARIABLE, ChatSession, NoText
from engine.errors import InputError
from engine.progress import progress

Verdict = bool | str | None  # yes or no; None: a reply with neither; a text: why there is none
logger = logging.getLogger(__name__)

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


@dataclass
class Judge:
    """A model behind `url` (.../v1). `timeout` is in seconds, for each of at most `tries` attempts at a question.

    A user and password or a key in the address are sent to that server, and shown nowhere; the API key goes to no other server.
    """

    url: str
    model: str
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0  # seconds before the second attempt, doubled before each further one
    workers: int = 8
    max_tokens: int = 512
    api_key: str | None = field(default_factory=lambda: os.environ.get(KEY_VARIABLE), repr=False)

    def __post_init__(self):
        options: dict[str, Any] = {"timeout": self.timeout, "tries": self.tries, "pause": self.pause}
        self.session = ChatSession(self.url, self.model, flag="--judge_url", api_key=self.api_key, **options)
        self.url = self.session.url

    def reply(self, prompt: str) -> str:
        """The model's text; errors as `ChatSession.ask`."""
        return self.session.ask([{"role": "user", "content": prompt}], temperature=0, max_tokens=self.max_tokens).text

    def judge(self, cases: Sequence[dict]) -> list[list[Verdict]]:
        """For each case {question, truth, answer}, whether each of PROMPTS was answered yes.

        Once the server gives no answer, no further question is sent: those left have that reason for a verdict. So has one whose
        reply is no text. InputError where no reply at all could be read.
        """
        prompts = [fill(prompt, **case) for case in cases for prompt in PROMPTS]
        verdicts: list[Verdict] = []
        with ThreadPool(self.workers) as pool, self.session:  # a pool that is left without waiting for its threads
            replies = pool.imap(self._verdict, prompts)
            try:
                for verdict in progress(replies, desc="judging", total=len(prompts), unit="reply"):
                    verdicts.append(verdict)
            except InputError as error:
                verdicts += [str(error)] * (len(prompts) - len(verdicts))
        reasons = Counter(verdict for verdict in verdicts if isinstance(verdict, str))
        if reasons and sum(reasons.values()) == len(verdicts):
            raise InputError(next(iter(reasons)))
        for reason, count in reasons.items():
            logger.warning("%d of %d questions were not judged: %s", count, len(verdicts), reason)
        return [verdicts[i : i + len(PROMPTS)] for i in range(0, len(verdicts), len(PROMPTS))]

    def _verdict(self, prompt: str) -> Verdict:
        try:
            return read_verdict(self.reply(prompt))
        except NoText as error:
            return str(error)


def fill(prompt: str, *, question: str, truth: str, answer: str) -> str:
    """The prompt with its three texts, which may hold braces."""
    texts = {"question": question, "truth": truth, "answer": answer}
    return re.sub(r"\{(question|truth|answer)\}", lambda match: texts[match[1]], prompt)


def read_verdict(text: str) -> bool | None:
    """Yes or no, whichever word comes first; None without either."""
    spoken = re.sub(r"(?s)<think>.*?(?:</think>|\Z)", " ", text)
    found = re.search(r"\b(yes|no)\b", spoken, re.IGNORECASE)
    return None if found is None else found[1].lower() == "yes"


def judge_scores(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float | None]:
    """accuracy (mean over the prompts), std (over the prompts) and unclear (fraction of replies); fractions of what was judged.

    Where something was not judged, also its fraction, `unjudged`; where nothing was judged, the others are None.
    """
    of_prompts = [[v for v in of_prompt if not isinstance(v, str)] for of_prompt in zip(*verdicts, strict=True)]
    judged, asked = sum(map(len, of_prompts)), sum(map(len, verdicts))
    unjudged: dict[str, float | None] = {"unjudged": 1 - judged / asked} if judged < asked else {}
    if not judged:
        return {"accuracy": None, "std": None, "unclear": None} | unjudged
    yes = np.array([np.mean([v is True for v in of_prompt]) for of_prompt in of_prompts if of_prompt])
    unclear = sum(v is None for of_prompt in of_prompts for v in of_prompt) / judged
    return {"accuracy": float(yes.mean()), "std": float(yes.std()), "unclear": unclear} | unjudged
