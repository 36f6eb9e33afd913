"""NIfTI in and out: the geometry of every orientation to the voxel, values, windows, and files that lie."""

import gzip

import nibabel
import numpy as np
import pytest

from engine.data.volumes.nifti import LPS, radiological_turn, read_nifti, write_nifti
from engine.data.volumes.read import read_volume
from engine.data.volumes.values import Pictures, read_window
from engine.errors import InputError
from tests.engine.data.volumes.made import SIGNED, affine_of, oblique, voxels_of

ROTATIONS = [directions @ turned for turned in (np.eye(3), oblique(1), oblique(2)) for directions in SIGNED]


def write(path, values, affine, **changes):
    image = nibabel.Nifti1Image(values, affine)
    for name, value in changes.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_masks_return_voxel_for_voxel_from_all_48_orientations_and_oblique_ones(tmp_path, form):
    stored = voxels_of((7, 5, 4))
    source, out = tmp_path / "in.nii", tmp_path / "out.nii.gz"
    for directions in ROTATIONS:
        affine = affine_of(directions, (0.7, 1.3, 4.0))
        image = nibabel.Nifti1Image(stored, affine)
        if form == "qform":
            image.set_sform(None)
            image.set_qform(affine, 1)
        nibabel.save(image, source)
        volume = read_nifti(source)
        assert volume.shape[0] == 4 and np.isclose(volume.voxel_volume, 0.7 * 1.3 * 4)
        read = nibabel.load(source)
        for value in (-200, -133, -61):
            world = read.affine @ [*np.argwhere(stored == value)[0], 1]
            assert np.allclose(volume.position(*np.argwhere(volume.voxels == value)[0]), (LPS @ world)[:3], atol=1e-4)
        write_nifti(out, volume, (volume.voxels > -170).astype(np.uint8))
        written = nibabel.load(out)
        assert np.array_equal(written.get_fdata(), stored > -170)
        assert np.array_equal(written.affine, read.affine) and written.get_data_dtype() == np.uint8
        assert (
            written.header["sform_code"] == read.header["sform_code"] and written.header["qform_code"] == read.header["qform_code"]
        )


def test_slices_are_shown_as_radiologists_see_them():
    """Whatever the orientation the patient's left, else the back, is on the right, and the back, else the feet, below."""
    for directions in ROTATIONS[:48]:
        affine = affine_of(directions)
        turn = radiological_turn(affine)
        _, rows, columns, _ = turn.affine(affine, (7, 5, 4)).T[:, :3]
        across = int(np.argmax(np.abs(directions[:, 2])))  # the anatomical axis of the slices
        right, below = {0: ((0, 1, 0), (0, 0, -1)), 1: ((1, 0, 0), (0, 0, -1)), 2: ((1, 0, 0), (0, 1, 0))}[across]
        assert np.allclose(columns / np.linalg.norm(columns), right) and np.allclose(rows / np.linalg.norm(rows), below)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, ">i2", np.uint16, np.int32, np.float32, ">f8"])
@pytest.mark.parametrize("scaling", [(1, 0), (2, -1024), (0.25, 3)])
def test_values_are_those_of_the_file_in_any_type_and_byte_order(tmp_path, kind, scaling):
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    header = nibabel.Nifti1Header(endianness=">" if str(kind).startswith(">") else "<")
    header.set_data_dtype(np.dtype(kind))
    header.set_data_shape(values.shape)
    header.set_slope_inter(*scaling)
    header["vox_offset"] = 352 if scaling[1] else 0  # which says the same
    header["magic"] = b"n+1"
    header.set_sform(np.eye(4), 1)
    path = tmp_path / "x.nii"
    path.write_bytes(header.binaryblock + bytes(4) + values.tobytes(order="F"))
    volume = read_nifti(path)
    assert np.allclose(volume.source.turn.store(volume.voxels), values.astype(float) * scaling[0] + scaling[1])


def test_windows_show_what_was_asked_for(tmp_path):
    values = np.arange(-500, 500, dtype=np.int16).reshape(10, 20, 5)
    volume = read_volume(write(tmp_path / "x.nii.gz", values, np.diag([-1, -1, 1, 1])))  # slices as stored
    shown = [np.asarray(Pictures(volume, read_window(text))(2))[..., 0] for text in ("100,201", "auto", None)]
    assert np.abs(shown[0] - np.clip((values[..., 2].T + 0.5) / 200 * 255, 0, 255)).max() <= 0.5
    assert np.array_equal(shown[1], shown[2])  # nothing is said in this file
    assert shown[1].min() < 5 and shown[1].max() > 250
    volume = read_volume(write(tmp_path / "x.nii.gz", values, np.diag([-1, -1, 1, 1]), cal_min=0, cal_max=200))
    expected = np.clip(values[..., 2].T / 200 * 255, 0, 255)
    assert np.abs(np.asarray(Pictures(volume)(2))[..., 0] - expected).max() <= 0.5


@pytest.mark.parametrize("text", ["40", "40,0", "40,-5", "a,b", "40,400,1", ""])
def test_a_window_that_means_nothing_is_refused(text):
    with pytest.raises(InputError, match=f"--window {text}: expected"):
        read_window(text)


def test_what_somebody_wrote_into_the_header_stays_in_the_source(tmp_path):
    path = write(tmp_path / "x.nii", voxels_of(), np.eye(4), descrip=b"SECRET^NAME", db_name=b"SECRET", aux_file=b"SECRET")
    write_nifti(tmp_path / "y.nii", read_nifti(path), np.ones((9, 12, 5), np.uint8))
    assert b"SECRET" in path.read_bytes() and b"SECRET" not in (tmp_path / "y.nii").read_bytes()


def hostile(tmp_path, change):
    path = write(tmp_path / "x.nii", voxels_of(), np.eye(4))
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def short(at, value):
    return lambda data: data.__setitem__(slice(at, at + 2), np.int16(value).tobytes())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.clear(), "no NIfTI file, or damaged"),
        (lambda data: data.__setitem__(slice(None), gzip.compress(data)[:-4] + b"size"), "damaged NIfTI: "),
        (lambda data: data.__delitem__(slice(400, None)), "bytes, where its header promises"),
        (lambda data: [short(at, 32767)(data) for at in (42, 44, 46)], "32767 x 32767 x 32767 voxels"),
        (short(42, -5), "damaged NIfTI|voxels"),
        (short(40, 9), "damaged NIfTI|no NIfTI"),
        (lambda data: (short(40, 4)(data), short(48, 3)(data)), "5 x 12 x 9 x 3 are several volumes"),
        (short(70, 32), "values of type complex64"),
        (short(70, 128), "values of type RGB"),
        (short(70, 999), "damaged NIfTI"),
        (lambda data: data.__setitem__(slice(280, 328), bytes(48)), "its affine does not place"),
        (lambda data: data.__setitem__(slice(108, 112), np.float32(3e9).tobytes()), "damaged NIfTI|voxels begin"),
        (lambda data: data.__setitem__(slice(108, 112), np.float32(np.nan).tobytes()), "damaged NIfTI"),
    ],
)
def test_a_header_that_lies_is_one_line(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        read_nifti(hostile(tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(tmp_path, monkeypatch):
    plain = write(tmp_path / "x.nii", voxels_of(), np.eye(4)).read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(plain + bytes(200_000_000), 1))
    reads, original = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: reads.append(size) or original(self, size))
    assert np.array_equal(np.sort(read_nifti(path).voxels, axis=None), np.arange(-200, 340))
    assert max(reads) <= len(plain) + 1 and min(reads) > 0
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="damaged"):
        read_nifti(path)


def test_without_nibabel_the_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(InputError, match=r"pip install 'vesalius\[volumes\]'"):
        read_volume(tmp_path / "x.nii")
