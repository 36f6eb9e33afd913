"""`recipes.serve_viewer` as a user runs it: the trial, LiteMedSAM behind the published client, and each mistake in one line."""

import numpy as np
import pytest
import torch
from nnInteractive.inference.remote import nnInteractiveRemoteInferenceSession as Client

from engine.data.volumes.propagate import Prompt
from engine.errors import InputError
from engine.viewer.server import address_of, listen, served
from models.checkpoint import CheckpointError
from models.sam.image_encoder import ImageEncoder
from models.sam.loading import lite_medsam_checkpoint
from models.sam.predictor import Predictor
from models.sam.sam import Sam
from recipes.serve_viewer import SamSlices, ServerArguments, load_viewer, main


@pytest.fixture(scope="module")
def real_weights():
    try:
        return lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))


def test_without_flags_it_tries_itself_and_ends(real_weights):
    result = main([])
    assert result["address"].startswith("http://127.0.0.1:") and result["predictions"] >= 1
    assert 1200 < result["voxels"] < 2100  # an ellipse of about 18 x 22 pixels, in five slices


def test_lite_medsam_segments_a_volume_for_the_published_client(real_weights):
    z, y, x = np.mgrid[:4, :80, :90]
    truth = ((z - 1.5) / 3) ** 2 + ((y - 40) / 22) ** 2 + ((x - 50) / 15) ** 2 < 1
    volume = (300 * truth + np.random.default_rng(0).normal(0, 25, truth.shape) - 100).astype(np.int16)
    viewer = load_viewer(ServerArguments())
    with listen("127.0.0.1", 0) as listener, served(viewer, listener, None) as url, Client(url, read_timeout=600) as client:
        client.set_image(volume[None], {"spacing": [5.0, 1.0, 1.0]})
        mask = np.zeros(volume.shape, np.uint8)
        client.set_target_buffer(mask)
        client.add_bbox_interaction([[1, 2], [18, 63], [35, 66]], include_interaction=True)
        while client._predict() is not None:  # on a slow machine
            pass
        assert 2 * (mask & truth).sum() > 0.95 * (mask.sum() + truth.sum())
        whole = mask.copy()
        client.add_point_interaction([1, 50, 50], include_interaction=False)
        assert mask[1, 50, 50] == 0 and 0.5 * whole[1].sum() < mask[1].sum() < 0.9 * whole[1].sum()
        while client.undo() and not (mask == whole).all():
            pass
        assert (mask == whole).all()


def test_a_slice_that_was_looked_at_is_asked_about_though_another_came_between():
    torch.manual_seed(0)
    predictor = Predictor(Sam(ImageEncoder(32, 1, 2, global_blocks=(0,), image_size=64), 64, 4, "min_max", "corner"))
    model = SamSlices(predictor, "none")
    first, second = np.random.default_rng(0).integers(0, 255, (2, 30, 40), np.uint8)
    prompt = Prompt((5, 6, 30, 25), ((10.0, 12.0, 1), (30.0, 4.0, 0)))
    seen = model.look(first)
    model.look(second)
    mask, score = model.segment(seen, prompt)
    masks, scores = model.segment_boxes(seen, [prompt.box, (1, 2, 9, 9)])
    _, lone = model.segment(seen, Prompt(None, ((10.0, 12.0, 1),)))
    predictor.set_image(first)
    alone = predictor.predict(boxes=[prompt.box], points=[[[10, 12], [30, 4]]], labels=[[1, 0]])
    assert (mask == alone.masks[0, 0].numpy()).all() and score == alone.iou[0, 0].item() and mask.shape == (30, 40)
    boxes = predictor.predict(boxes=[prompt.box, (1, 2, 9, 9)])
    assert (masks == boxes.masks[:, 0].numpy()).all() and (scores == boxes.iou[:, 0].numpy()).all()
    assert lone == predictor.predict(points=[[[10, 12]]], labels=[[1]], multimask_output=True).iou.max().item()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "tiny_sam"], "--checkpoint is missing: the published weights of tiny_sam"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it, so --api_key"),
        (["--api_key", "short"], "--api_key: expected 8 or more"),
        (["--port", "65536"], "--port 65536: expected a number, at least 0 and at most 65535"),
        (["--max_sessions", "0"], "--max_sessions 0: expected a number, at least 1"),
        (["--lease_seconds", "0"], "--lease_seconds 0.0: expected a number, more than 0"),
        (["--checkpoint", "absent.pth"], "absent.pth: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(flags, message, monkeypatch):
    monkeypatch.delenv("NN_INTERACTIVE_API_KEY", raising=False)
    with pytest.raises(InputError) as error:
        main(flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with listen("127.0.0.1", 0) as listener:
        port = address_of(listener).rpartition(":")[2]
        with pytest.raises(InputError, match=f"--port {port}: cannot be listened on"):
            main(["--port", port, "--checkpoint", "absent.pth"])


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("engine.viewer.server.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^starlette is not installed \(pip install 'vesalius\[serve\]'\)$"):
        main(["--checkpoint", "absent.pth"])
