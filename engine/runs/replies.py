"""A teacher's replies, on the disk as they come: a killed run asks only for what is missing, and asks nobody twice.

FOLDER/replies.jsonl    the first line says how the teacher is asked, each other one holds a reply:
                        {question: a digest, sample: its number, text, cut_off, image, problem}
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.chat_session import Reply
from engine.errors import InputError

NAME = "replies.jsonl"


class Replies:
    """`known` {(question, sample): reply}, those of a run before included; `add` keeps one more."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """`asked`: what decides the replies. InputError where the folder's were asked for otherwise, or its file is another's."""
        self.path, self.known = folder / NAME, dict[tuple[str, int], Reply]()
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        first, _, rest = text.partition("\n")
        head = json.dumps({"asked": dict(asked)}) + "\n"
        if head.startswith(text):  # nothing yet, or cut within its first line by a kill
            self._append(head, "w")
            return
        before = _parse(first).get("asked")
        if not isinstance(before, dict):
            raise InputError(f"{self.path}: does not hold a teacher's replies (expected another --output_dir)")
        if changed := [f"{name} {before.get(name)!r}, now {asked[name]!r}" for name in asked if before.get(name) != asked[name]]:
            raise InputError(f"{self.path}: was asked for with {'; '.join(changed)} (expected the same, or another --output_dir)")
        for line in rest.split("\n"):
            row = _parse(line)
            if isinstance(row.get("text"), str) and isinstance(row.get("sample"), int):
                self.known[str(row.get("question")), row["sample"]] = Reply(row["text"], row.get("cut_off") is True)
        if not text.endswith("\n"):  # the next reply begins on a line of its own
            self._append("\n")

    def add(self, record: Mapping[str, Any], sample: int, reply: Reply) -> None:
        """Keep a reply to a question; it is on its way to the disk when this returns."""
        self.known[digest_of(record), sample] = reply
        told = {"question": digest_of(record), "sample": sample, "text": reply.text, "cut_off": reply.cut_off}
        row = told | {"image": record["image_id"], "problem": record["problem"]}
        self._append(json.dumps(row) + "\n")  # in ASCII: half a character that a server sent is written too

    def of(self, record: Mapping[str, Any], sample: int) -> Reply | None:
        return self.known.get((digest_of(record), sample))

    def _append(self, text: str, mode: str = "a") -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:  # a full disk is told of without a name
            error.filename = str(self.path)
            raise


def digest_of(record: Mapping[str, Any]) -> str:
    """What tells a question from others: its image and its text."""
    return hashlib.sha256(f"{record['image_id']}\n{record['problem']}".encode()).hexdigest()[:24]


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # cut by a kill
        return {}
    return row if isinstance(row, dict) else {}
