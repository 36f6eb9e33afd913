"""`recipes.export` as a user runs it: LiteMedSAM's bundle masks real images as Python does, and each mistake is one line.

Compiling LiteMedSAM takes minutes, so one bundle serves all tests.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from engine.command.main import run_command
from engine.device import one_thread_if_small
from engine.export.aoti import Package
from engine.export.bundle import read_bundle
from engine.export.export import TARGETS
from engine.export.parity import mask_iou
from models.checkpoint import CheckpointError
from models.loading import STARTER_POLICY
from models.prs_med.model import PRSMed, PRSMedConfig
from models.sam.frame import Frame
from models.sam.loading import lite_medsam_checkpoint, load_predictor
from models.starter.llava import build_tiny_llava
from recipes import export
from recipes.export import main

CPU = torch.device("cpu")


def test_the_flag_offers_every_target():
    assert export.TARGETS == list(TARGETS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(bundle, the command's last line) of LiteMedSAM; it stays as VESALIUS_SEG_BUNDLE where nothing is there yet."""
    try:
        lite_medsam_checkpoint()
    except CheckpointError as error:
        pytest.skip(str(error))
    one_thread_if_small(True, CPU)
    kept = Path(os.environ.get("VESALIUS_SEG_BUNDLE") or os.devnull)
    bundle = tmp_path_factory.mktemp("export") / "bundle" if kept.exists() else kept
    return bundle, main(["--out", str(bundle), "--intended_use", "a test"])


def packages(bundle):
    """{part: (what runs it, of tensors by name)} from a bundle's files alone."""
    manifest, runs = read_bundle(bundle), {}
    tensors = load_file(bundle / manifest["weights"])
    for name, entry in manifest["packages"].items():
        package = Package(bundle / entry["file"], CPU)
        package.use({constant: tensors[stored] for constant, stored in entry["constants"].items()})
        names = [given["name"] for given in entry["inputs"]]
        runs[name] = lambda package=package, names=names, **given: package._loaded(*(given[name].contiguous() for name in names))
    return manifest, runs


@pytest.mark.slow
def test_without_flags_of_a_model_litemedsam_becomes_a_bundle(exported):
    bundle, headline = exported
    manifest = read_bundle(bundle)
    assert headline["kind"] == "segmenter" and headline["max_abs_error"] < 1e-4 and headline["mask_iou"] > 0.999
    assert manifest["model"]["family"] == "lite_medsam" and manifest["intended_use"] == "a test"
    assert manifest["instruction_set"] and manifest["preprocessing"]["value_range"] == "minmax"
    weights = load_file(bundle / "weights.safetensors")
    assert sum(weight.nbytes for weight in weights.values()) > 0.9 * manifest["files"]["weights.safetensors"]["bytes"]
    assert all(manifest["files"][entry["file"]]["bytes"] < 8e6 for entry in manifest["packages"].values())  # without weights


@pytest.mark.slow
def test_the_packages_mask_real_images_as_python_does(exported, mini_data):
    manifest, runs = packages(exported[0])
    predictor = load_predictor("lite_medsam", None, CPU)
    size = manifest["preprocessing"]["size"]
    for path in sorted(mini_data.glob("masks/*/*.png"))[::9]:
        image = next((mini_data / "images" / path.parent.name).glob(f"{path.stem.split('__')[0]}.*"))
        pixels = np.asarray(Image.open(image).convert("RGB"))
        y, x = np.nonzero(np.asarray(Image.open(path).convert("L")) > 127)
        box, inside = [x.min(), y.min(), x.max() + 1, y.max() + 1], [float(np.median(x)), float(np.median(y))]
        frame = Frame.fit(pixels.shape[:2], size, "corner")
        predictor.set_image(pixels)
        given = frame.pad(predictor.model.normalise(frame.resize(pixels)))[None]
        (embedding,) = runs["image_encoder"](image=given)
        corners = frame.points(torch.tensor([box], dtype=torch.float32).unflatten(1, (2, 2)))
        point = frame.points(torch.tensor([[inside, [0.0, 0.0]]]))
        prompts = {
            "box": ({"boxes": [box]}, corners, torch.tensor([[2.0, 3.0]])),
            "point": ({"points": [[inside]], "labels": [[1.0]]}, point, torch.tensor([[1.0, -1.0]])),
        }
        for asked, rows, labels in prompts.values():
            expected = predictor.predict(**asked).masks
            low_res_masks, _ = runs["mask_decoder"](image_embeddings=embedding, point_coords=rows, point_labels=labels)
            assert mask_iou(expected, frame.masks(low_res_masks) > 0) >= 0.995, image


def test_prs_meds_mask_decoder_becomes_a_graph_that_reads_states(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'vesalius[export]'")
    vlm, tokenizer = build_tiny_llava(["Where is it?"], seed=0)
    model = PRSMed(vlm, tokenizer, PRSMedConfig(image_encoder="starter"))
    model.prepare_training(r=2, alpha=4, dropout=0.0, frozen_norms=False).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    headline = main(["--model", str(tmp_path / "checkpoint"), "--target", "onnx", "--out", str(tmp_path / "bundle")])
    manifest = read_bundle(tmp_path / "bundle")
    assert manifest["prompts"]["box"] is False and manifest["prompts"]["states"]["size"] == 96 and headline["mask_iou"] > 0.999
    states, embedding = torch.randn(1, 30, 96), torch.randn(1, 64, 16, 16)
    graph = onnxruntime.InferenceSession(tmp_path / "bundle" / "onnx" / "mask_decoder.onnx")
    (mask,) = graph.run(None, {"image_embeddings": embedding.numpy(), "prompt_states": states.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(mask), model.mask_decoder(embedding, states), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "gone.pth"], "--model gone.pth: no such file or folder"),
        (["--model", "notes.txt"], "--model: notes.txt: not a file of tensors"),
        (["--model", "other.pth"], "--model: other.pth: its tensors are those of no SAM"),
        (["--model", "folder"], "--model: folder: no checkpoint there"),
        (["--out", "full"], "--out full: exists already (expected a folder that does not, or an empty one)"),
        (["--out", "notes.txt/a"], "--out notes.txt/a: cannot be written"),
        (["--target", "openvino"], "argument --target: invalid choice: 'openvino'"),
        (["--evaluation", "folder"], "--evaluation folder: no evaluation.json there"),
        (["--gpu", "sm_86"], "--gpu is of --target tensorrt alone"),
        (["--model", str(STARTER_POLICY), "--target", "onnx"], "a VLM's caches are written in place, as only packages can"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "--device cuda: no GPU is here, and aoti compiles")]),
    ],
)
def test_a_users_mistake_is_one_line(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["export"])
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit) as ended:
        run_command(main, flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and lines[-1].startswith("error: ") and message in lines[-1]
    assert not (tmp_path / "runs").exists()
