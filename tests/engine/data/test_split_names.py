"""Names of parts: as files, checkpoints, folders and labels spell them."""

import pytest

from engine.data.split_names import KINDS, part_of


@pytest.mark.parametrize("name", ["CT", "ct", "VQA_CT", "CT(Computed Tomography)_test", "CT_train", "CT_clean", "CT 2"])
def test_spellings_of_one_part(name):
    assert part_of(name) == ("modality", "CT")


def test_every_published_name_and_every_folder_of_the_published_checkpoints():
    for kind, published in KINDS.items():
        for short, long in published.items():
            if short != "unknown":
                assert part_of(short) == part_of(long) == part_of(f"{long}_test") == (kind, short)
    names = "CT MRI X-Ray US Dermo Fundus Micro OCT"
    tasks = "Anatomy_Identification Disease_Diagnosis Lesion_Grading Modality_Recognition Other_Bio"
    parts = [part_of(f"VQA_{name}") for name in f"{names} {tasks}".split()]
    assert parts == [(kind, short) for kind in KINDS for short in KINDS[kind] if short != "unknown"]


@pytest.mark.parametrize("name", ["runs", "think", "nothink", "unknown", "MR", "", "CTA", "evaluation", None])
def test_what_is_no_part(name):
    assert part_of(name) is None
