"""Questions about skin lesions: HAM10000 in the format of `ham10000_with_spatial_data.json`, asked in the published words.

A row has `image_id`, `dx` (a code of DIAGNOSES) and mostly `lesion_id, dx_type, age, sex, localization` (the body part), `bbox`
(x1, y1, x2, y2; pixels), `area_coverage`, `spatial_description` (`lesion located in upper-left region`) and `mask_available`; a
lesion without a mask has no box. Rows come from a folder that `recipes.skin_prepare` made, from the published JSON or CSV file
beside or with a folder of images (found by image_id), or from a copy of the hub data set abaryan/ham10000_bbox, which holds its
images and says `diagnosis` for `dx`. `[i]` of the set gives the keys of `engine.data.questions`, without options, and

    problem, solution: the question and the answer to learn, see `ask`       question_type: which of QUESTIONS it is
    dx, diagnosis: code and name      lesion_id, localization, spatial_description, age, sex: as in the file, or None
    bbox: list of four floats or None     mask: path of the mask's file or None     name: the image_id of the file
"""

import contextlib
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine.data.formats.folders import TABLES, ending
from engine.data.formats.text import is_unicode
from engine.data.images import ImageError
from engine.data.lesion_boxes import name_region
from engine.data.masks.lesion_files import LesionFiles
from engine.data.questions import Checked, QuestionSet, load_questions
from engine.data.rows import BadRow
from engine.data.sources import ImageFile, Source, StoredImage, read_source
from engine.data.tables import read_csv
from engine.errors import InputError
from engine.json_names import each_once

DIAGNOSES = {
    "akiec": "actinic keratosis",
    "bcc": "basal cell carcinoma",
    "bkl": "benign keratosis-like lesion",
    "df": "dermatofibroma",
    "mel": "melanoma",
    "nv": "melanocytic nevus",
    "vasc": "vascular lesion",
}
CODES = {name: code for code, name in DIAGNOSES.items()} | {code: code for code in DIAGNOSES}
LARGEST = 2**31  # pixels of a box: an integer of JSON may be larger than any float
COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")  # of HAM10000's metadata
RECORD_KEYS = (*COLUMNS, "bbox", "area_coverage", "spatial_description", "mask_available")
MASK_SUFFIX = "_segmentation"
REGION = re.compile(r"lesion located in (upper|center|lower)-(left|center|right) region")

# Published: diagnosis and location (stages 1 and 2), tagged (the variant on the hub's data). Ours: box, all that is rewarded.
QUESTIONS = {
    "diagnosis": "Analyze this skin lesion and provide a diagnosis.",
    "location": "Analyze this skin lesion, provide a diagnosis, and describe its location.",
    "tagged": "Analyze this skin lesion image. Respond in this exact format: <diagnosis>condition_name</diagnosis> "
    "<location>body_part</location> <bbox>[x1, y1, x2, y2]</bbox>",
    "box": "Analyze this skin lesion, provide a diagnosis, describe its location, and give its bounding box in pixels as "
    "[x1, y1, x2, y2].",
}


def ask(question: str, record: dict) -> tuple[str, str]:
    """The question of that kind and the answer to learn. "tagged" names the body part, "location" and "box" the region."""
    if question == "tagged":
        place = record["localization"] or "unknown"
        answer = f"<diagnosis>{record['diagnosis']}</diagnosis> <location>{place}</location> <bbox>{_box(record)}</bbox>"
        return QUESTIONS[question], answer
    sentences = [f"This appears to be {record['diagnosis']}."]
    if question in ("location", "box"):
        sentences.append(record["spatial_description"].replace("lesion located in", "The lesion is located in the") + ".")
    if question == "box":
        sentences.append(f"Its bounding box is {_box(record)}.")
    return QUESTIONS[question], " ".join(sentences)


def _box(record: dict) -> str:
    return str([int(side) for side in record["bbox"]])


def skin_prompt(row: dict) -> list[dict]:
    """One user message, as in the published code: the image, then the question."""
    images = [{"type": "image"} for _ in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["problem"]}]}]


def load_skin(
    source: str | Path | Sequence[str | Path],
    *,
    question: str = "location",
    ratio: float = 1.0,
    boxes_only: bool = False,
    seed: int = 42,
    image_root: str | Path | None = None,
    split: str = "train",
    on_bad_row: str = "error",
    limit: int | None = None,
) -> QuestionSet:
    """The lesions of one or several sources, `ratio` of those with a box asked the `question`, all others for the diagnosis alone.

    Stage 1 of the published code asks "location" with ratio 0.2, stage 2 with 1 and `boxes_only`, which leaves out lesions
    without a box. A lesion's question follows from `seed` and its image_id. Images and masks are looked for in `image_root`, by
    default the folder of each file, and the folders in it. The other arguments are those of `load_questions`.
    """
    if question not in QUESTIONS:
        raise InputError(f"question {question!r} (expected one of {', '.join(QUESTIONS)})")
    find = cache(lambda root: LesionFiles([root]))

    def check_row(index: int, row: Any, source: Source) -> Checked:
        record, handles = _check_lesion(index, row, source, find)
        chosen = random.Random(f"{seed} {record['name']}").random() < ratio and record["bbox"] is not None
        kind = question if chosen else "diagnosis"
        problem, solution = ask(kind, record)
        return record | {"problem": problem, "solution": solution, "question_type": kind}, handles

    paths = [source] if isinstance(source, str | Path) else source
    sources = [_read(Path(path), split, image_root) for path in paths]
    lesions = load_questions(sources, on_bad_row=on_bad_row, limit=limit, check_row=check_row)
    if not boxes_only:
        return lesions
    kept = [i for i, record in enumerate(lesions.records) if record["bbox"] is not None]
    if not kept:
        raise InputError(f"{', '.join(map(str, paths))}: no row with a box (expected some with a mask)")
    return lesions.select(kept)


def _read(path: Path, split: str, image_root: str | Path | None) -> Source:
    if ending(path) not in TABLES:
        return read_source(path, split, image_root)
    rows = list(read_csv(path, RECORD_KEYS, ("image_id", "dx")))
    if not rows:
        raise InputError(f"{path}: no rows in it (expected the columns {', '.join(RECORD_KEYS)})")
    root = Path(image_root or path.parent).absolute()
    cells = [row.cells if isinstance(row.cells, BadRow) else _cells(row.cells) for row in rows]
    return Source(str(path), cells, root, {}, lines=[row.line for row in rows])


def _cells(row: dict[str, str]) -> dict[str, Any]:
    """A CSV row as JSON would have it."""
    cells: dict[str, Any] = {key: text.strip() or None for key, text in row.items()}
    if cells.get("bbox"):
        with contextlib.suppress(ValueError, RecursionError):  # it stays text, which the check of the row refuses
            cells["bbox"] = json.loads(cells["bbox"], object_pairs_hook=each_once)
    return cells


def _check_lesion(index: int, row: Any, source: Source, find: Callable[[Path], LesionFiles]) -> Checked:
    """A raw row -> (its record but for question and answer, [the image's handle]); BadRow if it cannot be used."""
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("not a row with named columns", f"the columns {', '.join(RECORD_KEYS)}")
    name = row.get("image_id")
    handle: ImageFile | StoredImage
    if source.stored:
        if not source.stored[index]:
            raise BadRow("no image is stored here", "one")
        name, handle, mask = name or f"row {index}", source.stored[index][0], None
    elif not isinstance(name, str) or not name:
        raise BadRow("no image_id", "the name of an image without its ending")
    else:
        image, masks = find(source.root).find(name)
        if image is None:
            raise BadRow(f"image {name[:80]!r}: no such image file", f"{name[:80]}.jpg, .jpeg or .png in {source.root}")
        handle, mask = ImageFile(image), masks[0] if masks else None
    dx, bbox = check_diagnosis(row.get("dx") or row.get("diagnosis")), _check_box(row.get("bbox"))
    return {
        "image_id": handle.key,
        "name": name,
        "dx": dx,
        "diagnosis": DIAGNOSES[dx],
        **{key: _word(row.get(key)) for key in ("lesion_id", "localization", "sex")},
        "age": check_age(row.get("age")),
        "bbox": bbox,
        "spatial_description": _check_region(row.get("spatial_description"), bbox, handle),
        "mask": None if mask is None else str(mask),
        "modality": "Dermoscopy",
        "row": index,
        "source": source.name,
    }, [handle]


def check_diagnosis(dx: Any) -> str:
    """The code of a code or name in any case; BadRow otherwise."""
    code = CODES.get(dx.strip().lower()) if isinstance(dx, str) else None
    if code is None:
        raise BadRow(f"dx {str(dx)[:40]!r}", f"one of {', '.join(DIAGNOSES)}")
    return code


def check_age(age: Any) -> float | None:
    """Years; None for an empty cell or NaN, as pandas writes it."""
    try:
        years = math.nan if age in (None, "") else float(age)
        if isinstance(age, bool) or not (math.isnan(years) or 0 <= years < math.inf):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"age {str(age)[:40]!r}", "years, or nothing") from None
    return None if math.isnan(years) else years


def _word(cell: Any) -> str | None:
    if isinstance(cell, str) and not is_unicode(cell):
        raise BadRow(f"half a character in {ascii(cell)[:60]}", "Unicode text")
    return cell if isinstance(cell, str) and cell else None


def _check_box(bbox: Any) -> list[float] | None:
    if bbox is None or isinstance(bbox, float) and math.isnan(bbox):
        return None
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(type(side) in (int, float) for side in bbox)
    if not numbers or not (0 <= bbox[0] < bbox[2] <= LARGEST and 0 <= bbox[1] < bbox[3] <= LARGEST):
        raise BadRow(f"bbox {str(bbox)[:60]}", "[x1, y1, x2, y2] in pixels with x1 < x2 and y1 < y2, or nothing")
    return [float(side) for side in bbox]


def _check_region(text: Any, bbox: list[float] | None, handle: ImageFile | StoredImage) -> str | None:
    """The description; newer files of the published script leave it out, and then the box says it."""
    if bbox is None:
        return None
    if _word(text) is None:
        try:
            return f"lesion located in {name_region(bbox, handle.open().size)} region"
        except (ImageError, OSError):  # the check of all images names it
            return "lesion located in center-center region"
    if not REGION.fullmatch(text):
        raise BadRow(f"spatial_description {text[:60]!r}", "'lesion located in upper-left region' or the like")
    return text
