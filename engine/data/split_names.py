"""Names of the files Med-R1 published: `Splits/{modality,question_type}/{train,test}/<name>_{train,test}.json`."""

import re
from pathlib import Path

from engine.data.formats.folders import bare_name

# short name: the published one, odd spelling and unbalanced parenthesis included
MODALITIES = {
    "CT": "CT(Computed Tomography)",
    "MRI": "MR (Mag-netic Resonance Imaging)",
    "X-Ray": "X-Ray",
    "Ultrasound": "ultrasound",
    "Dermoscopy": "Dermoscopy",
    "Fundus": "Fundus Photography",
    "Microscopy": "Microscopy Images",
    "OCT": "OCT (Optical Coherence Tomography",
    "unknown": "unknown",
}
QUESTION_TYPES = {
    name: name
    for name in (
        "Anatomy Identification",
        "Disease Diagnosis",
        "Lesion Grading",
        "Modality Recognition",
        "Other Biological Attributes",
    )
}
KINDS = {"modality": MODALITIES, "question_type": QUESTION_TYPES}
RADIOLOGY = ("MRI", "CT", "X-Ray")  # what MedVLM-R1 is about


def name_of_split(path: Path) -> dict[str, str]:
    """{"modality": name}, {"question_type": name} or {}: what the published name and place of a split file say of its rows."""
    name = re.sub(r"_(train|test)$", "", bare_name(path))
    folders = {folder.name for folder in list(path.parents)[:2]}
    if name in MODALITIES or name in MODALITIES.values() or "modality" in folders:
        return {"modality": name}
    if name in QUESTION_TYPES or folders & {"question_type", "q_type"}:
        return {"question_type": name}
    return {}


def short_modality(label: str | None) -> str | None:
    """The short name of a modality by its short or published name, in any case and punctuation; another label as it is."""
    return _SHORT.get(_letters(label), label) if label else label


def part_of(name: object) -> tuple[str, str] | None:
    """The kind and the short name of the part that a file, a folder or a label names: `CT_test`, `VQA_Dermo`, `US`.

    Case, digits and punctuation do not matter; abbreviations are those of Med-R1's checkpoints and figures. None of any other name.
    """
    bare = re.sub(r"^vqa[-_ ]|[-_ ](train|test|clean)$", "", str(name), flags=re.IGNORECASE)
    return _PARTS.get(_letters(bare))


def _letters(name: str) -> str:
    return "".join(filter(str.isalpha, name.casefold()))


_SHORT = {_letters(name): short for short, published in MODALITIES.items() for name in (short, published)}
_ABBREVIATED = {
    "modality": {"XRay": "X-Ray", "US": "Ultrasound", "Der": "Dermoscopy", "Dermo": "Dermoscopy", "Micro": "Microscopy"},
    "question_type": {
        **{"AI": "Anatomy Identification", "DD": "Disease Diagnosis", "LG": "Lesion Grading"},
        **{"OA": "Other Biological Attributes", "OBA": "Other Biological Attributes", "Other Bio": "Other Biological Attributes"},
    },
}
_PARTS = {
    _letters(name): (kind, short)
    for kind, published in KINDS.items()
    for short, long in [*published.items(), *((short, name) for name, short in _ABBREVIATED[kind].items())]
    for name in (short, long)
    if short != "unknown"
}
