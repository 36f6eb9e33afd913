"""DICOM as volumes: order, geometry, values and windows; and what is no stack of slices in one line."""

import re

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from engine.data.images import decode_image, open_image
from engine.data.volumes.read import read_volume
from engine.data.volumes.values import Pictures, read_window
from engine.errors import InputError
from tests.engine.data.volumes.made import SIGNED, affine_of, oblique, voxels_of, write_enhanced, write_series

AXIAL = affine_of(np.array([[0, 0, 1.0], [0, 1, 0], [1, 0, 0]]))  # columns to the left, rows to the back, slices to the head
RIGHT_HANDED = [signed for signed in SIGNED if np.linalg.det(signed[:, [2, 1, 0]]) > 0]  # slices along the normal, as read


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "series"


def test_a_series_lies_where_it_was_in_every_orientation(tmp_path):
    voxels = voxels_of((3, 5, 4))
    for number, turned in enumerate((np.eye(3), oblique(3))):
        for place, directions in enumerate(RIGHT_HANDED):
            affine = affine_of(turned @ directions)
            write_series(tmp_path / f"{number}-{place}", voxels, affine, seed=place)
            volume = read_volume(tmp_path / f"{number}-{place}")
            assert np.array_equal(volume.voxels, voxels) and volume.voxels.dtype == np.int16
            assert np.allclose(volume.affine, affine, atol=1e-6) and volume.placed
            assert np.allclose(volume.spacing, (2.5, 0.8, 0.6)) and np.isclose(volume.voxel_volume, 1.2)
    assert len(RIGHT_HANDED) == 24


def test_slices_sheared_by_a_tilted_gantry_keep_their_places(folder):
    affine = AXIAL.copy()
    affine[1, 0] = 0.9  # each slice further to the back
    write_series(folder, voxels_of(), affine)
    volume = read_volume(folder)
    assert np.allclose(volume.affine, affine) and np.isclose(volume.voxel_volume, 2.5 * 0.8 * 0.6)


def test_frames_of_an_enhanced_file_are_ordered_and_rescaled_by_their_groups(tmp_path):
    voxels, affine = voxels_of(), affine_of(oblique(5) @ RIGHT_HANDED[7])
    volume = read_volume(write_enhanced(tmp_path / "x.dcm", voxels, affine, [3, 0, 4, 1, 2]))
    assert np.array_equal(volume.voxels, voxels) and np.allclose(volume.affine, affine)
    assert volume.source.frames == [1, 3, 4, 0, 2]


@pytest.mark.parametrize("name", ["CT_small.dcm", "eCT_Supplemental.dcm", "examples_ybr_color.dcm", "emri_small.dcm", "rtdose.dcm"])
def test_real_files_are_read(name):
    path = get_testdata_file(name)
    dataset, volume = dcmread(path), read_volume(path)
    frames = int(dataset.get("NumberOfFrames") or 1)
    assert volume.shape == (frames, dataset.Rows, dataset.Columns)
    middle = np.asarray(Pictures(volume)(volume.source.frames.index(frames // 2)))
    if "small" not in name:  # without a window a slice is shown in the volume's range, a single image in its own
        assert np.abs(middle.astype(int) - np.asarray(open_image(path))).max() <= 1


def one(folder, change=None, **values):
    (path,) = write_series(folder, voxels_of((1, 12, 9)), AXIAL, change, **values)
    return path


@pytest.mark.parametrize("syntax", [JPEGLSLossless, RLELossless])
def test_compressed_slices_are_the_same(folder, syntax):
    write_series(folder, voxels_of(), AXIAL, lambda _, dataset: dataset.compress(syntax))
    assert np.array_equal(read_volume(folder).voxels, voxels_of())


def test_compressed_frames_are_the_same():
    plain, *others = (read_volume(get_testdata_file(f"emri_small{name}.dcm")) for name in ("", "_RLE", "_jpeg_2k_lossless"))
    assert all(np.array_equal(plain.voxels, other.voxels) for other in others)


def test_monochrome1_is_shown_inverted_and_kept_as_measured(folder):
    plain = one(folder / "a", WindowCenter=-150, WindowWidth=51)
    inverted = one(folder / "b", WindowCenter=-150, WindowWidth=51, PhotometricInterpretation="MONOCHROME1")
    first, second = read_volume(plain), read_volume(inverted)
    assert np.array_equal(first.voxels, second.voxels)
    for window in ("dicom", "auto", "-140,31"):
        shown = [np.asarray(Pictures(volume, read_window(window))(0)).astype(int) for volume in (first, second)]
        assert np.array_equal(shown[0], 255 - shown[1]) and np.ptp(shown[0]) == 255
    assert np.array_equal(np.asarray(Pictures(second)(0)), np.asarray(decode_image(inverted.read_bytes(), "x.dcm")))


def test_padding_counts_as_the_lowest_value_measured(folder):
    def pad(_, dataset):
        values = np.frombuffer(dataset.PixelData, np.int16).copy()
        values[:9] = [-2000, -2000, -1999] * 3
        dataset.PixelData, dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = values.tobytes(), -2000, -1999
        dataset["PixelPaddingValue"].VR = dataset["PixelPaddingRangeLimit"].VR = "SS"

    volume = read_volume(one(folder, pad))
    assert np.array_equal(volume.voxels[0, 1:], voxels_of((1, 12, 9))[0, 1:]) and set(volume.voxels[0, 0]) == {
        volume.voxels[0, 1:].min()
    }


def test_values_that_are_no_integers_after_the_rescale_stay_exact(folder):
    def change(index, dataset):
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, index

    write_series(folder, voxels_of(), AXIAL, change)
    volume = read_volume(folder)
    assert volume.voxels.dtype == np.float32
    assert np.array_equal(volume.voxels, (voxels_of() + 1024) * 0.5 + np.arange(5)[:, None, None])


def test_each_slice_is_shown_by_its_own_window(folder):
    write_series(folder, voxels_of(), AXIAL, lambda index, dataset: setattr(dataset, "WindowCenter", 40 * index), WindowWidth=101)
    volume = read_volume(folder)
    for index in range(5):
        low = 40 * index - 50.5
        expected = np.clip((voxels_of()[index] - low) / 100 * 255, 0, 255)
        assert np.abs(np.asarray(Pictures(volume)(index))[..., 0] - expected).max() <= 1


def test_a_window_without_width_says_nothing_and_a_mask_is_seen(folder):
    mask = (voxels_of() > 0).astype(np.int16)
    write_series(folder, mask, AXIAL, WindowCenter=40, WindowWidth=0)
    assert np.array_equal(np.asarray(Pictures(read_volume(folder))(2))[..., 0], mask[2] * 255)


def test_a_damaged_window_is_one_line(folder):
    path = one(folder, lambda _, dataset: dataset.add_new("WindowCenter", "LO", "x"), WindowWidth=101)
    with pytest.raises(InputError, match="slice 0: its window or table is damaged"):
        Pictures(read_volume(path))(0)
    assert np.ptp(np.asarray(Pictures(read_volume(path), "auto")(0))) > 200


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_one_line_each(tmp_path, seed):
    """Bytes flipped and ends cut off; nothing but an InputError of one line comes of it."""
    numbers, refused = np.random.default_rng(seed), 0
    for name in ("CT_small.dcm", "eCT_Supplemental.dcm", "rtdose.dcm", "emri_small_RLE.dcm"):
        with open(get_testdata_file(name), "rb") as file:
            whole = np.frombuffer(file.read(200_000), np.uint8)
        for _ in range(12):
            data = whole.copy()
            data[numbers.integers(0, min(6000, len(data)), 6)] = numbers.integers(0, 256, 6)
            (tmp_path / "x.dcm").write_bytes(data[: numbers.integers(len(data) // 2, 2 * len(data))].tobytes())
            for path in (tmp_path / "x.dcm", tmp_path):
                try:
                    Pictures(read_volume(path))(0)
                except InputError as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert refused > 10


def other_series(folder):
    write_series(folder / "more", voxels_of((2, 12, 9)), AXIAL, SeriesInstanceUID="2.25.9", SeriesNumber=7, Modality="MR")


def test_of_several_series_one_is_chosen(folder):
    write_series(folder, voxels_of(), AXIAL)
    other_series(folder)
    with pytest.raises(InputError) as error:
        read_volume(folder)
    said = "holds 2 series, expected one, or --series 1 to 2 (1: CT 12 x 9, 5 files; 2: MR 12 x 9, 2 files)"
    assert str(error.value) == f"{folder}: {said}"
    assert [read_volume(folder, series=name).shape[0] for name in ("1", "2", "2.25.2", "2.25.9")] == [5, 2, 5, 2]
    with pytest.raises(InputError, match=r"--series 3: .*expected a number from 1 to 2, or a UID"):
        read_volume(folder, series="3")


def moved(index, by):
    def change(at, dataset):
        if at == index:
            dataset.ImagePositionPatient = [float(p) + b for p, b in zip(dataset.ImagePositionPatient, by, strict=True)]

    return change


def only(index, **values):
    return lambda at, dataset: [setattr(dataset, name, value) for name, value in values.items() if at == index]


@pytest.mark.parametrize(
    "change, message",
    [
        (moved(3, (0, 0, -2.5)), "2 slices at one place (1 more than expected): several times, echoes or copies?"),
        (moved(4, (0, 0, 5)), "after slice 3 comes a gap of 7.5 mm, where slices lie 2.5 mm apart: 2 missing?"),
        (moved(2, (0, 0, 0.6)), "slices lie 1.9 to 3.1 mm apart, expected one distance"),
        (moved(2, (3, 0, 0)), "the slices do not lie along one straight line"),
        (only(2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), "slices of 2 orientations, expected one (a scout among them?)"),
        (only(2, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "slices of 2 orientations"),
        (only(2, PixelSpacing=[2, 2]), "slices of 2 pixel spacings, expected one"),
        (only(2, ImagePositionPatient=None), "not all slices have ImagePositionPatient and Im"),
        (lambda _, dataset: dataset.__delitem__("ImagePositionPatient"), "images without a place in the patient"),
        (only(2, Rows=6, PixelData=bytes(108)), "slices of 2 sizes (6 x 9, 12 x 9), expected one"),
        (only(2, PixelData=bytes(10)), "damaged DICOM"),
        (only(2, Rows=60000, Columns=60000), "pixels are more than an image may have"),
        (only(2, NumberOfFrames="900000000"), "promises more voxels"),
        (only(2, BurnedInAnnotation="yes"), "BurnedInAnnotation is YES"),
        (lambda _, dataset: dataset.__delitem__("Rows"), "damaged DICOM: it ends before its image"),
    ],
)
def test_what_is_no_stack_is_one_line(folder, change, message):
    write_series(folder, voxels_of(), AXIAL, change)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_volume(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_other_objects_in_the_folder_are_passed_over(folder):
    write_series(folder, voxels_of(), AXIAL)
    (folder / "notes.txt").write_text("no DICOM")
    (folder / ".DS_Store").write_bytes(b"x")
    write_series(
        folder / "seg", voxels_of((1, 12, 9)), AXIAL, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4", SeriesInstanceUID="2.25.8"
    )
    assert read_volume(folder).shape == (5, 12, 9)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"x" * 200), lambda path: None])
def test_where_no_volume_is_there_is_one_line(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(InputError, match="no DICOM images in this folder|not a DICOM file|No such file"):
        read_volume(tmp_path / "x")


def test_burned_in_annotations_are_refused_everywhere_unless_they_are_allowed(folder, monkeypatch):
    path = one(folder, BurnedInAnnotation="YES")
    for read in (read_volume, open_image, lambda path: open_image(f"{path}#slice=0")):
        monkeypatch.delenv("VESALIUS_ALLOW_BURNED_IN", raising=False)
        with pytest.raises(InputError, match="BurnedInAnnotation is YES.*--allow_burned_in"):
            read(path)
        monkeypatch.setenv("VESALIUS_ALLOW_BURNED_IN", "1")
        assert read(path) is not None


def test_a_deflated_file_is_inflated_no_further_than_a_file_may_be(folder, monkeypatch):
    def deflate(_, dataset):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.add_new(0x7FE1_0010, "OB", bytes(4_000_000))

    path = one(folder, deflate)
    assert path.stat().st_size < 20_000 and np.array_equal(read_volume(path).voxels, voxels_of((1, 12, 9)))
    monkeypatch.setattr("engine.data.decoders.dicom.MAX_INFLATED", 3_000_000)
    for read in (read_volume, open_image, lambda path: read_volume(path.parent)):
        with pytest.raises(InputError, match="inflates to more than 3,000,000 bytes"):
            read(path)
