"""augment compare: which of these models, plans or budgets."""

from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common, completion, writing
from augment_cli.errors import InputError


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Converted models, plans' JSON files, names of timm's models.",
            autocompletion=completion.models,
        ),
    ],
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe for every model that is given by name. Repeatable.",
            autocompletion=completion.builtin_recipes,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE[,VALUE...]", help="Recipe values: a plan with each. Repeatable."),
    ] = None,
    image_size: common.ImageSize = None,
    model_args: common.ModelArguments = None,
    form: writing.Form = None,
    as_json: writing.AsJson = False,
    output: writing.Output = None,
    overwrite: writing.Overwrite = False,
    full: Annotated[bool, typer.Option("--full", help="What differs site by site, however many there are.")] = False,
    cached: common.Cached = True,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure each plan's time beside its source's, on this machine.")
    ] = False,
) -> None:
    """Show several models or plans side by side, or models under several recipes and budgets.

    augment compare resnet50-aa resnet50-aw.safetensors seresnet50

    augment compare resnet50 --recipe aa --recipe aa-aw --set budget.params=keep,-5%,-10%
    """
    from augment_cli.comparison import check_models
    from augment_cli.comparison import compare as compared

    if len(models) < 2 and not recipes and not overrides:
        raise InputError("one model alone: name a second, or recipes with --recipe, or values with --set")
    form = writing.check_form(
        form, as_json, output, overwrite, [Path(model) for model in models if Path(model).exists()]
    )
    arguments, size = common.parse_arguments(model_args), common.parse_image_size(image_size)
    check_models(models)
    with common.working("measuring" if latency else "planning"):
        found = compared(
            *models,
            recipe=recipes or (),
            overrides=overrides or (),
            input_size=size,
            cached=cached,
            latency=latency,
            **arguments,
        )
    writing.write(form, output, lambda: found.table(full), found.to)
