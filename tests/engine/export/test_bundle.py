"""A bundle of a small model, written, read back and run; and each way in which one can be bad."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine.errors import InputError
from engine.export.aoti import Package
from engine.export.bundle import read_bundle
from engine.export.export import export_bundle
from engine.export.part import Exportable
from tests.engine.export.small_model import small_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "bundle"
    export_bundle(small_model(), "aoti", CPU, torch.float32, folder, accuracy=[{"measure": "accuracy", "value": 0.9}])
    return folder


@pytest.fixture
def bundle(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "bundle")


def test_a_package_reads_the_weights_beside_it_and_computes_what_eager_does(exported):
    manifest, model = read_bundle(exported), small_model()
    tensors = load_file(exported / manifest["weights"])
    for part in model.parts:
        entry = manifest["packages"][part.name]
        package = Package(exported / entry["file"], CPU)
        package.use({constant: tensors[name] for constant, name in entry["constants"].items()})
        given = part.sample({"batch": 1, "tokens": 9}, torch.Generator().manual_seed(77))
        for ours, theirs in zip(package.runner(part)(given), [part.module(*given.values())], strict=False):
            torch.testing.assert_close(ours, theirs if isinstance(theirs, torch.Tensor) else theirs[0])


def test_inputs_may_lie_in_any_layout(exported):
    manifest, part = read_bundle(exported), small_model().parts[0]
    tensors, entry = load_file(exported / manifest["weights"]), manifest["packages"]["rows"]
    package = Package(exported / entry["file"], CPU)
    package.use({constant: tensors[name] for constant, name in entry["constants"].items()})
    x = torch.randn(8, 10).t()[::2]
    torch.testing.assert_close(package.runner(part)({"x": x})[0], part.module(x))


@pytest.mark.parametrize("constant", ["table", "scale"])
def test_a_package_whose_weights_lack_one_is_refused(exported, constant):
    entry, tensors = read_bundle(exported)["packages"]["rows"], load_file(exported / "weights.safetensors")
    constants = {name: tensors[stored] for name, stored in entry["constants"].items() if name != constant}
    with pytest.raises(InputError, match=rf"rows.pt2: needs weights that are not given: {constant}$"):
        Package(exported / entry["file"], CPU).use(constants)


def test_a_weight_that_two_packages_read_is_stored_once(exported):
    manifest = read_bundle(exported)
    rows, columns = (manifest["packages"][name]["constants"] for name in ("rows", "columns"))
    assert columns == {"table": rows["table"]}
    assert set(load_file(exported / "weights.safetensors")) == set(rows.values())


def test_the_manifest_says_what_is_taken_and_what_was_measured(exported):
    manifest = read_bundle(exported)
    assert manifest["packages"]["columns"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", "tokens", 8]}]
    assert manifest["dimensions"] == {"batch": [1, 5], "tokens": [2, 9]}
    assert manifest["parity"]["max_abs_error"] < 1e-5 and manifest["parity"]["inputs"] == 3 + 5
    assert set(manifest["files"]) == {"weights.safetensors", "packages/rows.pt2", "packages/columns.pt2"}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["accuracy"] == [{"measure": "accuracy", "value": 0.9}]


class Wrong(nn.Module):
    """Eager says something else than what was traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + (0 if torch.compiler.is_exporting() else 1e-3)


def test_a_part_that_differs_from_eager_is_refused_and_nothing_is_written(tmp_path):
    model = small_model()
    rows = replace(model.parts[0], module=Wrong(model.parts[0].module))
    with pytest.raises(InputError, match=r"^rows: y at batch=1 differs from eager by 0.001 \(expected at most 0.0001\)"):
        export_bundle(replace(model, parts=(rows,)), "aoti", CPU, torch.float32, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_whole_that_differs_is_refused(tmp_path):
    def compare(runs):
        raise ValueError("the masks differ")

    model = small_model()
    with pytest.raises(InputError, match="^parity: the masks differ$"):
        export_bundle(replace(model, parts=model.parts[:1], compare=compare), "aoti", CPU, torch.float32, tmp_path / "bundle")


def test_what_is_there_is_not_overwritten(bundle):
    before = sorted(bundle.rglob("*"))
    with pytest.raises(InputError, match=r"exists already \(expected a folder that does not, or an empty one\)"):
        export_bundle(small_model(), "aoti", CPU, torch.float32, bundle)
    assert sorted(bundle.rglob("*")) == before


def _change(bundle):
    path = bundle / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _rewrite(**entries):
    def change(bundle):
        path = bundle / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_change, r"weights.safetensors: was changed \(its SHA-256 is not the one in manifest.json\)"),
        (lambda b: (b / "packages/rows.pt2").unlink(), r"rows.pt2: No such file or directory \(expected by manifest.json\)"),
        (
            lambda b: (b / "weights.safetensors").write_bytes(b""),
            r"weights.safetensors: 0 bytes \(expected 288 by manifest.json\)",
        ),
        (lambda b: (b / "manifest.json").unlink(), r"bundle: no bundle \(expected manifest.json in it\)"),
        (lambda b: (b / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda b: (b / "manifest.json").write_text("[1]"), r"manifest.json: not the manifest of a bundle"),
        (_rewrite(format="zip"), r"not the manifest of a bundle \(expected format vesalius-bundle\)"),
        (_rewrite(format_version=2), r"format_version 2 \(expected 1\)"),
        (_rewrite(files=[]), "expected `files`, a size and a SHA-256 for each"),
        (_rewrite(files={"../x": {}}), r"names '../x' \(expected a file within the bundle\)"),
    ],
)
def test_a_damaged_bundle_is_one_line(bundle, damage, message):
    damage(bundle)
    with pytest.raises(InputError, match=message) as raised:
        read_bundle(bundle)
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"gone: no such folder \(expected a bundle\)"):
        read_bundle(tmp_path / "gone")


def test_what_models_give_is_what_the_exporters_ask_for():
    fits: Exportable = small_model()
    assert [part.name for part in fits.parts] == ["rows", "columns"]
