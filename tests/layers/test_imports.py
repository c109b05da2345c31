"""The layers' folders: aa and aw do not import each other, native and triton import neither. Of the rest of the package
they import compat only."""

import ast
from pathlib import Path

import pytest

import augment_cli.layers

LAYERS = Path(augment_cli.layers.__file__).parent
MAY_IMPORT = {
    "aa": {"aa", "native", "triton", "dispatch", "leaf"},
    "aw": {"aw", "native", "triton", "dispatch", "geometry", "leaf"},
}
MAY_IMPORT |= {"native": {"native", "geometry"}, "triton": {"triton", "geometry"}}


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, with the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("augment_cli")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_no_other_than_it_may(folder):
    files = sorted((LAYERS / folder).glob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            if name.startswith("augment_cli.compat."):
                continue
            package, layers, room, *_ = name.split(".")
            assert (package, layers) == ("augment_cli", "layers"), f"{path.name} imports {name}"
            assert room in MAY_IMPORT[folder], f"{path.name} imports {name}"
