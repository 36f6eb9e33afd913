"""The demonstration as a notebook: run in a kernel as it is committed, and about a file of one's own."""

import base64
import io
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from tests.tiny_qwen import noise_image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(tmp_path, monkeypatch, **variables):
    """The notebook after its cells were run, with the first cell's variables set to these texts of Python."""
    notebook = nbformat.read(ROOT / "notebooks" / "medvlm_r1_demo.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in variables.items():
        first.source, count = re.subn(rf"^{name} = .*", f"{name} = {value}", first.source, flags=re.MULTILINE)
        assert count == 1
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    return notebook


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook) -> list[Image.Image]:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown]


def test_it_shows_image_reasoning_answer_and_the_probability_of_each_option(tmp_path, monkeypatch):
    notebook = execute(tmp_path, monkeypatch)
    text = printed(notebook)
    assert "reasoning: The picture looks like" in text
    assert re.search(r"^answer: +[A-D]\) \w+", text, re.MULTILINE) and re.search(r"^right: +[A-D]\) \w+", text, re.MULTILINE)
    image, chart = pictures(notebook)
    assert image.size == (112, 112) and chart.width > 400
    blue = sum(count for count, colour in chart.convert("RGB").getcolors(2**20) if colour == (0x2F, 0x6F, 0xDE))
    assert blue > 1000, "the bar of the answer"
    assert not (tmp_path / "runs").exists()


def test_a_file_and_a_question_of_ones_own(tmp_path, monkeypatch):
    noise_image(0).save(tmp_path / "own.png")
    question = repr("Which is it? A) CT, B) MRI, C) X-Ray")
    notebook = execute(tmp_path, monkeypatch, IMAGE=repr("own.png"), QUESTION=question)
    assert "A) CT, B) MRI, C) X-Ray" in printed(notebook) and "right:" not in printed(notebook)
    assert len(pictures(notebook)) == 2


def test_a_mistake_names_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError, match="--question is missing"):
        execute(tmp_path, monkeypatch, IMAGE=repr("own.png"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert sys.prefix not in path.read_text(encoding="utf-8") and "/home/" not in path.read_text(encoding="utf-8")
