"""A chat template as segments of text, which any program can put together: no Jinja is needed where the bundle runs.

A conversation is `opening`, where it does not begin with a system message, then for each message what stands before its role's
content, the content, and what stands after it, then `answer`. An image within a content is `image`. That this gives the template's
own text is tried out on several conversations; a template of another form is refused.
"""

from typing import Any

from models.checkpoint import CheckpointError
from models.qwen.processor import IMAGE_TOKEN, Message, QwenProcessor

ROLES = ("system", "user", "assistant")
MARKS = [f"\ue000{number}\ue001" for number in range(4)]  # private characters, which no template has


def chat_segments(processor: QwenProcessor) -> dict[str, Any]:
    """`opening`, `roles` {role: [before, after]}, `image`, `answer`; CheckpointError where the template is of another form."""
    form = "expected what stands around a message to depend on its role alone"
    try:
        segments = _segments(processor)
        wrong = next((one for one in _trials() if join(segments, one) != _render(processor, one)), None)
    except Exception as error:  # a template is a program, and may raise anything
        raise CheckpointError(f"the chat template cannot be rendered to segments: {str(error).splitlines()[0]} ({form})") from None
    if wrong is not None:
        raise CheckpointError(f"the chat template cannot be rendered to segments ({form})")
    return segments


def join(segments: dict[str, Any], messages: list[Message]) -> str:
    """The text of a conversation."""
    text = "" if messages[0]["role"] == "system" else segments["opening"]
    for message in messages:
        before, after = segments["roles"][message["role"]]
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", segments["image"]) for part in content]
        text += before + "".join(parts) + after
    return text + segments["answer"]


def _segments(processor: QwenProcessor) -> dict[str, Any]:
    first, second, third = MARKS[:3]
    head, tail = _render(processor, [_says("system", first)], answer=False).split(first)
    roles = {"system": [head, tail]}
    # system first, user second, assistant third, user again
    turns = [_says(role, mark) for role, mark in zip(("system", "user", "assistant", "user"), MARKS, strict=True)]
    whole = _render(processor, turns, answer=False)
    before_user = _between(whole, first, second).removeprefix(tail)
    after_user = whole.split(MARKS[3])[1]
    before_assistant = _between(whole, second, third).removeprefix(after_user)
    roles["user"] = [before_user, after_user]
    roles["assistant"] = [before_assistant, _between(whole, third, MARKS[3]).removesuffix(before_user)]
    alone = [_says("user", first)]
    opening = _render(processor, alone, answer=False).split(first)[0].removesuffix(before_user)
    answer = _render(processor, alone).removeprefix(_render(processor, alone, answer=False))
    pictured = _render(processor, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": first}]}])
    image = pictured.split(first)[0].removeprefix(opening + before_user)
    if image.count(IMAGE_TOKEN) != 1:
        raise ValueError(f"an image is {image!r}")
    return {"opening": opening, "roles": roles, "image": image, "answer": answer}


def _trials() -> list[list[Message]]:
    image, text = {"type": "image"}, {"type": "text", "text": " Is it\n a lesion? "}
    several: Message = {"role": "user", "content": [text, image, image, text]}
    answered = [several, _says("assistant", "Yes."), _says("user", "Where?")]
    return [
        [{"role": "user", "content": [image, text]}],
        answered,
        [_says("system", "Be brief."), *answered],
        [_says("user", " spaces \n around "), _says("assistant", "\n"), several],
    ]


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _between(text: str, first: str, second: str) -> str:
    return text.split(first)[1].split(second)[0]


def _render(processor: QwenProcessor, messages: list[Message], *, answer: bool = True) -> str:
    return str(processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
