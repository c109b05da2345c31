"""augment report: the budget of a converted model or of a plan, site by site."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

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


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A converted model, or a plan's JSON file.")],
    form: Annotated[
        Format | None,
        typer.Option("--format", "-f", help="How to show it; the suffix of --output says so too. [table]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help=f"Write it there, as {', '.join(_SUFFIXES)}."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
) -> None:
    """Show the parameters and multiply-adds of a converted model, site by site and in total.

    augment report resnet50-aa -o report.html
    """
    from augment_cli.checkpoint.metadata import read_metadata, weights_file
    from augment_cli.files import check_output, write_file
    from augment_cli.planning.plan import read_plan
    from augment_cli.reporting import FORMATS, Report
    from augment_cli.reporting.table import plain_table, table

    form = _format(form, output)
    is_plan = path.suffix == ".json"
    if output:
        check_output(output, overwrite, [path if is_plan else weights_file(path)])
    if is_plan:
        numbers = Report.of(read_plan(path))
    else:
        metadata = read_metadata(path)
        numbers = Report.of(metadata.plan, metadata)
    if form is Format.table and not output:
        common.show(table(numbers, full=full))
        return
    text = plain_table(numbers, full=full) if form is Format.table else FORMATS[form](numbers)
    if output:
        write_file(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        common.say(f"wrote {output}")
    else:
        common.echo(text)


def _format(given: Format | None, output: Path | None) -> Format:
    """The format that is asked for, or that the output's suffix says."""
    if output is None:
        return given or Format.table
    meant = _SUFFIXES.get(output.suffix.lower())
    if meant is None:
        raise InputError(f"{output}: the suffix says how a report is written, one of {', '.join(_SUFFIXES)}")
    if given and given is not meant:
        raise InputError(f"{output} is written as {meant}, and --format says {given}: leave one of them out")
    return meant
