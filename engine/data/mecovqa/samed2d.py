"""SA-Med2D-20M's names: what the file of an image or a mask is called says what it shows.

images/ct_00--CAD_PE--001--x_0125.png             modality_sub-modality--data set--case--dimension_slice; 2-D images have 2d_none
masks/ct_00--CAD_PE--001--x_0125--0000_002.png    and class_instance
SAMed2D_v1.json                                   {image: [masks]}
SAMed2D_v1_class_mapping_id.json                  {data set: {class: "0000"}}
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.data.formats.text import read_text
from engine.errors import InputError

INDEX, CLASSES = "SAMed2D_v1.json", "SAMed2D_v1_class_mapping_id.json"
FAMILIES = {  # the first word of a name -> what MedPLIB's tables call it
    "ct": "CT",
    "mr": "MR",
    "pet": "PET",
    "x": "X-ray",
    "ultrasound": "Ultrasound",
    "dermoscopy": "Dermoscopy",
    "endoscopy": "Endoscopy",
    "fundus": "Fundus photography",
    "microscopy": "Microscopy",
    "oct": "OCT",
}
_MASK_ENDING = re.compile(r"([0-9]{4})_([0-9]{3})")


@dataclass(frozen=True)
class SAMed2DName:
    """`modality` is the whole prefix (mr_t1, x_ray); `class_id` and `instance` are those of a mask, None of an image."""

    modality: str
    dataset: str
    case: str
    slice: str
    class_id: str | None = None
    instance: int | None = None

    @property
    def image(self) -> str:
        """The name of the image, of which a mask's is a longer one."""
        return "--".join((self.modality, self.dataset, self.case, self.slice))


def read_name(name: str | Path) -> SAMed2DName | None:
    """What a path, or the name in it, with or without its ending, says; None for any other name."""
    bare = PurePosixPath(str(name).replace("\\", "/")).name
    parts = re.sub(r"\.(png|jpe?g)$", "", bare, flags=re.IGNORECASE).split("--")
    ending = _MASK_ENDING.fullmatch(parts[-1])
    if ending and len(parts) > 4:
        parts.pop()
    else:
        ending = None
    if len(parts) < 4 or not all(parts):
        return None
    modality, dataset, *case, at = parts  # the original name may have "--" in it too
    mask = (ending[1], int(ending[2])) if ending else (None, None)
    return SAMed2DName(modality, dataset, "--".join(case), at, *mask)


def family(modality: str | None) -> str:
    """What images of a prefix are called together: CT for ct_00; the first word where it is none of those known."""
    first = (modality or "").split("_")[0]
    return FAMILIES.get(first.lower(), first or "unknown")


def read_classes(path: str | Path) -> dict[str, dict[str, str]]:
    """The class mapping the other way round: {data set: {"0003": class}}. InputError if the file has another form."""
    expected = 'an object {data set: {class: "0003"}}'
    return {dataset: {number: name for name, number in classes.items()} for dataset, classes in _read(path, expected, str).items()}


def read_index(path: str | Path) -> dict[str, list[str]]:
    """{image: [masks]}, paths as in the file. InputError if the file has another form."""
    return _read(path, "an object {image: [masks]}", list)


def class_of(name: SAMed2DName, classes: dict[str, dict[str, str]]) -> str | None:
    """The class of a mask in words, by `read_classes`; None where the mapping does not know it."""
    return classes.get(name.dataset, {}).get(name.class_id or "")


def _read(path: str | Path, expected: str, kind: type) -> Any:
    try:
        found = json.loads(read_text(path, expected))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split())[:160]} (expected {expected})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON {type(found).__name__} (expected {expected})")
    for key, value in found.items():
        texts = value if kind is list else list(value.values()) if isinstance(value, dict) else None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: {key[:80]!r} has {str(value)[:60]!r} (expected {expected})")
    return found
