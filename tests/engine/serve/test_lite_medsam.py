"""LiteMedSAM's published weights, exported, in C++ and in Python on real images: the same masks.

VESALIUS_SEG_BUNDLE, a bundle of it that was exported here with this torch, spares two minutes of the compiler's time; it is made
where it is not there. VESALIUS_EVERY=1 takes all images instead of every tenth.
"""

import base64
import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.data.images import open_image
from engine.export.bundle import read_bundle
from models.checkpoint import CheckpointError
from models.sam.loading import lite_medsam_checkpoint, load_predictor
from recipes.export import main
from tests.engine.serve.pictures import real_images
from tests.engine.serve.small_segmenter import overlap
from tests.engine.serve.test_server import Client


@pytest.fixture(scope="module")
def images():
    found = real_images()[:: int(os.environ.get("VESALIUS_EVERY", "10"))]
    if not found:
        pytest.skip("the mini data set is not here")
    return found


@pytest.fixture(scope="module")
def client(binaries, images, tmp_path_factory):
    try:
        lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))
    bundle = Path(os.environ.get("VESALIUS_SEG_BUNDLE") or os.devnull)
    versions = read_bundle(bundle)["versions"] if bundle.is_dir() else {}
    if versions.get("torch") != torch.__version__.split("+")[0]:
        bundle = bundle if not bundle.exists() else tmp_path_factory.mktemp("lite_medsam") / "bundle"
        main(["--out", str(bundle)])
    process = subprocess.Popen([binaries / "vesalius-seg", bundle, "--serve", "0"], stdout=subprocess.PIPE, text=True)
    try:
        yield Client(("127.0.0.1", int(json.loads(process.stdout.readline())["address"].rpartition(":")[2])))
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def test_masks_of_real_images_are_those_of_python(client, images):
    predictor = load_predictor("lite_medsam", None, torch.device("cpu"))
    for file in images:
        image = open_image(file)
        w, h = image.size
        boxes = [[0.2 * w, 0.25 * h, 0.8 * w, 0.75 * h], [0.4 * w, 0.1 * h, 0.95 * w, 0.6 * h]]
        kind = "png" if file.suffix == ".png" else "jpeg"
        content = base64.b64encode(file.read_bytes()).decode()
        status, answer = client.segment({"image": f"data:image/{kind};base64,{content}", "boxes": boxes})
        assert status == 200, (file, answer)
        predictor.set_image(image)
        expected = predictor.predict(boxes=boxes)
        for ours, mask, iou in zip(answer["masks"], expected.masks[:, 0].numpy(), expected.iou[:, 0].tolist(), strict=True):
            drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(ours["png"])))) > 0
            assert overlap(drawn, mask) >= 0.995, file
            assert abs(ours["iou"] - iou) < 1e-3, file
