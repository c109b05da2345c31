"""augment plan: what each convolution would become. No weights, no arithmetic."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from augment_cli.cli import common, writing
from augment_cli.errors import InputError

if TYPE_CHECKING:
    from augment_cli.analysis.facts import Analysis, Source
    from augment_cli.planning.frontier import Unit
    from augment_cli.planning.plan import Plan, Sensitivity
    from augment_cli.planning.recipe import Recipe
    from augment_cli.reporting.frontier import Frontier

_measured = partial(typer.Option, rich_help_panel="Sensitivity")
_along = partial(typer.Option, rich_help_panel="Frontier")


class Count(StrEnum):
    params = "params"
    macs = "macs"
    latency = "latency"


def plan(
    model: common.ModelName = None,
    recipe: common.RecipeName = None,
    overrides: common.Overrides = None,
    plan_file: common.PlanFile = None,
    image_size: common.ImageSize = None,
    model_args: common.ModelArguments = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON, to edit and give to convert.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
    cached: common.Cached = True,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the plan's time on this machine, as the recipe's [latency] says.")
    ] = False,
    sensitivity: Annotated[
        bool,
        _measured("--sensitivity", help="Measure what replacing each site alone does, and plan for the least of it."),
    ] = False,
    calibrate: Annotated[
        str | None, _measured(metavar="DIR|SPEC", help="Unlabelled images to measure on, a few hundred.")
    ] = None,
    calibrate_images: Annotated[int, _measured(metavar="N", help="How many at most.")] = 512,
    pretrained: Annotated[bool, _measured("--pretrained", help="timm's pretrained weights.")] = False,
    checkpoint: Annotated[Path | None, _measured(metavar="FILE", help="Weights from a file.")] = None,
    ema: common.Ema = None,
    seed: Annotated[int, _measured(min=0, max=2**63 - 1, help="Of the images drawn.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.svg",
            help="Draw the network; with --sensitivity what was measured, with --frontier that, as .svg, .png or .pdf.",
        ),
    ] = None,
    overwrite: writing.Overwrite = False,
    frontier: Annotated[
        Count | None,
        _along(help="Plans for a range of this budget: the front of it against the distance from the recipe."),
    ] = None,
    points: Annotated[int | None, _along(min=2, max=100, metavar="N", help="How many budgets. [9]")] = None,
    point: Annotated[int | None, _along(min=1, metavar="N", help="Show this one of its plans, from 1.")] = None,
) -> None:
    """Show what each convolution of MODEL would become, and what it costs; or what a plan makes of its model.

    augment plan resnet50 --recipe aa-resnet --set budget.params=keep

    augment plan --plan edited.json --set budget.params=+1%

    augment plan resnet50 --sensitivity --pretrained --calibrate photos --json > plan.json

    augment plan resnet50 --frontier params --plot front.png

    augment plan resnet50 --set budget.latency=+5% --set latency.threads=1
    """
    from augment_cli import specs

    common.check_ema(ema, checkpoint)
    _check_plot(plot, overwrite, sensitivity or frontier is not None, (plan_file, checkpoint))
    _check_measured(sensitivity, calibrate, pretrained, checkpoint)
    for option, value in (("--point", point), ("--points", points)):
        if value and not frontier:
            raise InputError(f"{option} is for --frontier: add it, or leave {option} out")
    if plan_file:
        if sensitivity or frontier:
            option = "--sensitivity" if sensitivity else "--frontier"
            raise InputError(f"{option} plans anew, by a recipe: leave out --plan, or {option}")
        given = common.read_given_plan(plan_file, model, recipe, overrides, image_size, model_args)
        made = _fitted(given, model or given.model, plan_file, cached, latency)
        if plot:
            _draw(made, plot, sensitivity=False)
        _show(made, as_json, full)
        return
    if not model:
        raise InputError("which model? Give a timm model's name, or a plan with --plan")
    settings = common.load_named_recipe(recipe or "aa", overrides)
    arguments, size = common.parse_arguments(model_args), common.parse_image_size(image_size)
    specs.check_name(model)
    specs.check_file("checkpoint", checkpoint)
    if calibrate:
        specs.check_data(calibrate)
    with common.working(f"looking into {model}"):
        from augment_cli.analysis.cache import look
        from augment_cli.planning.plan import make_plan

        described, analysis = look(model, arguments, size, cached)
        found = None
    if sensitivity and calibrate:
        origin = model if pretrained else None
        found = _measure(
            (model, arguments, size), settings, (calibrate, calibrate_images, seed), origin, checkpoint, ema
        )
    if frontier:
        front = _frontier(described, analysis, settings, frontier.value, points or 9, found, latency, cached)
        if plot:
            front.draw(plot)
            common.say(f"wrote {plot}")
        if point:
            _show(_point(front, point), as_json, full)
        elif as_json:
            common.echo(front.to("json"))
        else:
            common.show(front.table())
            common.say("--point N shows one of the plans; with --json, as convert takes it")
        return
    if latency or settings.budget.latency != "free":
        with common.timing(described, analysis, settings.latency, cached) as timer:
            from augment_cli.latency.timer import plan_within

            made, solution = plan_within(described, analysis, settings, timer, found)
    else:
        made, solution = make_plan(described.name, analysis, settings, described.args, found, described.base)
    common.announce(analysis, made, solution, settings)
    if plot:
        _draw(made, plot, sensitivity)
    _show(made, as_json, full)


def _frontier(
    source: "Source",
    analysis: "Analysis",
    settings: "Recipe",
    unit: "Unit",
    points: int,
    found: "dict[str, Sensitivity] | None",
    latency: bool,
    cached: bool,
) -> "Frontier":
    from augment_cli.planning.frontier import frontier
    from augment_cli.reporting.frontier import Frontier

    if latency or unit == "latency" or settings.budget.latency != "free":
        with common.timing(source, analysis, settings.latency, cached) as timer:
            from augment_cli.latency.timer import frontier_within

            return Frontier(tuple(frontier_within(source, analysis, settings, unit, points, timer, found)), unit)
    with common.working("planning"):
        return Frontier(tuple(frontier(source, analysis, settings, unit, points, found)), unit)


def _point(front: "Frontier", number: int) -> "Plan":
    if number > len(front.points):
        raise InputError(f"--point {number}: the frontier has {len(front.points)} points; more --points make more")
    return front.points[number - 1].plan


def _draw(plan: "Plan", path: Path, sensitivity: bool) -> None:
    """Draw the network or, where it was measured, what replacing each site alone does."""
    from augment_cli.files import write_file
    from augment_cli.reporting.network import network_picture
    from augment_cli.reporting.sensitivity import draw

    if sensitivity:
        draw(plan, path)
    else:
        write_file(path, lambda temporary: temporary.write_text(network_picture(plan), encoding="utf-8"))
    common.say(f"wrote {path}")


def _fitted(given: "Plan", model: str, file: Path, cached: bool, latency: bool) -> "Plan":
    """A plan that was read, held against its model and its budget; its latency measured anew where that is asked."""
    with common.working(f"looking into {model}"):
        from augment_cli.analysis.cache import look
        from augment_cli.planning.latency import LatencySettings
        from augment_cli.planning.reading import fit_plan

        source, analysis = look(model, dict(given.model_args), given.input_size[1:], cached)
    if latency:
        settings = given.latency.settings if given.latency else LatencySettings()
        with common.timing(source, analysis, settings, cached) as timer:
            (given,) = timer.measured([fit_plan(given, analysis, f"plan {file}")])
    plan = common.fit_given_plan(given, analysis, file)
    common.announce(analysis, plan, None)
    return plan


def _show(plan: "Plan", as_json: bool, full: bool) -> None:
    from augment_cli.reporting import Report
    from augment_cli.reporting.table import table

    if as_json:
        common.echo(plan.to_json())
    else:
        common.show(table(Report.of(plan), full=full))


def _check_plot(plot: Path | None, overwrite: bool, any_format: bool, inputs: tuple[Path | None, ...]) -> None:
    """Refuse a picture that cannot be written, before anything is read."""
    if plot is None:
        return
    from augment_cli.files import check_output

    if plot.suffix != ".svg" and not (any_format and plot.suffix in (".png", ".pdf")):
        raise InputError(
            f"--plot {plot}: the name ends in .svg, or with --sensitivity or --frontier in .svg, .png or .pdf"
        )
    check_output(plot, overwrite, inputs)


def _check_measured(sensitivity: bool, calibrate: str | None, pretrained: bool, checkpoint: Path | None) -> None:
    """Refuse options that do not go together, before anything is read."""
    if not sensitivity:
        for option, value in (("--calibrate", calibrate), ("--pretrained", pretrained), ("--checkpoint", checkpoint)):
            if value:
                raise InputError(f"{option} is for --sensitivity: add it, or leave {option} out")
        return
    if not calibrate:
        raise InputError("--sensitivity needs images to measure on: give a folder of some hundred with --calibrate")
    if bool(pretrained) == bool(checkpoint):
        raise InputError("--sensitivity measures a trained model: give either --pretrained or --checkpoint FILE")


def _measure(
    model: tuple[str, dict[str, Any], tuple[int, int] | None],
    settings: "Recipe",
    images: tuple[str, int, int],
    origin: str | None,
    checkpoint: Path | None,
    ema: bool | None,
) -> dict[str, "Sensitivity"]:
    """Sensitivities under the splits that the recipe writes; `model` is a name, arguments and an image size."""
    from augment_cli.analysis import source
    from augment_cli.analysis.graph import analyze
    from augment_cli.conversion import check_fittable
    from augment_cli.planning.plan import make_plan
    from augment_cli.planning.recipe import Budget
    from augment_cli.surgery.calibration import load_images
    from augment_cli.surgery.sensitivity import measure_sensitivity

    described, meta_model = source.describe(*model)
    graph = analyze(meta_model, described.input_size)
    free = settings.model_copy(update={"budget": Budget()})
    written, _ = make_plan(described.name, graph, free, described.args, base=described.base)
    check_fittable(written)
    spec, count, seed = images
    with common.working(f"reading {spec}"):
        calibration = load_images(spec, meta_model, described.input_size, count, seed)
        weights = source.create(described, seed, origin=origin)
        if checkpoint:
            origin = source.load_checkpoint(weights, checkpoint, ema)
    if checkpoint:
        common.say(f"source weights: {origin}")
    with common.bar("measuring") as progress:
        return measure_sensitivity(weights, written, graph, calibration, progress)
