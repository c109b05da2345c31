"""Code blocks of the documentation, and how they are run.

`sh` and `python` blocks are run, in the order of the page and in one folder; the blocks of a page share their Python
names. A `text` block holds lines of the output of the block before it; `...` stands for lines, or the end of one, left
out. What is not to be run is a `console` block.
"""

import contextlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from augment_cli.cli import app

_BLOCK = re.compile(r"^```(?P<language>sh|python|text)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line that it begins at."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run, and their outputs."""
    text = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["code"], text.count("\n", 0, m.start()) + 1) for m in _BLOCK.finditer(text)]


def run_page(page: Path) -> None:
    """Run a page in the present folder.

    Raises:
        AssertionError: a command failed, or did not print what the page says.
    """
    names: dict = {"__name__": "__main__"}
    output = ""
    for block in blocks(page):
        place = f"{page.name}:{block.line}"
        if block.language == "text":
            check_output(block.code, output, place)
        elif block.language == "python":
            output = _run_python(block, place, names)
        else:
            output = "".join(_run_command(line, place) for line in _lines(block.code))


def check_output(shown: str, output: str, place: str) -> None:
    """Hold the lines that a page shows against an output: all in it, in this order, and adjacent but for `...`."""
    found = iter([line.strip() for line in output.splitlines() if line.strip()])
    skipping = True
    for line in (line.strip() for line in shown.splitlines()):
        if line == "...":
            skipping = True
        elif line:
            following = next((other for other in found if not skipping or _is(line, other)), "the end")
            assert _is(line, following), f"{place}: {line!r} is not printed there, but {following!r}; all:\n{output}"
            skipping = False


def _is(shown: str, line: str) -> bool:
    return line.startswith(shown[:-3]) if shown.endswith("...") else line == shown


def _run_python(block: Block, place: str, names: dict) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(block.code, place, "exec"), names)
    return output.getvalue()


def _lines(code: str) -> list[str]:
    return [line for line in code.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def _run_command(line: str, place: str) -> str:
    """A command of augment, its standard output perhaps redirected; in this process, which has imported torch."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "augment", f"{place}: only augment is run in sh blocks: {line}"
    target = None
    if ">" in arguments:
        *arguments, _, target = arguments
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{place}: {line}\n{result.output}\n{result.exception!r}"
    if target:
        Path(target).write_text(result.stdout, encoding="utf-8")
        return result.stderr
    return result.output
