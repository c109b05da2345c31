"""augment convert: a model in, one file with the converted model out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError

if TYPE_CHECKING:
    from augment_cli.analysis.facts import Source
    from augment_cli.analysis.graph import ModelGraph
    from augment_cli.planning.budget import Solution
    from augment_cli.planning.plan import Plan
    from augment_cli.planning.recipe import Recipe

_FITTED = "Attention that is fitted to what it replaces"


class Init(StrEnum):
    carry = "carry"
    fit = "fit"


def convert(
    model: common.ModelName = None,
    recipe: common.RecipeName = None,
    overrides: common.Overrides = None,
    plan_file: common.PlanFile = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's pretrained weights.")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Start from a safetensors or torch file.")
    ] = None,
    ema: common.Ema = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="For random weights and what attention adds.")
    ] = 0,
    init: Annotated[
        Init,
        typer.Option(
            "--init",
            rich_help_panel=_FITTED,
            help="carry: attention is untrained. fit: it computes what the filters that it replaces did, as nearly as "
            "it can, on the images of --calibrate.",
        ),
    ] = Init.carry,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="DIR|SPEC",
            rich_help_panel=_FITTED,
            help="A few hundred unlabelled images: a folder, a tar file, or KIND/NAME of timm's data sets.",
        ),
    ] = None,
    calibrate_images: Annotated[
        int | None,
        typer.Option("--calibrate-images", metavar="N", rich_help_panel=_FITTED, help="How many at most. [512]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.safetensors|DIR",
            help="One file, or a folder that timm loads. [MODEL-RECIPE.safetensors]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    image_size: common.ImageSize = None,
    model_args: common.ModelArguments = None,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
) -> None:
    """Replace convolutions of MODEL by a recipe or a plan, and save the result.

    MODEL is a timm model's name, or package.module:function for a model of another library or of your own.

    augment convert resnet50 --recipe aa-resnet --set budget.params=keep --pretrained -o resnet50-aa

    augment convert torchvision.models:resnet50 --img-size 224 -a weights=DEFAULT
    """
    from augment_cli import specs
    from augment_cli.reporting.output import check_target, write_model

    if pretrained and checkpoint:
        raise InputError("--pretrained and --checkpoint both name weights: give one of them")
    common.check_ema(ema, checkpoint)
    _check_calibration(init, calibrate, calibrate_images)
    given, size = None, None
    if plan_file:
        given = common.read_given_plan(plan_file, model, recipe, overrides, image_size, model_args)
        model, arguments, size = model or given.model, dict(given.model_args), given.input_size[1:]
    elif model:
        settings = common.load_named_recipe(recipe or "aa", overrides)
        arguments, size = common.parse_arguments(model_args), common.parse_image_size(image_size)
    else:
        raise InputError("which model? Give a timm model's name, or a plan with --plan")
    specs.check_name(model)
    specs.check_file("checkpoint", checkpoint)
    if calibrate:
        specs.check_data(calibrate)
    named = given.recipe if given else settings.name
    if output or ":" not in model:  # timm says what a model on a hub or in a folder is called
        check_target(output or Path(common.file_name(model, named)), overwrite, (plan_file, checkpoint))

    with common.working("importing torch and timm"):
        from augment_cli import conversion
        from augment_cli.analysis import source
        from augment_cli.analysis.graph import analyze
        from augment_cli.reporting import Report
        from augment_cli.reporting.table import table
        from augment_cli.surgery import replace
        from augment_cli.surgery.calibration import load_images

    with common.working(f"planning {model}"):
        described, meta_model = source.describe(model, arguments, size)
        graph = analyze(meta_model, described.input_size)
    if given and plan_file:
        plan, solution = common.fit_given_plan(given, graph, plan_file), None
    else:
        plan, solution = _planned(described, graph, settings)
    with common.working(f"verifying {model}"):
        replace.verify(meta_model, plan, graph)
    common.announce(graph, plan, solution, None if given else settings)
    target = output or Path(common.file_name(plan.model, plan.recipe))
    check_target(target, overwrite, (plan_file, checkpoint))

    calibration = None
    if calibrate is not None:
        conversion.check_fittable(plan)
        with common.working(f"reading {calibrate}"):
            calibration = load_images(
                calibrate, meta_model, plan.input_size, 512 if calibrate_images is None else calibrate_images, seed
            )
    with common.bar("fitting") if calibration else common.working(f"converting {model}") as progress:
        weights = source.create(described, seed, origin=model if pretrained else None)
        origin = source.weights_origin(pretrained, seed)
        if checkpoint:
            origin = source.load_checkpoint(weights, checkpoint, ema)
        metadata = conversion.operate(weights, plan, graph, origin, calibration, progress, seed)
        write_model(weights, metadata, target)
    common.show(table(Report.of(plan, metadata), full=full))
    if checkpoint:
        common.say(f"source weights: {origin}")
    common.say(f"wrote {target}")


def _planned(source: "Source", graph: "ModelGraph", recipe: "Recipe") -> "tuple[Plan, Solution]":
    """The recipe's plan; a budget of latency is measured on this machine."""
    from augment_cli.planning.plan import make_plan

    if recipe.budget.latency == "free":
        return make_plan(source.name, graph, recipe, source.args, base=source.base)
    with common.timing(source, graph, recipe.latency) as timer:
        from augment_cli.latency.timer import plan_within

        return plan_within(source, graph, recipe, timer)


def _check_calibration(init: Init, calibrate: str | None, images: int | None) -> None:
    if init is Init.fit and calibrate is None:
        raise InputError("--init fit needs images to fit on: give a folder of some hundred with --calibrate")
    if init is not Init.fit and (calibrate is not None or images is not None):
        raise InputError("--calibrate and --calibrate-images are for --init fit: add it, or leave them out")
