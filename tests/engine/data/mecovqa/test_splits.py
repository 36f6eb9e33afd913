"""What stage 5 is asked: questions whose answers are right or wrong, about images and about regions, and those for masks."""

from collections import Counter

from engine.command.settings import DataArguments
from engine.data.mecovqa.splits import load_mecovqa_splits, load_reasoning_splits


def kinds_of(rows):
    return Counter((rows.record(i)["kind"], rows.record(i)["answer_type"]) for i in range(len(rows)))


def test_open_questions_alone_are_left_out_of_what_is_reasoned_about():
    every, reasoned = load_mecovqa_splits(DataArguments()), load_reasoning_splits(DataArguments())
    for all_rows, rows in zip(every[:2], reasoned[:2], strict=True):
        wanted = {kind: count for kind, count in kinds_of(all_rows).items() if kind[1] != "open"}
        assert set(wanted) == {("complex", "closed"), ("region", "closed"), ("grounding", None)}
        assert kinds_of(rows) == wanted
