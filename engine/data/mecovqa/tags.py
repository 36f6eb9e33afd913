"""The tags in MeCoVQA's texts: `<image>`, `<region>FILE</region>` in a question, `<SEG> <mask>FILE</mask>` in an answer.

A question may have one region. An answer has as many masks as `<SEG>`, in their order; the published reader takes at most one.
Files are named and not opened here. Reading is linear in the length of the text, whatever the text.
"""

import re
from dataclasses import dataclass

from engine.data.formats.text import is_unicode
from engine.data.rows import BadRow

SEG = "<SEG>"
SHOWN_REGION = "[region]"  # what stands for a region in a text that a person reads
_TAG = re.compile(r"(<image>|</?region>|</?mask>)")
_MASK_FORM = "<SEG> <mask>masks/NAME.png</mask>"
_REGION_FORM = "<region>masks/NAME.png</region>"
MAX_TEXT = 100_000  # characters of a text

Part = dict[str, str]  # {"type": "text", "text": ...} or {"type": "region"}


@dataclass(frozen=True)
class Question:
    """`parts`: text and at most one region, in their order; `region`: its file; `images`: how often `<image>` stands there."""

    parts: list[Part]
    region: str | None
    images: int

    @property
    def text(self) -> str:
        """As a person reads it."""
        return "".join(SHOWN_REGION if part["type"] == "region" else part["text"] for part in self.parts)


def read_question(text: str) -> Question:
    """What a question says and names; BadRow for tags that do not pair, a mask, a second region, no words."""
    pieces, parts, region, images = iter(_pieces(text, "question")), [], None, 0
    for piece in pieces:
        if piece == "<image>":
            images += 1
        elif piece == "<region>":
            if region is not None:
                raise BadRow("a question with two regions", f"at most one {_REGION_FORM}")
            region = _named(pieces, "region", _REGION_FORM)
            parts.append({"type": "region"})
        elif _TAG.fullmatch(piece):
            raise BadRow(f"{piece} in a question", f"text, <image>, {_REGION_FORM}")
        elif parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        else:
            parts.append({"type": "text", "text": piece})
    parts = _stripped(parts)
    if not any(part["type"] == "text" for part in parts):
        raise BadRow("empty question", "words beside the tags")
    return Question(parts, region, images)


def read_answer(text: str) -> tuple[str, list[str]]:
    """(the answer with `<SEG>` and without mask tags, the files of its masks); BadRow where these do not go together."""
    pieces, words, masks = iter(_pieces(text, "answer")), [], []
    for piece in pieces:
        if piece == "<mask>":
            masks.append(_named(pieces, "mask", _MASK_FORM))
        elif _TAG.fullmatch(piece):
            raise BadRow(f"{piece} in an answer", f"text, {_MASK_FORM}")
        else:
            words.append(piece)
    answer = re.sub(r"[ \t]+", " ", "".join(words)).strip()
    if not answer:
        raise BadRow("empty answer", "text" if not masks else f"{_MASK_FORM}: {SEG} where the mask is to be drawn")
    if answer.count(SEG) != len(masks):
        raise BadRow(f"an answer with {len(masks)} masks and {answer.count(SEG)} {SEG}", f"as many of either: {_MASK_FORM}")
    return answer, masks


def without_image(text: str) -> str:
    """A caption without its `<image>`."""
    return text.replace("<image>", "").strip()


def _pieces(text: object, what: str) -> list[str]:
    """The tags of a text, and what stands between them."""
    if not isinstance(text, str):
        raise BadRow(f"{what} is not text", f"text in the turn's 'value', not a {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise BadRow(f"{what} of {len(text):,} characters", f"at most {MAX_TEXT:,}")
    if not is_unicode(text):
        raise BadRow(f"{what} has half a character", "Unicode text")
    return [piece for piece in _TAG.split(text) if piece]


def _named(pieces, tag: str, form: str) -> str:
    """The file between an opening tag that was read and its closing one."""
    name, closing = next(pieces, ""), next(pieces, "")
    if closing != f"</{tag}>" or not name.strip() or _TAG.fullmatch(name):
        raise BadRow(f"<{tag}> without a file and </{tag}>", form)
    return name.strip()


def _stripped(parts: list[Part]) -> list[Part]:
    """Without white space at either end, and without texts of nothing else there."""
    while parts and parts[0]["type"] == "text" and not parts[0]["text"].strip():
        parts = parts[1:]
    while parts and parts[-1]["type"] == "text" and not parts[-1]["text"].strip():
        parts = parts[:-1]
    if parts and parts[0]["type"] == "text":
        parts[0]["text"] = parts[0]["text"].lstrip()
    if parts and parts[-1]["type"] == "text":
        parts[-1]["text"] = parts[-1]["text"].rstrip()
    return parts
