"""augment report: the budget of a converted model or of a plan, site by site."""

from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import writing


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A converted model, or a plan's JSON file.")],
    form: writing.Form = None,
    output: writing.Output = None,
    overwrite: writing.Overwrite = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
) -> None:
    """Show the parameters and multiply-adds of a converted model, site by site and in total.

    augment report resnet50-aa -o report.html
    """
    from augment_cli.checkpoint.metadata import read_metadata, weights_file
    from augment_cli.planning.plan import read_plan
    from augment_cli.reporting import FORMATS, Report
    from augment_cli.reporting.table import table

    is_plan = path.suffix == ".json"
    form = writing.check_form(form, output, overwrite, [path if is_plan or not output else weights_file(path)])
    if is_plan:
        numbers = Report.of(read_plan(path))
    else:
        metadata = read_metadata(path)
        numbers = Report.of(metadata.plan, metadata)
    writing.write(form, output, lambda: table(numbers, full=full), lambda name: FORMATS[name](numbers))
