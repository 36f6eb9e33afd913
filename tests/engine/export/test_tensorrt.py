"""Engines that TensorRT for RTX builds without a GPU; without it, what to install."""

import sys
from dataclasses import replace

import pytest
import torch

from engine.errors import InputError
from engine.export.bundle import read_bundle
from engine.export.export import export_bundle
from models.exported import Source, nothing_more
from models.sam.export import export_sam
from models.sam.sam import lite_medsam
from tests.engine.export.small_model import small_model

CPU = torch.device("cpu")


@pytest.fixture
def rtx(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="pip install 'vesalius[export,tensorrt]'")
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'vesalius[export,tensorrt]'")


def test_the_mask_decoder_becomes_an_engine(rtx, tmp_path):
    torch.manual_seed(0)
    model = export_sam(lite_medsam().eval(), "lite_medsam", Source("random", "0", "a test"))
    decoder = replace(model, parts=model.parts[1:], compare=nothing_more)
    export_bundle(decoder, "tensorrt", torch.device("cuda"), torch.float32, tmp_path / "bundle", gpu="sm_86")
    manifest = read_bundle(tmp_path / "bundle")
    entry = manifest["packages"]["mask_decoder"]
    assert manifest["gpu"] == "sm_86" and manifest["versions"]["tensorrt_rtx"] == rtx.__version__
    weights = sum(weight.nbytes for weight in model.parts[1].module.parameters())
    assert manifest["files"][entry["file"]]["bytes"] > weights and entry["graph"] in manifest["files"]


def test_an_engine_is_built_once_for_a_graph_and_a_gpu(rtx, tmp_path):
    for bundle, gpu in (("first", "sm_86"), ("again", "sm_86"), ("other", "sm_120")):
        export_bundle(small_model(), "tensorrt", torch.device("cuda"), torch.float32, tmp_path / bundle, gpu=gpu)
    engines = [(tmp_path / bundle / "engines" / "rows.engine").read_bytes() for bundle in ("first", "again", "other")]
    assert engines[0] == engines[1] != engines[2]
    assert len(list((tmp_path / "cache" / "engines").iterdir())) == 4  # of two parts, for two kinds of GPU


def test_a_gpu_that_no_engine_can_be_built_for_is_one_line(rtx, tmp_path):
    for gpu in ("sm_90", "hopper"):
        with pytest.raises(InputError, match=rf"^--gpu {gpu}: tensorrt_rtx builds for sm_75, sm_80, sm_86"):
            export_bundle(small_model(), "tensorrt", torch.device("cuda"), torch.float32, tmp_path / "bundle", gpu=gpu)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="^--gpu is missing: the kind of GPU that the engines are for"):
            export_bundle(small_model(), "tensorrt", torch.device("cuda"), torch.float32, tmp_path / "bundle")


def test_without_tensorrt_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"^--target tensorrt: neither tensorrt nor tensorrt_rtx is installed \(pip install"):
        export_bundle(small_model(), "tensorrt", CPU, torch.float32, tmp_path / "bundle", gpu="sm_86")
