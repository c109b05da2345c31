"""How commands that report write: to the terminal as tables, or in another form, there or to a file."""

from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"
    html = "html"


_SUFFIXES = {
    ".txt": Format.table,
    ".json": Format.json,
    ".csv": Format.csv,
    ".md": Format.markdown,
    ".html": Format.html,
}

Form = Annotated[
    Format | None,
    typer.Option("--format", "-f", help="How to show it; the suffix of --output says so too. [table]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="As --format json.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help=f"Write it there, as {', '.join(_SUFFIXES)}."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def check_form(
    given: Format | None, as_json: bool, output: Path | None, overwrite: bool, inputs: Iterable[Path] = ()
) -> Format:
    """The format that is asked for by --format or --json, or that the output's suffix says.

    Raises:
        AugmentError: the two do not go together, or the output cannot be written.
    """
    from augment_cli.files import check_output

    if as_json:
        if given not in (None, Format.json):
            raise InputError(f"--json and --format {given} name two formats: leave one of them out")
        given = Format.json
    if output is None:
        return given or Format.table
    meant = _SUFFIXES.get(output.suffix.lower())
    if meant is None:
        raise InputError(f"{output}: the suffix says how a report is written, one of {', '.join(_SUFFIXES)}")
    if given and given is not meant:
        raise InputError(f"{output} is written as {meant}, and --format says {given}: leave one of them out")
    check_output(output, overwrite, inputs)
    return meant


def write(form: Format, output: Path | None, table: Callable[[], Any], text: Callable[[str], str]) -> None:
    """Show or write a report: `table` gives its tables for the terminal, `text` its other forms by name."""
    from augment_cli.files import write_file
    from augment_cli.reporting.table import to_text

    if form is Format.table and not output:
        common.show(table())
        return
    content = to_text(table()) if form is Format.table else text(form)
    if output:
        write_file(output, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        common.say(f"wrote {output}")
    else:
        common.echo(content)
