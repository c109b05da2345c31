"""augment plan: what each convolution would become. No weights, no arithmetic."""

from typing import Annotated

import typer

from augment_cli.cli import common


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A timm model's name.")],
    recipe: common.RecipeName = "aa",
    overrides: common.Overrides = None,
    image_size: common.ImageSize = None,
    model_args: common.ModelArguments = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON, to edit and give to convert.")] = False,
    full: Annotated[bool, typer.Option("--full", help="A line for every site, equal ones too.")] = False,
) -> None:
    """Show what each convolution of MODEL would become, and what it costs.

    augment plan resnet50 --recipe aa-resnet --set budget.params=keep
    """
    settings = common.load_named_recipe(recipe, overrides)
    arguments, size = common.parse_arguments(model_args), common.parse_image_size(image_size)
    with common.working("importing torch and timm"):
        from augment_cli import source
        from augment_cli.graph import analyze
        from augment_cli.plan import make_plan
        from augment_cli.report import Report
        from augment_cli.report.table import table

    described, meta_model = source.describe(model, arguments, size)
    graph = analyze(meta_model, described.input_size)
    made, solution = make_plan(described.name, graph, settings, described.args)
    common.announce(graph, made, solution, settings)
    if as_json:
        typer.echo(made.to_json())
    else:
        common.show(table(Report.of(made), full=full))
