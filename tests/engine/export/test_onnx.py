"""ONNX graphs of a small model, and the model repository that Triton Inference Server reads."""

import re
from dataclasses import replace

import pytest
import torch

from engine.errors import InputError
from engine.export.bundle import read_bundle
from engine.export.export import export_bundle
from tests.engine.export.small_model import small_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")


def test_a_graph_has_the_parts_names_and_dimensions_and_computes_what_eager_does(tmp_path):
    export_bundle(small_model(), "onnx", CPU, torch.float32, tmp_path / "bundle")
    manifest = read_bundle(tmp_path / "bundle")
    loaded = onnxruntime.InferenceSession(tmp_path / "bundle" / manifest["packages"]["columns"]["file"])
    assert [(value.name, value.shape) for value in loaded.get_inputs()] == [("x", ["batch", "tokens", 8])]
    assert [value.name for value in loaded.get_outputs()] == ["y", "total"]
    x = torch.randn(1, 9, 8)
    for given, expected in zip(loaded.run(None, {"x": x.numpy()}), small_model().parts[1].module(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(given), expected)
    assert "weights" not in manifest and set(manifest["versions"]) >= {"onnx", "onnxruntime", "torch"}


def test_a_repository_describes_the_graphs_that_it_holds(tmp_path):
    export_bundle(small_model(torch.float16), "triton", torch.device("cuda"), torch.float16, tmp_path / "bundle")
    manifest = read_bundle(tmp_path / "bundle")
    config = (tmp_path / "bundle" / "columns" / "config.pbtxt").read_text()
    assert re.search(r'^name: "columns"$', config, re.MULTILINE) and "kind: KIND_GPU" in config
    described = re.findall(r'name: "(\w+)", data_type: (\w+), dims: \[([-\d, ]+)\]', config)
    graph = onnx.load(tmp_path / "bundle" / "columns" / "1" / "model.onnx").graph
    types = {"TYPE_FP16": onnx.TensorProto.FLOAT16, "TYPE_FP32": onnx.TensorProto.FLOAT}
    for (name, data_type, dims), value in zip(described, [*graph.input, *graph.output], strict=True):
        tensor = value.type.tensor_type
        assert name == value.name and types[data_type] == tensor.elem_type
        assert [int(size) for size in dims.split(",")] == [dim.dim_value or -1 for dim in tensor.shape.dim]
    assert manifest["packages"]["columns"]["file"] == "columns/1/model.onnx" and manifest["dtype"] == "float16"


def test_a_type_that_cannot_be_compared_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^--dtype bfloat16: ONNX Runtime has none on a CPU"):
        export_bundle(small_model(torch.bfloat16), "onnx", CPU, torch.bfloat16, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_from_eager_is_refused(tmp_path):
    class Shifted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * (1.01 if torch.compiler.is_exporting() else 1)

    model = small_model()
    rows = replace(model.parts[0], module=Shifted(model.parts[0].module))
    with pytest.raises(InputError, match="^rows: y at batch=1 differs from eager by"):
        export_bundle(replace(model, parts=(rows,)), "onnx", CPU, torch.float32, tmp_path / "bundle")
