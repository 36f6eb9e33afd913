"""Enhanced DICOM says rescale and window in functional groups, of a frame or of all."""

import io

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence

from engine.data.decoders.dicom import read_stored
from engine.data.images import decode_image
from engine.errors import InputError

SLOPE, INTERCEPT, CENTRE, WIDTH = 2.0, -1000.0, 40.0, 400.0


def item(**values) -> Sequence:
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return Sequence([made])


def enhanced(shared: bool, own: bool, inverted: bool = False) -> tuple[bytes, np.ndarray]:
    """Three frames with a group of their own, a shared one, or both, where the frame's holds; and the middle frame as stored."""
    dataset = dcmread(get_testdata_file("CT_small.dcm"))
    stored = np.arange(3 * 128 * 128).reshape(3, 128, 128).astype(np.int16) % 1200
    dataset.PixelData, dataset.NumberOfFrames = stored.tobytes(), 3
    for name in ("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"):
        delattr(dataset, name)
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"

    def group(centre: float) -> Dataset:
        made = Dataset()
        made.PixelValueTransformationSequence = item(RescaleSlope=SLOPE, RescaleIntercept=INTERCEPT, RescaleType="HU")
        made.FrameVOILUTSequence = item(WindowCenter=centre, WindowWidth=WIDTH)
        return made

    if shared:
        dataset.SharedFunctionalGroupsSequence = Sequence([group(CENTRE + 500 if own else CENTRE)])
    if own:
        dataset.PerFrameFunctionalGroupsSequence = Sequence([group(CENTRE + shift) for shift in (300, 0, -300)])
    content = io.BytesIO()
    dataset.save_as(content)
    return content.getvalue(), stored[1]


@pytest.mark.parametrize("shared, own", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_middle_frame_is_shown_by_its_groups(shared, own, inverted):
    content, stored = enhanced(shared, own, inverted)
    low = CENTRE - 0.5 - (WIDTH - 1) / 2
    expected = np.clip((stored * SLOPE + INTERCEPT - low) / (WIDTH - 1) * 255, 0, 255)
    shown = np.asarray(decode_image(content, "x.dcm"))[..., 0]
    assert np.abs(shown - (255 - expected if inverted else expected)).max() <= 1


def test_a_real_enhanced_file_is_shown_by_its_window():
    """pydicom's eCT_Supplemental: a window of 330 Hounsfield units in the groups, without which the whole range is one grey."""
    path = get_testdata_file("eCT_Supplemental.dcm")
    dataset = dcmread(path)
    frame = int(dataset.NumberOfFrames) // 2
    groups = [dataset.SharedFunctionalGroupsSequence[0], dataset.PerFrameFunctionalGroupsSequence[frame]]
    said = {element.keyword: element.value for group in groups for part in group for item in part.value for element in item}
    values = dataset.pixel_array[frame] * float(said["RescaleSlope"]) + float(said["RescaleIntercept"])
    centre, width = (float(np.ravel(said[name])[0]) for name in ("WindowCenter", "WindowWidth"))
    expected = np.clip((values - (centre - 0.5 - (width - 1) / 2)) / (width - 1) * 255, 0, 255)
    with open(path, "rb") as file:
        shown = np.asarray(decode_image(file.read(), path))[..., 0]
    assert np.abs(shown - expected).max() <= 1


def test_a_masks_values_are_as_they_are_stored():
    for inverted in (False, True):
        content, stored = enhanced(True, False, inverted)
        assert np.array_equal(read_stored(content), stored.max() - stored if inverted else stored)


@pytest.mark.parametrize("name", ["JPEG2000", "JPEG-LL", "SC_rgb_jpeg_gdcm", "SC_rgb_jpeg_dcmtk"])
def test_damaged_pixels_are_one_line_and_do_not_end_the_process(name):
    dataset = dcmread(get_testdata_file(f"{name}.dcm"))
    (whole,) = generate_frames(dataset.PixelData, number_of_frames=1)
    for at in range(2, 60, 3):
        dataset.PixelData = encapsulate([whole[:at] + bytes(range(97, 150))])
        dataset.save_as(content := io.BytesIO())
        with pytest.raises(InputError, match="x.dcm"):
            decode_image(content.getvalue(), "x.dcm")
