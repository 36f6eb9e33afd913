"""Answers with masks: the text is the greedy one, and each mask that of the state which said its `<SEG>`."""

import numpy as np
import pytest
import torch

from engine.rollout.answers import GreedyAnswers
from engine.rollout.grounded import GroundedAnswers, draw_masks
from tests.engine.training.grounding_run import DrawTask, build, rows
from tests.engine.training.test_grounding import in_float64, states_of

TASK = DrawTask()


@pytest.fixture(scope="module", params=["llava", "unimed"])
def policy(request):
    return build(request.param)


def by_hand(policy, row, answer_ids):
    """Levels of the masks of one answer, from one row read from end to end at once."""
    own = in_float64(policy)
    own.model.float()
    encoded = policy.processor.encode(TASK.prompt(row), row["images"], None)
    with torch.no_grad():
        states, _, batch = states_of(own, {"encoded": encoded, "answer_ids": answer_ids})
        places = [t for t, token in enumerate(answer_ids) if token == policy.seg_token_id]
        logits, _ = own.mask_logits(batch, states[places], [0] * len(places))
    return [(mask.sigmoid() * 255).numpy() for mask in logits]


def test_masks_of_given_answers_are_those_of_a_plain_forward(policy):
    """Three prompts with images of different sizes and two answers each: one, two and no masks."""
    data, seg = rows(3), policy.seg_token_id
    plain = policy.processor.text_ids("it is there")
    said = [[seg, *plain], plain, [*plain, seg, *plain, seg], [*plain, seg], plain, plain[:1]]
    T = max(map(len, said))
    ids = torch.full((6, T), policy.pad_token_id)
    mask = torch.zeros(6, T)
    for row, own in enumerate(said):
        ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
    batch = policy.batch([policy.processor.encode(TASK.prompt(row), row["images"], None) for row in data])
    drawn = draw_masks(policy, batch, ids.view(3, 2, T), mask)
    assert [len(masks) for masks in drawn] == [1, 0, 2, 1, 0, 0]
    for i, (own, masks) in enumerate(zip(said, drawn, strict=True)):
        row = data[i // 2]
        expected = by_hand(policy, row, own) if masks else []
        for found, wanted in zip(masks, expected, strict=True):
            assert found.dtype == np.uint8 and found.shape == row["images"][0].size[::-1]
            assert np.abs(found - wanted).max() < 0.6 and np.ptp(found) > 0


def test_equal_answers_are_drawn_once_and_share_their_masks(policy, monkeypatch):
    """Eight answers to each of two prompts. What comes behind the last `<SEG>` that counts makes no difference."""
    data, seg, ends = rows(2), policy.seg_token_id, policy.eos_token_ids[0]
    plain = policy.processor.text_ids("it is there")
    first = [[seg, ends], [seg, *plain], [*plain, seg], [seg, ends]] * 2
    second = [[seg, ends]] * 7 + [[seg, seg]]
    T = max(map(len, first + second))
    ids, mask = torch.full((16, T), policy.pad_token_id), torch.zeros(16, T)
    for row, own in enumerate(first + second):
        ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
    mask[-1, 1:] = 0  # its second <SEG> does not count
    asked, mask_logits = [], policy.mask_logits

    def counted(batch, states, prompts):
        asked.append(list(prompts))
        return mask_logits(batch, states, prompts)

    monkeypatch.setattr(policy, "mask_logits", counted)
    batch = policy.batch([policy.processor.encode(TASK.prompt(row), row["images"], None) for row in data])
    drawn = draw_masks(policy, batch, ids.view(2, 8, T), mask)
    assert asked == [[0, 0, 1]]
    assert all(len(masks) == 1 for masks in drawn)
    of_first = drawn[0][0]
    assert all((drawn[i][0] == of_first).all() for i in (1, 3, 4, 5, 7)) and (drawn[2][0] == drawn[6][0]).all()
    assert (drawn[2][0] != of_first).any()
    assert all((masks[0] == drawn[8][0]).all() for masks in drawn[8:])


def test_a_seg_behind_the_end_of_an_answer_draws_nothing(policy):
    batch = policy.batch([policy.processor.encode(TASK.prompt(row), row["images"], None) for row in rows(1)])
    ids = torch.tensor([[[policy.eos_token_ids[0], policy.seg_token_id]]])
    assert draw_masks(policy, batch, ids, torch.tensor([[1, 0]])) == [[]]


def test_answers_are_the_greedy_ones_with_their_masks():
    """Of a model whose head was turned towards `<SEG>`; one row has no image, and so no mask."""
    policy = build("llava")
    data = rows(4)
    data[1] |= {"images": []}
    plain = GreedyAnswers(policy, TASK.prompt, 8)
    head = policy.model.lm_head.weight
    with torch.no_grad():
        batch = policy.batch([policy.processor.encode(TASK.prompt(row), row["images"], None) for row in data])
        _, logits = policy.prefill(batch, 1, 8)
        states = torch.linalg.lstsq(head, logits.T).solution.T  # what the head read
        head[policy.seg_token_id] = 3 * states.mean(0) / states.mean(0).norm() * head.norm(dim=1).max()
    answers = GroundedAnswers(policy, TASK.prompt, 8)(data)
    assert [answer.text for answer in answers] == [answer.text for answer in plain(data)]
    counts = [answer.text.count("<SEG>") for answer in answers]
    assert sum(counts) > 0
    for answer, row, count in zip(answers, data, counts, strict=True):
        assert len(answer.masks) == (count if row["images"] else 0)
        assert all(mask.shape == row["images"][0].size[::-1] for mask in answer.masks)
    alone = [GroundedAnswers(policy, TASK.prompt, 8)([row])[0] for row in data]
    for one, other in zip(answers, alone, strict=True):
        assert one.text == other.text
        for mask, same in zip(one.masks, other.masks, strict=True):
            assert np.abs(mask.astype(int) - same).max() <= 1
