"""DICOM segmentations: every orientation to the voxel, each form, what they refer to, and what dciodvfy says of them."""

import re
import shutil
import subprocess

import highdicom
import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from engine.data.volumes.dicom.segmentation import EMPTY, check_source, write_segmentation
from engine.data.volumes.grids import onto, read_mask_volume
from engine.data.volumes.nifti import LPS
from engine.data.volumes.output import write_labels
from engine.data.volumes.read import read_volume
from engine.errors import InputError
from tests.engine.data.volumes.made import affine_of, oblique, voxels_of, write_enhanced, write_series
from tests.engine.data.volumes.test_series import AXIAL, RIGHT_HANDED

FORMS = ("labelmap", "binary", "fractional")


def levels_of(shape, seed=0):
    """A ball's probability, and another's beside it, in 256 levels."""
    grid = (np.indices(shape).transpose(1, 2, 3, 0) + 0.5) / np.array(shape)
    return [
        np.clip(255 - 400 * np.linalg.norm(grid - np.array(centre), axis=-1), 0, 255).astype(np.uint8)
        for centre in ((0.5, 0.4, 0.3), (0.4, 0.6, 0.7))
    ]


def places(mask, affine):
    """[N, 3] mm: where the marked voxels are, sorted."""
    found = (affine @ np.c_[np.argwhere(mask), np.ones(mask.sum())].T)[:3].T
    return found[np.lexsort(found.round(3).T)]


def write(path, volume, levels, form="labelmap"):
    write_segmentation(path, volume, levels, [f"part {n}" for n in range(len(levels))], form=form, algorithm="lite_medsam")
    return highdicom.seg.segread(path)


def test_masks_return_voxel_for_voxel_in_every_orientation(tmp_path):
    voxels, out, nifti = voxels_of((3, 5, 4)), tmp_path / "seg.dcm", tmp_path / "seg.nii"
    mask = (voxels > -170).astype(np.uint8) * 255
    row = [2, 4, 3]  # a marked voxel
    mask[tuple(row)] = 255
    for turned in (np.eye(3), oblique(4)):
        for place, directions in enumerate(RIGHT_HANDED):
            affine = affine_of(turned @ directions)
            volume = read_volume(write_series(tmp_path / str(place), voxels, affine, seed=place)[0].parent)
            found = write(out, volume, [mask]).get_volume()  # in whichever order of slices highdicom likes
            assert np.allclose(places(found.array[..., 0] > 0, found.affine), places(mask > 0, affine), atol=1e-5)
            assert np.allclose(volume.position(*row), (affine @ [*row, 1])[:3], atol=1e-6)
            write_labels(nifti, volume, [mask], ["x"], form="labelmap", algorithm="x")
            image = nibabel.load(nifti)
            assert np.array_equal(image.get_fdata().transpose(2, 1, 0), mask > 0)
            assert np.allclose((LPS @ image.affine @ [*row[::-1], 1])[:3], volume.position(*row), atol=1e-4)
            for path in (out, nifti):
                assert np.array_equal(read_mask_volume(path, volume), mask > 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["series", "frames"])
def test_each_form_holds_each_structure_and_refers_to_its_images(tmp_path, form, source):
    voxels, affine = voxels_of((5, 12, 9)), affine_of(oblique(6) @ RIGHT_HANDED[3])
    if source == "series":
        paths = write_series(tmp_path / "s", voxels, affine)
        volume = read_volume(tmp_path / "s")
    else:
        paths = [write_enhanced(tmp_path / "x.dcm", voxels, affine, [3, 0, 4, 1, 2])]
        volume = read_volume(paths[0])
    levels = levels_of(volume.shape)
    found = write(tmp_path / "seg.dcm", volume, levels, form)
    assert found.segmentation_type.name == form.upper() and [d.SegmentLabel for d in found.SegmentSequence][-2:] == [
        "part 0",
        "part 1",
    ]
    read = found.get_volume(combine_segments=False)
    for number in (0, 1):
        mask, whole = levels[number] >= 128, onto(read.array[..., number], read.affine, volume, "")
        if form == "fractional":
            assert np.abs(whole * 255 - levels[number]).max() < 0.51
        elif form == "binary":
            assert np.array_equal(whole, mask)
        else:
            assert np.array_equal(whole > 0, mask & (levels[number] >= levels[1 - number] + number))
    instances = {dcmread(path).SOPInstanceUID for path in paths}
    assert {item[2] for item in found.get_source_image_uids()} <= instances
    assert found.StudyInstanceUID == "2.25.1" and found.FrameOfReferenceUID == "2.25.3" and found.SeriesInstanceUID != "2.25.2"
    both = np.any([part >= 128 for part in levels], 0)
    assert np.array_equal(read_mask_volume(tmp_path / "seg.dcm", volume), both)


@pytest.mark.parametrize("name", ["CT_small.dcm", "eCT_Supplemental.dcm", "MR_small.dcm", "RG1_UNCR.dcm"])
def test_real_files_are_segmented(tmp_path, name):
    volume, out = read_volume(get_testdata_file(name)), tmp_path / "seg.dcm"
    mask = levels_of(volume.shape)[0]
    write_segmentation(out, volume, [mask], ["a"], form="binary", algorithm="x")
    assert np.array_equal(np.asarray(dcmread(out).pixel_array, bool).reshape(mask.shape), mask >= 128)
    if volume.placed:
        assert np.array_equal(read_mask_volume(out, volume), mask >= 128)


def test_frames_without_a_place_go_to_nifti_only(tmp_path):
    volume = read_volume(get_testdata_file("emri_small.dcm"))
    with pytest.raises(InputError, match="frames without a place in the patient"):
        check_source("seg.dcm", volume)
    write_labels(tmp_path / "seg.nii.gz", volume, levels_of(volume.shape)[:1], ["a"], form="binary", algorithm="x")
    marked = nibabel.load(tmp_path / "seg.nii.gz").get_fdata().transpose(2, 1, 0)
    assert np.array_equal(marked, levels_of(volume.shape)[0] >= 128) and volume.counted(marked > 0)["volume_ml"] is None


def test_nothing_found_is_written_as_such(tmp_path):
    write_series(tmp_path / "s", voxels_of(), AXIAL, lambda _, dataset: [dataset.__delitem__(name) for name in EMPTY])
    volume = read_volume(tmp_path / "s")
    check_source("seg.dcm", volume)
    for form in FORMS:
        assert not write(tmp_path / "seg.dcm", volume, [np.zeros(volume.shape, np.uint8)], form).pixel_array.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["series", "frames"])
def test_dciodvfy_finds_no_error(tmp_path, form, source):
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian: dicom3tools)")
    if source == "series":
        write_series(tmp_path / "s", voxels_of(), AXIAL, PatientName="A^B", PatientSex="O", StudyDate="20200101")
    else:
        write_enhanced(tmp_path / "s", voxels_of(), AXIAL, [0, 1, 2, 3, 4])
    volume = read_volume(tmp_path / "s")
    write(tmp_path / "seg.dcm", volume, levels_of(volume.shape), form)
    said = subprocess.run(["dciodvfy", "-new", tmp_path / "seg.dcm"], capture_output=True, text=True)
    errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
    if form == "labelmap":  # which Debian's dciodvfy does not know yet, nor that its label 0 is the background
        errors = [line for line in errors if "Information Object Not found" not in line and "SegmentNumber of 0" not in line]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("attribute", ["StudyInstanceUID", "PixelSpacing"])
def test_a_source_that_lacks_what_a_segmentation_says_is_one_line(tmp_path, attribute):
    write_series(tmp_path / "s", voxels_of(), AXIAL, lambda _, dataset: dataset.__delitem__(attribute))
    volume = read_volume(tmp_path / "s")
    with pytest.raises(InputError, match=rf"seg\.dcm: the source has no {attribute}, which a segmentation needs"):
        write(tmp_path / "seg.dcm", volume, levels_of(volume.shape))
    assert not (tmp_path / "seg.dcm").exists()


def test_a_mask_of_another_space_is_refused(tmp_path):
    write_series(tmp_path / "s", voxels_of(), AXIAL)
    write_series(tmp_path / "t", voxels_of(), affine_of(oblique(8) @ RIGHT_HANDED[0]))
    volume, other = read_volume(tmp_path / "s"), read_volume(tmp_path / "t")
    for name in ("seg.dcm", "seg.nii.gz"):
        write_labels(tmp_path / name, other, levels_of(other.shape), ["a", "b"], form="labelmap", algorithm="x")
        with pytest.raises(InputError, match=f"{re.escape(name)}: its voxels do not lie on those of the volume"):
            read_mask_volume(tmp_path / name, volume)
    with pytest.raises(InputError, match="no DICOM segmentation that can be read"):
        read_mask_volume(next((tmp_path / "s").iterdir()), volume)
