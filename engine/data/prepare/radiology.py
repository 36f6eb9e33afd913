"""MedVLM-R1's training data: MRI, CT and X-ray questions of the collection that HuatuoGPT-Vision is evaluated on.

A row of the collection has `image` (a list of one file name), `question`, `options`, `answer` (an option's text), `dataset` and
`subset` (the modality, as OmniMedVQA spells it). MedVLM-R1's code takes the first 500 rows of a modality and shuffles them with
seed 42. Its 900 test rows come from the same collection, so that the two can share images.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from engine.command.settings import ALLOW_BURNED_IN, REQUIRED, check_ranges, setting
from engine.data.prepare.folder import finish, prepare_folder, write_images
from engine.data.questions import QuestionSet, load_questions
from engine.data.sources import ImageFile, Source, StoredImage, dataset_source
from engine.data.split_names import RADIOLOGY
from engine.errors import InputError
from engine.files import cache_folder

COLLECTION = "FreedomIntelligence/Medical_Multimodal_Evaluation_Data"
COLLECTION_FILE = "medical_multimodel_evaluation_data.json"  # spelt so
SELECTIONS = {"MR": ["MRI"], "CT": ["CT"], "XRAY": ["X-Ray"], "COMBINED": list(RADIOLOGY)}
SHUFFLE_SEED = 42


@dataclass
class RadiologyPreparation:
    """What to prepare."""

    output: str = setting(REQUIRED, "The folder to make.", metavar="DIR")
    data: str = setting(COLLECTION, "The collection: its folder, .json or .parquet file, a save_to_disk folder, or a hub name.")
    images: str | None = setting(None, "Folder that holds images/, unpacked from the collection's images.zip. None: that of data.")
    test: str | None = setting(None, "The published test rows, MRI_CT_XRAY_300each_dataset.json. None: no test part.")
    dataset_selection: str = setting("MR", "Which modalities.", choices=list(SELECTIONS))
    rows: int = setting(500, "Take the first so many rows of each modality (the paper says 600).", at_least=1)
    drop_leaked: bool = setting(False, "Take images that also occur in test out of train.")
    on_bad_row: str = setting("error", "Stop at a bad row, or list and skip it.", choices=["error", "skip"])
    overwrite: bool = setting(False, "Replace a folder that this command made.")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


def prepare_radiology(options: RadiologyPreparation) -> dict:
    """Make the folder at `options.output` and return the headline numbers; see `engine.data.prepare.folder.prepare_folder`."""
    return prepare_folder(options, "data", partial(_build, options))


def _build(options: RadiologyPreparation, folder: Path) -> dict:
    """Write images and rows into `folder`; returns the report."""
    source, root = find_collection(options.data, options.images)
    read = partial(load_questions, split="test", image_root=root, on_bad_row=options.on_bad_row)
    parts = [read(source, first=options.rows, modalities=[name]) for name in SELECTIONS[options.dataset_selection]]
    records, handles, skipped = ([x for part in parts for x in getattr(part, name)] for name in ("records", "handles", "skipped"))
    train = QuestionSet(records, handles, skipped)
    sets = {"train": train.select(np.random.default_rng(SHUFFLE_SEED).permutation(len(train)).tolist())}  # as `datasets` shuffles
    if options.test:
        sets["test"] = read(options.test)
    rows = {split: write_images(folder, split, questions, _file_name) for split, questions in sets.items()}
    bad = [line for questions in sets.values() for line in questions.skipped]
    return finish(folder, rows, bad, origin=options.data, root=root, kind="modality", drop_leaked=options.drop_leaked)


def _file_name(handle: ImageFile | StoredImage) -> str:
    """The name by which train and test may share an image: without its folder; the key of a stored image that has no name."""
    name = handle.read()[0]
    return name if name == handle.key else Path(name).name


def find_collection(data: str, images: str | None) -> tuple[Source | Path, Path]:
    """(what `load_questions` reads, the folder that image names start from).

    `data` is a file or a folder, or else the name of a data set on the hub (OWNER/NAME). Of that only the rows are fetched: its
    images lie in an images.zip, which must have been unpacked at `images`.
    """
    path = Path(data)
    path = path / COLLECTION_FILE if (path / COLLECTION_FILE).is_file() else path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        return path, Path(os.path.abspath(images or (path if path.is_dir() else path.parent)))
    if images is None:
        raise InputError(f"--images is missing: the folder that holds images/, unpacked from the images.zip of {data}")
    from datasets import load_dataset  # imported here: slow

    try:
        dataset = load_dataset(data, split="test", cache_dir=str(cache_folder() / "datasets"))
    except Exception as error:  # the hub and its files fail in many ways
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{data}: no such file or folder, and not to be had from the hub: {reason}") from None
    return dataset_source(dataset, data, Path(images), images), Path(os.path.abspath(images))
