"""Light modules import nothing heavy, and only operators and layers name an operator."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import augment_cli

PACKAGE = Path(augment_cli.__file__).parent
ROOMS = ["planning", "surgery", "checkpoint", "reporting", "training", "cli"]


@pytest.mark.parametrize("room", ["operators", "planning", "reporting", "cli"])
def test_planning_and_reports_import_no_torch(room):
    files = sorted((PACKAGE / room).glob("*.py"))
    names = [f"augment_cli.{room}.{file.stem}" for file in files if file.stem not in ("modules", "__init__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "assert not {'torch', 'timm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_operators_and_layers_name_an_operator():
    """By its recipe's name, as text: what a room needs to know of an operator it asks the registry."""
    for room in ROOMS:
        for file in (PACKAGE / room).rglob("*.py"):
            text = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            assert not text & {"aa+aw"}, file
