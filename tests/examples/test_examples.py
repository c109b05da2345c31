"""The examples run, and print what is told of them."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    """The standard output of a script, run in the present folder."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return output.getvalue()


def test_budgets_prints_a_line_for_each(in_tmp):
    lines = run("budgets.py", "test_resnet").splitlines()
    assert [line.split()[0] for line in lines] == ["budget", "free", "keep", "-2%", "-10%"]


def test_train_learns_its_task_and_leaves_a_file(in_tmp):
    last = run("train.py").splitlines()[-1]
    assert float(last.partition("%")[0]) > 80  # chance is 50
    assert Path("squares.safetensors").is_file()


def test_detector_detects_with_a_converted_backbone(in_tmp):
    output = run("detector.py")
    assert "13 convolutions" in output
    assert "boxes, scores, labels" in output
    assert "saved, loaded and checked" in output


def test_the_notebooks_outputs_are_those_of_a_run(in_tmp):
    cells = json.loads((EXAMPLES / "torchvision.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    namespace: dict = {}
    for cell in codes:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec("".join(cell["source"]), namespace)
        assert output.getvalue() == "".join(line for shown in cell["outputs"] for line in shown["text"])
    assert Path("resnet18-aa.safetensors").is_file()
