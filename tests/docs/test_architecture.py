"""docs/architecture.md shows the package as it is: no room imports one that stands beside or below it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "augment_cli"


def floors() -> dict[str, int]:
    """The row of the table of folders that a room stands in, from the top."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.M)
    return {room: floor for floor, row in enumerate(rows) for room in re.findall(r"\w+", row)}


def imports(file: Path) -> Iterator[str]:
    """The rooms that a file imports from when it is run, within functions too."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_for_types(node)]
    left_out = {id(node) for part in for_types for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in left_out:
            package, _, rest = node.module.partition(".")
            if package == "augment_cli":
                yield from [rest.partition(".")[0]] if rest else [alias.name for alias in node.names]


def _is_for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_no_room_imports_one_beside_or_below_it():
    floor = floors()
    rooms = [path for path in PACKAGE.iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")]
    rooms = [path for path in rooms if path.suffix or list(path.glob("*.py"))]
    unlisted = {path.stem for path in rooms} - floor.keys()
    assert not unlisted, "docs/architecture.md does not show these"
    wrong = [
        f"{room.stem} imports {found}"
        for room in rooms
        for file in ([room] if room.suffix else room.rglob("*.py"))
        for found in imports(file)
        if found != room.stem and floor[found] >= floor[room.stem]
    ]
    assert not wrong
    assert len(rooms) > 15
