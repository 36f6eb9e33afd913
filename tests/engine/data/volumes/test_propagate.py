"""A structure carried from slice to slice by a model that knows it: where it starts, where it ends, and what it is asked."""

import numpy as np
import pytest

from engine.data.volumes.propagate import Prompt, carried_box, continues, propagate

SIZE, CENTRE = 40, 20


def disc(radius: float, x: float = CENTRE) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    return (rows + 0.5 - CENTRE) ** 2 + (columns + 0.5 - x) ** 2 < radius**2


class Ball:
    """A segmenter that finds what there is of its discs within the box it is asked about."""

    def __init__(self, discs: dict[int, np.ndarray]):
        self.discs, self.asked = discs, []

    def __call__(self, index, prompt):
        self.asked.append((index, prompt))
        found = np.zeros((SIZE, SIZE), bool)
        if prompt.box is not None:
            x1, y1, x2, y2 = (int(round(side)) for side in prompt.box)
            found[y1:y2, x1:x2] = self.discs.get(index, found)[y1:y2, x1:x2]
        else:
            found = self.discs[index]
        return found, 0.9


def masks_of(segment, prompts, slices=21, **options):
    return {drawn.slice: drawn.mask for drawn in propagate(segment, slices, prompts, **options)}


def test_a_ball_is_found_whole_from_one_box_and_nothing_beside_it():
    truth = {index: disc((100 - (index - 10) ** 2) ** 0.5) for index in range(1, 20)}
    found = masks_of(Ball(truth | {0: disc(0), 20: disc(0)}), {10: Prompt(box=(8, 8, 32, 32))})
    kept = {index for index, mask in truth.items() if mask.sum() >= 4}
    assert found.keys() == kept and all(np.array_equal(found[index], truth[index]) for index in kept)


def test_slices_are_asked_outwards_from_the_prompt_once_each():
    ball = Ball({index: disc(6) for index in range(5)})
    drawn = list(propagate(ball, 5, {2: Prompt(box=(10, 10, 30, 30))}))
    assert [index for index, _ in ball.asked] == [2, 3, 4, 1, 0] == [each.slice for each in drawn]
    assert {each.score for each in drawn} == {0.9}


def test_a_drifting_structure_is_followed():
    truth = {index: disc(6, x=10 + 2 * index) for index in range(10)}
    found = masks_of(Ball(truth), {0: Prompt(box=(0, 10, 20, 30))}, 10)
    assert all(np.array_equal(found[index], truth[index]) for index in range(10))


@pytest.mark.parametrize("prompt", [Prompt(box=(13, 13, 27, 27)), Prompt(points=((20, 20, 1),)), Prompt(mask=disc(6))])
def test_boxes_points_and_masks_start_alike(prompt):
    ball = Ball({index: disc(6) for index in range(4)})
    found = masks_of(ball, {1: prompt}, 4)
    assert found.keys() == {0, 1, 2, 3} and all(np.array_equal(mask, disc(6)) for mask in found.values())
    assert len(ball.asked) == (3 if prompt.mask is not None else 4)  # a mask that is there is not asked for


def test_it_ends_where_the_mask_is_no_continuation():
    for other in (disc(6, x=34) | disc(0), disc(19), np.zeros((SIZE, SIZE), bool)):
        found = [disc(6), disc(6), other, disc(6)]
        masks = masks_of(lambda index, prompt: (found[index], 0.9), {0: Prompt(box=(10, 10, 30, 30))}, 4)  # noqa: B023
        assert masks.keys() == {0, 1}


def test_it_ends_where_the_grey_inside_changes():
    grey = {index: np.where(disc(6), 100.0 + np.indices((SIZE, SIZE))[0] % 5, 0) for index in range(3)}
    grey[2] = grey[2] * 2
    ball = Ball({index: disc(6) for index in range(3)})
    prompts = {0: Prompt(box=(10, 10, 30, 30))}
    assert masks_of(ball, prompts, 3, grey=grey.__getitem__).keys() == {0, 1}
    assert masks_of(ball, prompts, 3).keys() == {0, 1, 2}


def test_it_ends_where_the_model_doubts():
    def doubting(index, prompt):
        return disc(6), 0.9 - 0.25 * index

    assert masks_of(doubting, {0: Prompt(box=(10, 10, 30, 30))}, 9).keys() == {0, 1, 2}


def test_between_two_prompts_each_slice_comes_from_the_nearer():
    ball = Ball({index: disc(6) for index in range(12)})
    found = list(propagate(ball, 12, {3: Prompt(box=(10, 10, 30, 30)), 8: Prompt(points=((20, 20, 1),))}))
    assert sorted(each.slice for each in found) == list(range(12))
    assert [index for index, _ in ball.asked] == [3, 4, 5, 2, 1, 0, 8, 9, 10, 11, 7, 6]


def test_the_carried_box_is_grown_and_stays_in_the_image():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 5:55] = True
    assert carried_box(mask) == (1.0, 8.0, 59.0, 22.0)  # 8 % of 50 columns, two pixels at least
    mask[:] = True
    assert carried_box(mask) == (0.0, 0.0, 60.0, 40.0)
    assert carried_box(np.eye(40)[:3] > 0) is None and not continues(np.eye(40)[:3] > 0, np.eye(40)[:3] > 0)


@pytest.mark.parametrize("start, prompt", [(4, Prompt(box=(0, 0, 9, 9))), (-1, Prompt(box=(0, 0, 9, 9))), (0, Prompt())])
def test_a_prompt_that_asks_nothing_is_refused(start, prompt):
    with pytest.raises(ValueError, match=f"slice {start}: "):
        list(propagate(Ball({}), 4, {start: prompt}))
