"""The folders' order: arrows run one way, and what is to be light imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import augment_cli

PACKAGE = Path(augment_cli.__file__).parent
# From the ground up: a room imports from rooms before it, and from itself.
ROOMS = ["analysis", "operators", "planning", "surgery", "checkpoint", "reporting", "training", "cli"]


def imported(file: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("augment_cli"):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {name.name for name in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_those_below_it_only(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :]) | {"api", "conversion"}
    if room == "cli":
        above = set()
    for file in (PACKAGE / room).rglob("*.py"):
        assert not imported(file) & above, file


def test_the_ground_floor_imports_no_room():
    for file in PACKAGE.glob("*.py"):
        if file.stem not in ("__init__", "__main__", "api", "conversion", "specs", "dataset"):
            assert not imported(file) & set(ROOMS), file


@pytest.mark.parametrize("room", ["operators", "planning", "reporting", "cli"])
def test_planning_and_reports_import_no_torch(room):
    files = sorted((PACKAGE / room).glob("*.py"))
    names = [f"augment_cli.{room}.{file.stem}" for file in files if file.stem not in ("modules", "__init__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += "assert not {'torch', 'timm'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_operators_and_layers_name_an_operator():
    """By its recipe's name, as text: what a room needs to know of an operator it asks the registry."""
    for room in ROOMS[2:]:
        for file in (PACKAGE / room).rglob("*.py"):
            text = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            assert not text & {"aa+aw"}, file
