"""augment report: the budget of a converted model or of a plan, site by site."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    markdown = "markdown"
    html = "html"


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A converted model, or a plan's JSON file.")],
    form: Annotated[Format, typer.Option("--format", "-f", help="How to show it.")] = Format.table,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
) -> None:
    """Show the parameters and multiply-adds of a converted model, site by site and in total.

    augment report resnet50-aa --format html -o report.html
    """
    from augment_cli.files import check_output, write_file
    from augment_cli.header import read_header
    from augment_cli.plan import read_plan
    from augment_cli.report import FORMATS, Report
    from augment_cli.report.table import plain_table, table

    if output:
        check_output(output, overwrite)
    if path.suffix == ".json":
        numbers = Report.of(read_plan(path))
    else:
        header = read_header(path)
        numbers = Report.of(header.plan, header)
    if form is Format.table and not output:
        common.show(table(numbers, full=full))
        return
    text = plain_table(numbers, full=full) if form is Format.table else FORMATS[form](numbers)
    if output:
        write_file(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        common.say(f"wrote {output}")
    else:
        common.echo(text)
