"""vesalius-seg at the command line: its masks against Python's, and everything that can be wrong with what it is given."""

import hashlib
import json
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.data.images import open_image
from engine.export.export import export_bundle
from tests.engine.serve.pictures import write_pictures
from tests.engine.serve.small_segmenter import SmallSegmenter, overlap

PROMPTS = {
    "a box": ((20, 10, 90, 70), []),
    "a point": (None, [(60.5, 40, 1)]),
    "points": (None, [(60, 40, 1), (10, 80, 0), (100, 20, 1)]),
    "a box and points": ((20, 10, 90, 70), [(60, 40, 1), (25, 15, 0)]),
}


@pytest.fixture(scope="module")
def seg(binaries):
    def run(*arguments):
        return subprocess.run([binaries / "vesalius-seg", *map(str, arguments)], capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))["rgb.png"]  # 131 x 90


def flags(box, points):
    flag = ["--box", ",".join(map(str, box))] if box else []
    return flag + (["--points", ";".join(",".join(map(str, point)) for point in points)] if points else [])


def change(bundle, **entries):
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps(manifest | entries), encoding="utf-8")
    return manifest


def seal(bundle, name):
    """Write a file's size and hash into the manifest."""
    content = (bundle / name).read_bytes()
    files = change(bundle)["files"]
    change(bundle, files=files | {name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}})


def refused(ran, *words):
    assert ran.returncode == 2, ran
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("vesalius-seg: ") and ran.stdout == "", ran
    for word in words:
        assert word in ran.stderr, ran.stderr


@pytest.mark.parametrize("kind", PROMPTS)
def test_masks_are_those_of_python(seg, small_bundle, picture, tmp_path, kind):
    box, points = PROMPTS[kind]
    ran = seg(small_bundle, "--image", picture, *flags(box, points), "--out", tmp_path / "mask.png")
    assert ran.returncode == 0, ran.stderr
    headline = json.loads(ran.stdout)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    ((expected, iou),) = SmallSegmenter().segment(open_image(picture), [(box, points)])
    assert mask.shape == (90, 131) and set(np.unique(mask)) == {0, 255}
    assert overlap(mask > 0, expected) >= 0.995
    assert headline["area"] == (mask > 0).sum() and abs(headline["predicted_iou"] - iou) < 1e-4


def test_what_a_half_type_package_is_given_is_rounded_to_its_type(seg, picture, tmp_path):
    half, box = SmallSegmenter(dtype=torch.bfloat16), (20, 10, 90, 70)
    export_bundle(half.exported(), "aoti", torch.device("cpu"), torch.bfloat16, tmp_path / "bundle")
    ran = seg(tmp_path / "bundle", "--image", picture, *flags(box, []), "--out", tmp_path / "mask.png")
    assert ran.returncode == 0, ran.stderr
    ((expected, iou),) = half.segment(open_image(picture), [(box, [])])
    assert overlap(np.asarray(Image.open(tmp_path / "mask.png")) > 0, expected) >= 0.995
    assert abs(json.loads(ran.stdout)["predicted_iou"] - iou) < 1e-3


@pytest.mark.parametrize("normalisation, fit", [("imagenet", "corner"), ("imagenet", "stretch_nearest"), ("min_max", "stretch")])
def test_the_manifests_preprocessing_is_what_is_done(seg, bundle, picture, tmp_path, normalisation, fit):
    model = SmallSegmenter(normalisation, fit)
    change(bundle, preprocessing=model.exported().facts["preprocessing"])
    box, points = PROMPTS["a box and points"]
    assert seg(bundle, "--image", picture, *flags(box, points), "--out", tmp_path / "mask.png").returncode == 0
    ((expected, _),) = model.segment(open_image(picture), [(box, points)])
    assert 0 < expected.mean() < 1 and overlap(np.asarray(Image.open(tmp_path / "mask.png")) > 0, expected) >= 0.995


def test_help_lists_the_flags(seg):
    ran = seg("--help")
    assert ran.returncode == 0 and all(flag in ran.stdout for flag in ("--image", "--box", "--points", "--out", "--serve"))


@pytest.mark.parametrize(
    "given, words",
    [
        (["--box", "1,2,3"], "expected four numbers"),
        (["--box", "1,2,3,x"], "expected four numbers"),
        (["--box", "1,2,nan,4"], "expected four numbers"),
        (["--box", "0,0,132,90"], "in an image of 131 x 90"),
        (["--box", "9,9,9,20"], "expected 0 <= x1 < x2"),
        (["--box=-1,0,5,5"], "expected 0 <= x1 < x2"),
        (["--points", "1,2"], "expected x,y,label"),
        (["--points", "1,2,7"], "labels 1 (inside) or 0 (outside)"),
        (["--points", "200,2,1"], "lies outside the image"),
        (["--points", ";".join(["1,2,1"] * 6)], "6 points (expected at most 5 without a box)"),
        ([], "neither a box nor points"),
        (["--box", "1,2,3,4", "--boxes", "1"], "--help lists the flags"),
        (["--box", "1,2,3,4", "--threads", "many"], "--threads"),
        (["--serve", "70000"], "--serve"),
        (["--serve", "0", "--host", "0.0.0.0"], "--token is needed"),
        (["--serve", "0", "--host", "nowhere"], "expected an IP address"),
    ],
)
def test_a_bad_flag_is_one_line(seg, small_bundle, picture, tmp_path, given, words):
    refused(seg(small_bundle, "--image", picture, "--out", tmp_path / "mask.png", *given), words)
    assert not (tmp_path / "mask.png").exists()


def test_a_bad_output_is_one_line(seg, small_bundle, picture, tmp_path):
    asked = [small_bundle, "--image", picture, "--box", "1,2,30,40", "--out"]
    refused(seg(*asked, tmp_path / "mask.jpg"), "ends in .png")
    refused(seg(*asked, tmp_path / "none" / "mask.png"), "no such folder")
    refused(seg(*asked, picture), "it is --image")
    refused(seg(small_bundle, "--image", tmp_path / "none.png", "--box", "1,2,30,40", "--out", tmp_path / "m.png"), "none.png")


def test_a_bundle_that_is_not_whole_is_one_line(seg, bundle, picture, tmp_path):
    def run():
        return seg(bundle, "--image", picture, "--box", "1,2,30,40", "--out", tmp_path / "mask.png")

    weights, package = bundle / "weights.safetensors", bundle / "packages" / "mask_decoder.pt2"
    for file in (weights, package):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        refused(run(), file.name, "changed since the export")
        file.write_bytes(whole[:-1])
        refused(run(), file.name, f"{len(whole) - 1} bytes (expected {len(whole)})")
        file.unlink()
        refused(run(), file.name, "missing")
        file.write_bytes(whole)
    assert run().returncode == 0
    (bundle / "manifest.json").unlink()
    refused(run(), "holds no manifest.json")
    refused(seg(tmp_path / "none", "--image", picture, "--box", "1,2,30,40", "--out", tmp_path / "m.png"), "no such folder")


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"format": "another"}, "not the manifest of a vesalius-bundle"),
        ({"format_version": 2}, "format version 2 (expected 1"),
        ({"kind": "vlm"}, "kind is 'vlm' (expected 'segmenter')"),
        ({"target": "onnx"}, "target is 'onnx' (expected 'aoti')"),
        ({"device": "cuda"}, "device is 'cuda' (expected 'cpu')"),
        ({"versions": {"torch": "1.0.0"}}, "torch is '1.0.0' (expected '"),
        ({"instruction_set": "AVX2 AVX9000"}, "this processor lacks AVX9000"),
        ({"files": {"../weights": {"sha256": "", "bytes": 0}}}, "outside the bundle"),
        ({"files": {}}, "gives no hash of"),
        ({"packages": {}}, "no package 'image_encoder'"),
        ({"dimensions": {}}, "no range of 'prompts'"),
        ({"prompts": {}}, "manifest.json"),
        ({"preprocessing": {"kind": "sam"}}, "preprocessing"),
        ({"weights": 3}, "not a whole manifest"),
    ],
)
def test_a_manifest_that_is_not_for_this_program_is_one_line(seg, bundle, picture, tmp_path, entries, words):
    change(bundle, **entries)
    refused(seg(bundle, "--image", picture, "--box", "1,2,30,40", "--out", tmp_path / "mask.png"), words)


def test_weights_that_do_not_fit_are_one_line(seg, bundle, picture, tmp_path):
    asked = [bundle, "--image", picture, "--box", "1,2,30,40", "--out", tmp_path / "mask.png"]
    file = bundle / "weights.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    seal(bundle, file.name)
    refused(seg(*asked), "no tensor is called")
    for content in (b"", b"\xff" * 40, whole[:100], b"\x02" + bytes(7) + b"{]" + whole):
        file.write_bytes(content)
        seal(bundle, file.name)
        refused(seg(*asked), "weights.safetensors")
    package = bundle / "packages" / "mask_decoder.pt2"
    file.write_bytes(whole)
    seal(bundle, file.name)
    package.write_bytes(package.read_bytes()[: 1 << 12])
    seal(bundle, "packages/mask_decoder.pt2")
    refused(seg(*asked), "mask_decoder.pt2", "cannot be loaded")
