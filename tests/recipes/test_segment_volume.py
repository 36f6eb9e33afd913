"""`recipes.segment_volume` as a user runs it: a known structure found, resumed, written whole; nothing told of the patient."""

import json
import logging
import os
from pathlib import Path

import highdicom
import httpx2
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom import dcmread

from engine.command.main import run_command
from engine.data.volumes.grids import onto, read_mask_volume
from engine.data.volumes.nifti import LPS
from engine.data.volumes.read import read_volume
from engine.errors import InputError
from models.checkpoint import CheckpointError
from models.sam.loading import lite_medsam_checkpoint
from models.sam.sam import lite_medsam
from recipes import sam_predict, segment_volume
from tests.engine.data.volumes.made import affine_of, oblique, write_series
from tests.orthanc_server import fetch, running_orthanc, store

SHAPE, CENTRE, RADII = (7, 96, 96), (3, 46, 50), (2.6, 22, 27)


@pytest.fixture(scope="module")
def ball():
    """A bright ellipsoid [S, H, W] in noise, and where it is."""
    grid = np.indices(SHAPE).transpose(1, 2, 3, 0)
    truth = (((grid - np.array(CENTRE)) / np.array(RADII)) ** 2).sum(-1) < 1
    noise = np.random.default_rng(0).normal(0, 12, SHAPE)
    return (truth * 220 + 60 + noise).astype(np.int16), truth


@pytest.fixture
def series(ball, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    affine = affine_of(oblique(2), (4.0, 0.9, 0.9))
    if np.linalg.det(affine[:3, [2, 1, 0]]) < 0:  # so that slices are read in this order
        affine[:3, 0] *= -1
    write_series(tmp_path / "scan", ball[0], affine)
    made = LPS @ affine[:, [2, 1, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(ball[1].astype(np.uint8).transpose(2, 1, 0), made), tmp_path / "truth.nii.gz")
    return tmp_path / "scan"


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.pth"
    torch.save({"model": lite_medsam().state_dict()}, path)
    return str(path)


@pytest.fixture
def threshold(monkeypatch):
    """A segmenter that costs nothing: what is bright within the box. Gives the boxes that it was asked about."""
    asked = []

    def load(args, pictures):
        def ask(index, prompt):
            asked.append((index, prompt.box))
            x1, y1, x2, y2 = (round(side) for side in prompt.box)
            levels = np.zeros(SHAPE[1:], np.uint8)
            levels[y1:y2, x1:x2] = np.asarray(pictures(index).convert("L"))[y1:y2, x1:x2]
            return levels, 0.9

        return ask

    monkeypatch.setattr(segment_volume, "load_sam", load)
    return asked


BOX = "ball=3:20,22,80,72"


def test_a_box_in_one_slice_finds_the_whole(series, ball, capsys, monkeypatch):
    try:
        lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("sys.argv", ["segment_volume"])
    flags = ["--volume", str(series), "--boxes", BOX, "--mask", "truth.nii.gz", "--overlay", "--out", "out/seg.dcm"]
    run_command(segment_volume.main, flags)
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["dice"] > 0.9 and result["slices"] == 5
    marked = read_mask_volume(result["out"], read_volume(series))
    assert marked.sum() == result["voxels"] == result["labels"]["ball"]["voxels"]
    assert result["volume_ml"] == pytest.approx(marked.sum() * 4 * 0.9 * 0.9 / 1000)
    assert 2 * (marked & ball[1]).sum() / (marked.sum() + ball[1].sum()) == pytest.approx(result["dice"], abs=1e-5)
    sheet = np.asarray(Image.open(result["overlay"]))
    assert sheet.shape == (2 * 288, 3 * 288, 3) and (sheet[..., 0].astype(int) - sheet[..., 1] > 40).mean() > 0.03
    assert not list(Path("cache/segmented").glob("*"))  # nothing is left to be resumed


def test_an_interrupted_run_goes_on_where_it_was(series, threshold, monkeypatch, caplog):
    flags = ["--volume", str(series), "--boxes", BOX, "a=2:25,25,60,60", "--form", "fractional", "--window", "170,221"]
    whole = segment_volume.main([*flags, "--out", "whole.nii.gz"])
    assert whole["labels"]["ball"]["slices"] == 5 and 5 < len(threshold) <= 14
    calls, ask_of = len(threshold), segment_volume.FinishedSlices.ask

    def interrupted(self, label, ask):
        def until(index, prompt):
            if len(threshold) == calls // 2:
                raise KeyboardInterrupt
            return ask(index, prompt)

        return ask_of(self, label, until)

    threshold.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(segment_volume.FinishedSlices, "ask", interrupted)
        segment_volume.main([*flags, "--out", "resumed.nii.gz"])
    assert len(threshold) == calls // 2 and not Path("resumed.nii.gz").exists()
    damaged = sorted(Path("cache/segmented").rglob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    with caplog.at_level(logging.INFO):
        resumed = segment_volume.main([*flags, "--out", "resumed.nii.gz"])
    assert len(threshold) == calls + 1 and f"{calls // 2 - 1} slices were segmented by a run before" in caplog.text
    assert Path("resumed.nii.gz").read_bytes() == Path("whole.nii.gz").read_bytes()
    assert {**whole, "out": 0, "seconds": 0} == {**resumed, "out": 0, "seconds": 0}


SECRETS = {
    "PatientName": "Quillfeather^Ottoline",
    "PatientID": "SECRETID4711",
    "PatientBirthDate": "19371105",
    "InstitutionName": "Secret Hospital of Nowhere",
    "AccessionNumber": "SECRETACC99",
    "ReferringPhysicianName": "Hiddenmann^Doctor",
    "StudyDate": "20010203",
    "StudyDescription": "SECRET study",
    "SeriesDescription": "SECRET series",
    "StudyInstanceUID": "2.25.98765432101",
    "SeriesInstanceUID": "2.25.98765432102",
}


def test_nothing_says_who_the_patient_is(ball, tmp_path, random_weights, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.setattr(segment_volume.FinishedSlices, "remove", lambda self: None)  # what a killed run leaves
    affine = affine_of(np.eye(3)[:, [2, 1, 0]])
    wrong = {"PatientAge": "SECRETAGE", "PatientWeight": "1"}  # of a form that libraries warn about
    write_series(tmp_path / "scan", ball[0][2:5], affine, **SECRETS, **wrong)
    common = ["--checkpoint", random_weights, "--overlay"]
    for flags in (
        ["--volume", "scan", "--boxes", "1:20,22,80,72", "--out", "seg.dcm"],
        ["--volume", "scan", "--boxes", "1:20,22,80,72", "--out", "seg.nii.gz"],
        ["--volume", "scan", "--boxes", "99:1,2,3,4", "--out", "x.dcm"],
    ):
        with caplog.at_level(logging.DEBUG):
            try:
                run_command(segment_volume.main, [*flags, *common])
            except SystemExit as end:
                assert end.code == 2
    run_command(sam_predict.main, ["--image", "scan", "--box", "20,22,80,72", "--slice", "all", *common])
    write_series(tmp_path / "scan" / "more", ball[0][:2], affine, **SECRETS | {"SeriesInstanceUID": "2.25.98765432103"})
    for flags in (["--volume", "scan"], ["--volume", "scan", "--series", "9"]):
        with pytest.raises(SystemExit):
            run_command(segment_volume.main, flags)
    said = [*capfd.readouterr(), caplog.text]
    written = [path for path in tmp_path.rglob("*") if "scan" not in path.parts]
    said += [str(path) for path in written]
    said += [path.read_bytes().decode("latin-1") for path in written if path.is_file() and path.name != "seg.dcm"]
    for secret in [*SECRETS.values(), "Quillfeather", "SECRETAGE", "2.25.98765432103"]:
        assert not [text[:200] for text in said if secret in text]
    assert {path.name for path in written} >= {"seg.dcm", "seg.nii.gz", "seg.overlay.png", "mask.0002.png"}
    assert SECRETS["PatientName"].encode() in Path("seg.dcm").read_bytes()  # it belongs to the patient's study


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--boxes is missing: slice:x1,y1,x2,y2 in 7 slices of 96 rows and 96 columns"),
        (["--boxes", "1,2,3,4"], 'expected "slice:x1,y1,x2,y2", or "label=slice:x1,y1,x2,y2"'),
        (["--boxes", "1:2,3,4"], 'expected "slice:x1,y1,x2,y2"'),
        (["--boxes", "9:1,2,3,4"], "slice 9: expected a slice from 0 to 6"),
        (["--boxes", "1:0,0,97,5"], "expected 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 96"),
        (["--boxes", "1:0,0,nan,5"], "expected 0 <= x1 < x2 <= 96"),
        (["--boxes", "1:0,0,5,5", "1:0,0,6,6"], "expected one box a slice of each label"),
        (["--boxes", "1:0,0,5,5", "--slice", "2"], "expected one in slice 2, which --slice names"),
        (["--slice", "7"], "--slice 7: expected a slice from 0 to 6"),
        (["--window", "x"], "--window x: expected a centre and a width"),
        (["--series", "2"], "--series 2"),
        (["--out", "seg.png"], "--out seg.png: expected a name that ends in .dcm, .nii or .nii.gz"),
        (["--out", "truth.nii.gz", "--mask", "truth.nii.gz"], "is the file that --mask names"),
        (["--out", "scan/002.dcm"], "scan/002.dcm: is in the folder that --volume names"),
        (["--out", "truth.nii.gz/x.nii"], "truth.nii.gz/x.nii: cannot be written"),
        (["--boxes", BOX, "--mask", "absent.nii"], "absent.nii"),
        (["--model", "tiny_sam"], "--checkpoint is missing: the published weights of tiny_sam"),
        (["--model", "prs_med"], "--model prs_med: --checkpoint and --question are missing"),
        (["--model", "prs_med", "--checkpoint", "x", "--question", "y", "--boxes", BOX], "PRS-Med takes a question and no boxes"),
        (["--question", "y"], "lite_medsam takes boxes and no question"),
        (["--boxes", BOX, "--checkpoint", "absent.pth"], "absent.pth: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(series, flags, message):
    with pytest.raises(InputError) as error:
        segment_volume.main(["--volume", str(series), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("runs").exists() and not list(Path().glob("seg*"))


def test_a_nifti_volume_has_no_dicom_segmentation(series):
    with pytest.raises(InputError, match="a DICOM segmentation refers to DICOM images"):
        segment_volume.main(["--volume", "truth.nii.gz", "--boxes", BOX, "--out", "seg.dcm"])


def test_one_slice_alone_and_several_structures(series, threshold):
    flags = ["--volume", str(series), "--window", "170,221"]
    alone = segment_volume.main([*flags, "--boxes", "20,22,80,72", "--slice", "3", "--out", "one.nii"])
    marked = nibabel.load("one.nii").get_fdata()
    assert alone["slices"] == 1 and not np.delete(marked, 3, axis=2).any()
    both = segment_volume.main([*flags, "--boxes", BOX, "other=2:25,25,60,60", "--form", "binary", "--out", "two.nii.gz"])
    marked = nibabel.load("two.nii.gz").get_fdata()
    assert marked.shape == (96, 96, 7, 2)
    assert [int(marked[..., n].sum()) for n in (0, 1)] == [both["labels"][name]["voxels"] for name in ("ball", "other")]


def test_prs_med_is_asked_in_every_slice(series, monkeypatch):
    from models.prs_med import model as prs_med

    asked = []

    class Asked:
        def to(self, _):
            return self

        def segment_batch(self, images, questions, max_new_tokens):
            asked.append((np.asarray(images[0]), questions[0], max_new_tokens))
            grey = torch.from_numpy(np.asarray(images[0].convert("L"), np.float32))
            return [("", grey - 128)]

    monkeypatch.setattr(prs_med, "load_prs_med", lambda *_, **__: Asked())
    flags = ["--model", "prs_med", "--checkpoint", "x", "--question", "Where?", "--window", "170,221"]
    result = segment_volume.main(["--volume", str(series), *flags, "--out", "seg.dcm"])
    assert len(asked) == 7 and {question for _, question, _ in asked} == {"Where?"}
    marked = read_mask_volume("seg.dcm", read_volume(series))
    shown = np.stack([picture[..., 0] for picture, *_ in asked])
    assert np.array_equal(marked, shown >= 128) and result["voxels"] == marked.sum() > 1000


def test_the_starter_volume_is_built_from_what_nibabel_carries(tmp_path, monkeypatch):
    from engine.data.volumes.starter import build_head

    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path))
    volume = read_volume(build_head())
    assert volume.shape == (24, 96, 128) and volume.placed and os.path.getsize(build_head()) < 400_000


def test_a_series_in_a_real_pacs_is_segmented_there_and_back(ball, threshold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    affine = affine_of(oblique(2)[:, [2, 1, 0]], (4.0, 0.9, 0.9))
    with running_orthanc(tmp_path) as orthanc:
        store(orthanc, write_series(tmp_path / "made", ball[0], affine, PatientName="A^B"))
        (found,) = httpx2.get(f"{orthanc}/series?StudyInstanceUID=2.25.1", timeout=60).json()
        assert found["0020000E"]["Value"] == ["2.25.2"]
        assert len(fetch(f"{orthanc}/studies/2.25.1/series/2.25.2", tmp_path / "fetched")) == SHAPE[0]

        flags = ["--volume", "fetched", "--boxes", "3:20,22,80,72", "--window", "170,221"]
        for form in ("labelmap", "binary", "fractional"):
            result = segment_volume.main([*flags, "--form", form, "--out", f"{form}.dcm"])
            store(orthanc, [tmp_path / f"{form}.dcm"])
            series = dcmread(f"{form}.dcm").SeriesInstanceUID
            (path,) = fetch(f"{orthanc}/studies/2.25.1/series/{series}", tmp_path / f"back-{form}")
            assert dcmread(path) == dcmread(f"{form}.dcm")
            back, volume = highdicom.seg.segread(path).get_volume(), read_volume("fetched")
            marked = onto(np.asarray(back.array[..., 0] >= 0.5), back.affine, volume, "")
            assert marked.sum() == result["voxels"] > 1000 and np.array_equal(marked & ball[1], marked)
