"""nninteractive-client, as it is published, drives the server."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from nnInteractive.inference.remote import ServerAtCapacityError, SessionExpiredError
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client

from engine.viewer.segmentation import LEVELS

BOX = [[4, 5], [8, 33], [10, 35]]
FOUND = [[1, 8], [9, 32], [11, 34]]


@pytest.fixture
def client(server, volume):
    with Client(server.url) as client:
        begin(client, volume)
        yield client


def begin(client, volume, dtype=np.uint8):
    client.set_image(volume, {"spacing": np.array([5.0, 1.0, 1.0])})
    client.set_target_buffer(np.zeros(volume.shape[1:], dtype))


def test_the_client_reads_what_it_may_offer(client, volume):
    assert {name for name, can in client.supported_interactions.items() if can} == {"points", "bbox2d", "scribble", "lasso"}
    assert client.supports_undo and client.supports_initial_label and client.ping() and client.license == "Apache-2.0"
    assert client.original_image_shape == volume.shape and client.lease_status()["remaining_seconds"] == 100.0


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.int16])
def test_a_box_is_carried_and_taken_back(client, volume, ball, dtype):
    begin(client, volume, dtype)
    assert client.add_bbox_interaction(BOX, True) == FOUND
    assert (client.target_buffer == ball).all() and client.target_buffer.dtype == dtype
    assert client.undo() and not client.target_buffer.any() and not client.undo()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_box_is_carried_along_the_axis_it_is_flat_in(client, ball, axis):
    box = [[1, 8], [8, 33], [10, 35]]
    box[axis] = [[4, 5], [20, 21], [22, 23]][axis]
    client.add_bbox_interaction(box, True)
    assert (client.target_buffer == ball).all()


def test_points_correct_and_undo_goes_back_step_by_step(client, ball):
    client.add_bbox_interaction(BOX, True)
    client.add_point_interaction([2.2, 6, 43], True)  # the rod, in slice 2
    with_rod = client.target_buffer.copy()
    assert with_rod[2, 6, 43] == 1 and (with_rod[4] == ball[4]).all()
    client.add_point_interaction([2, 6, 43], False)
    assert (client.target_buffer == ball).all()
    assert client.undo() and (client.target_buffer == with_rod).all()
    assert client.undo() and (client.target_buffer == ball).all()


def test_scribbles_lassos_and_boxes_where_the_object_is_or_is_not(client, ball):
    scribble = np.zeros(ball.shape, np.uint8)
    scribble[4, 15:26, 22] = 1
    client.add_scribble_interaction(scribble, True)
    assert (client.target_buffer == ball).all()
    enclosed = [[5, 6], [20, 27], [20, 28]]
    assert client.add_lasso_interaction(np.ones((1, 7, 8), np.uint8), False, interaction_bbox=enclosed) == enclosed
    client.add_bbox_interaction([[4, 5], [0, 14], [0, 50]], False)
    assert not client.target_buffer[4, :14].any() and client.target_buffer[4].sum() == ball[4, 14:].sum()
    client.reset_interactions()
    lasso = np.zeros(ball.shape, np.uint8)
    lasso[3] = ball[3]
    client.add_lasso_interaction(lasso, True)
    assert (client.target_buffer == ball).all()


def test_an_initial_segmentation_is_corrected_in_all_slices_that_follow(client, ball):
    initial = ball.copy()
    initial[1:8, 3:10, 38:48] = True
    assert client.add_initial_seg_interaction(initial.astype(np.uint8)) is None
    client.add_point_interaction([4, 6, 42], False)
    assert (client.target_buffer == ball).all()
    assert client.undo() and (client.target_buffer == initial).all()
    client.add_initial_seg_interaction(np.roll(ball, 1, 2).astype(np.uint8), run_prediction=True)
    assert (client.target_buffer == ball).all()


def test_prompts_wait_for_a_prediction_and_what_can_be_undone_is_bounded(client):
    assert client.add_bbox_interaction(BOX, True, run_prediction=False) is None and not client.target_buffer.any()
    assert client._predict() == FOUND and client._predict() is None
    for column in range(LEVELS + 5):
        client.add_point_interaction([4, 20, 12 + column], True, run_prediction=False)
    assert sum(client.undo() for _ in range(LEVELS + 6)) == LEVELS


def test_a_prediction_that_takes_too_long_goes_on_when_asked(slow, client, ball):
    client.add_bbox_interaction(BOX, True)
    some = client.target_buffer.copy()
    assert 0 < some.sum() < ball.sum() and ball[some > 0].all()
    for _ in range(6):
        client._predict()
    assert (client.target_buffer == ball).all() and client._predict() is None


def test_two_clients_at_once_see_their_own(server, volume, ball):
    def use(flip):
        with Client(server.url) as client:
            for _ in range(4):
                begin(client, volume[:, :, ::flip])
                client.add_bbox_interaction([[4, 5], [7, 33], [10, 35]], True)
                assert (client.target_buffer == ball[:, ::flip]).all() and client.undo()
        return True

    with ThreadPoolExecutor(2) as both:
        assert list(both.map(use, (1, -1))) == [True, True]
    assert not server.leases.held, "each was released"


def test_a_lease_ends_when_its_user_does_nothing_though_its_program_lives(server, client):
    for server.clock.now, remaining in ((60.0, 40.0), (115.0, 45.0)):
        assert client.heartbeat() == remaining
        if remaining == 40.0:
            client.set_do_autozoom(True)
    server.clock.now = 161.0
    with pytest.raises(SessionExpiredError, match="the session has ended"):
        client.add_bbox_interaction(BOX, True)
    assert not server.leases.held


def test_no_more_clients_are_taken_than_have_a_place_and_a_program_that_is_gone_leaves_its_own(server, client):
    with Client(server.url) as second:
        with pytest.raises(ServerAtCapacityError, match="all 2 sessions are taken"):
            Client(server.url)
        server.clock.now = 59.0
        second.heartbeat()
        server.clock.now = 61.0  # the first has not been heard of for a minute
        Client(server.url).close()
        with pytest.raises(SessionExpiredError):
            client.heartbeat()
