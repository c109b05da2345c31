"""augment report: the budget of a converted model or of a plan, site by site."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from augment_cli.cli import common, writing
from augment_cli.errors import InputError

if TYPE_CHECKING:
    from augment_cli.planning.plan import Plan


def report(
    path: Annotated[Path, typer.Argument(metavar="FILE|DIR", help="A converted model, or a plan's JSON file.")],
    form: writing.Form = None,
    as_json: writing.AsJson = False,
    output: writing.Output = None,
    overwrite: writing.Overwrite = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the time of the model and its sites on this machine.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For --latency: latency.batch=8. Repeatable.")
    ] = None,
    base: common.Base = None,
    cached: common.Cached = True,
) -> None:
    """Show the parameters, multiply-adds and time of a converted model, site by site and in total.

    augment report resnet50-aa -o report.html

    augment report resnet50-aa --latency --set latency.batch=8
    """
    from augment_cli.checkpoint.metadata import read_metadata, weights_file
    from augment_cli.planning.reading import read_plan
    from augment_cli.reporting import FORMATS, Report
    from augment_cli.reporting.table import table

    is_plan = path.suffix == ".json"
    form = writing.check_form(form, as_json, output, overwrite, [path if is_plan or not output else weights_file(path)])
    metadata = None if is_plan else read_metadata(path)
    plan = metadata.plan if metadata else read_plan(path)
    if latency:
        plan = _timed(plan, overrides, base, cached)
    elif overrides or base:
        raise InputError(f"--{'set' if overrides else 'base'} is for --latency: add it, or leave it out")
    numbers = Report.of(plan, metadata, path)
    writing.write(form, output, lambda: table(numbers, full=full), lambda name: FORMATS[name](numbers))


def _timed(plan: "Plan", overrides: list[str] | None, base: str | None, cached: bool) -> "Plan":
    """The plan with its latency, measured as before or as the overrides say."""
    from augment_cli.planning.latency import LatencySettings
    from augment_cli.planning.recipe import override_latency

    known = plan.latency.settings if plan.latency else LatencySettings()
    settings = override_latency(known, tuple(overrides or ()))
    with common.working("importing torch"):
        from augment_cli.latency.timer import measure_latency
    common.say(f"measuring latency for about {settings.seconds:g} s: {settings.describe()}")
    with common.bar("measuring") as progress:
        return measure_latency(plan, settings, base, progress, cached)
