"""A slice of a volume wherever an image is: which one, how it is shown, kept once, and what is said of one that is not there."""

import nibabel
import numpy as np
import pytest
from PIL import Image

from engine.data.image_check import find_bad_images
from engine.data.images import ImageError, open_image, open_slices
from engine.data.loaders.decoded import DecodedImages
from engine.data.loaders.pixel_store import PixelStore
from engine.data.sources import ImageFile
from engine.data.volumes.read import read_volume
from engine.data.volumes.values import Pictures, read_window
from engine.data.volumes.view import View
from tests.engine.data.volumes.made import voxels_of, write_enhanced, write_series
from tests.engine.data.volumes.test_series import AXIAL


@pytest.fixture(params=["folder", "frames", "nifti"])
def scan(request, tmp_path):
    if request.param == "folder":
        return write_series(tmp_path / "scan", voxels_of(), AXIAL)[0].parent
    if request.param == "frames":
        return write_enhanced(tmp_path / "scan.dcm", voxels_of(), AXIAL, [0, 1, 2, 3, 4])
    nibabel.save(nibabel.Nifti1Image(voxels_of().transpose(2, 1, 0), np.diag([-1, -1, 1, 1])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_slice_is_the_middle_one_or_the_one_that_is_said(scan):
    volume = read_volume(scan)
    views = [("", 2, None), ("#slice=4", 4, None), ("#slice=0&window=0,100", 0, "0,100"), ("#window=auto", 2, "auto")]
    for said, index, window in views:
        expected = np.asarray(Pictures(volume, read_window(window))(index))
        if said or scan.suffix != ".dcm":  # a file of many frames is shown as an image always was, in its own range
            assert np.array_equal(np.asarray(open_image(f"{scan}{said}")), expected)
            assert np.array_equal(np.asarray(open_slices(scan, str(index), window)[0]), expected)
    assert len(open_slices(scan, "all", None)) == 5


def test_a_file_that_is_really_called_so_is_taken_as_it_is(tmp_path):
    Image.new("RGB", (3, 2), (9, 8, 7)).save(tmp_path / "x#slice=1.png", "PNG")
    (tmp_path / "x#slice=1.png").rename(tmp_path / "x#slice=1")
    assert open_image(tmp_path / "x#slice=1").size == (3, 2) and View.of(tmp_path / "x#slice=1").slice is None


@pytest.mark.parametrize(
    "said, message",
    [
        ("#slice=5", "--slice 5: expected a slice from 0 to 4"),
        ("#slice=-1", "--slice -1: expected a slice from 0 to 4"),
        ("#slice=²", "--slice ²: expected"),
        ("#window=x", "--window x: expected a centre and a width"),
    ],
)
def test_a_slice_that_is_not_there_is_one_line(scan, said, message):
    with pytest.raises(ImageError, match=message) as error:
        open_image(f"{scan}{said}")
    assert str(scan) in str(error.value) and "\n" not in str(error.value)


def test_rows_may_name_slices_which_are_decoded_once(scan, tmp_path, monkeypatch):
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    files = [ImageFile(scan.with_name(f"{scan.name}#slice={index}")) for index in (0, 3, 9)]
    (bad,) = find_bad_images(files, tmp_path).items()
    assert bad == (files[2].key, "--slice 9: expected a slice from 0 to 4")
    name, data = files[1].read()
    assert name.endswith(".png") and data.startswith(b"\x89PNG")
    images = DecodedImages(PixelStore(tmp_path / "pixels", 10**8))
    first = images.pixels_of(files[0].path)
    assert np.array_equal(first, np.asarray(open_image(files[0].path)))
    monkeypatch.setattr("engine.data.volumes.view.read_volume", None)  # not opened again
    assert np.array_equal(images.pixels_of(files[0].path), first)
    assert not any("scan" in path.name for path in tmp_path.glob("pixels/*"))


def test_a_volume_that_changed_is_decoded_anew(scan, tmp_path):
    images, path = DecodedImages(PixelStore(tmp_path / "pixels", 10**8)), scan.with_name(f"{scan.name}#slice=1")
    before = images.pixels_of(path).copy()
    if scan.is_dir():
        write_series(scan, voxels_of(seed=1), AXIAL)
    elif scan.suffix == ".dcm":
        write_enhanced(scan, voxels_of(seed=1), AXIAL, [0, 1, 2, 3, 4])
    else:
        nibabel.save(nibabel.Nifti1Image(voxels_of(seed=1).transpose(2, 1, 0), np.diag([-1, -1, 1, 1])), scan)
    assert not np.array_equal(images.pixels_of(path), before)
