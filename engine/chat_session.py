"""Questions to a model behind a server that speaks OpenAI's protocol: vLLM, SGLang, Ollama, llama.cpp, OpenAI.

`POST URL/chat/completions`, by `engine.http_session`: sent again where that may help, of bounded length, keys in no message.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.http_session import HTTPSession, Refused, is_web_address, shown_address

KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_REPLY = 2**20  # bytes
OF_THE_QUESTION = {400, 413, 415, 422}  # HTTP status codes that blame what was sent, and may not come again for another question


class NoText(InputError):
    """One reply that cannot be read; the next may be better."""


class Unwanted(InputError):
    """One question that the server will not answer; it may answer the next."""


@dataclass(frozen=True)
class Reply:
    """What a model said. `cut_off`: it was not at its end at the longest length allowed."""

    text: str
    cut_off: bool = False


class ChatSession:
    """The model `model` behind `url` (.../v1), which the flag `flag` named; options as those of `HTTPSession`.

    A user and password or a key in the address are sent to that server, and shown nowhere; the API key, in the environment's
    variable `key_variable`, goes to no other server. Threads may share a session, as an `HTTPSession`.
    """

    def __init__(
        self, url: str, model: str, *, flag: str, api_key: str | None = None, key_variable: str = KEY_VARIABLE, **options: Any
    ) -> None:
        if not is_web_address(url):
            raise InputError(f"{flag} {shown_address(url)}: expected http://HOST[:PORT]/v1 or https://...")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InputError(f"{key_variable}: expected printable ASCII characters")
        address, mark, query = url.partition("?")
        address = address.rstrip("/").removesuffix("/chat/completions")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = HTTPSession(address + mark + query, headers=headers, **options)
        self.url, self.model, self.flag = self.http.url, model, flag

    def __enter__(self) -> "ChatSession":
        self.http.__enter__()
        return self

    def __exit__(self, *of_exception: object) -> None:
        self.http.__exit__(*of_exception)

    def ask(self, messages: list[dict[str, Any]], **request: Any) -> Reply:
        """The model's reply. InputError, which names server and reason, where it gives none; see NoText and Unwanted."""
        kind: type[InputError]
        body = {"model": self.model, "messages": messages, **request}
        try:
            return read_reply(self.http.read("POST", "/chat/completions", LONGEST_REPLY, json=body))
        except Refused as error:
            kind, reason = Unwanted if error.status in OF_THE_QUESTION else InputError, str(error)
        except OSError as error:
            kind, reason = InputError, str(error)
        except ValueError as error:
            kind, reason = NoText, f"not a chat completion: {self.http.hide(str(error))[:200]}"
        raise kind(f"{self.flag} {self.url}: no answer from {self.model!r} ({reason})")


def key_in(variable: str | None) -> str | None:
    """The API key in a variable of the environment; None names OPENAI_API_KEY, which need not be there.

    InputError where another is not: without the name, for which a key may have been given.
    """
    if variable is not None and not os.environ.get(variable):
        raise InputError("--api_key_env: the environment has no such variable (expected the name of one that holds the API key)")
    return os.environ.get(variable or KEY_VARIABLE) or None


def read_reply(data: bytes) -> Reply:
    """A chat completion, whose text may come in parts; ValueError, saying what it is, if it is something else.

    Reasoning that the server has taken out of the text (`reasoning_content`, `reasoning`) stands before it again, in think tags.
    """
    try:
        reply = json.loads(data)
        if isinstance(reply, dict) and "choices" not in reply and "error" in reply:
            error = reply["error"]
            raise ValueError(error["message"] if isinstance(error, dict) and "message" in error else error)
        choice = reply["choices"][0]
        message = choice["message"]
        content = message["content"]
        cut_off = choice.get("finish_reason") == "length"
        reasoning = message.get("reasoning_content") or message.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the message's content is no text: {content!r:.80}")
    text = "".join(texts)
    if isinstance(reasoning, str) and reasoning.strip() and "<think>" not in text:
        text = f"<think>{reasoning.strip()}</think>{text}"
    return Reply(text, cut_off)
