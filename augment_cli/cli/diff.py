"""augment diff: what is different between two converted models, or between one and its source."""

from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common, writing


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A converted model, or the source of B.")],
    second: Annotated[str, typer.Argument(metavar="B", help="A converted model, or the source of A.")],
    base: common.Base = None,
    images: Annotated[
        str | None,
        typer.Option("--images", "--data", "-d", metavar="DIR|SPEC", help="Compare predictions on these images."),
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=20, help="How many images at most.")] = 512,
    form: writing.Form = None,
    as_json: writing.AsJson = False,
    output: writing.Output = None,
    overwrite: writing.Overwrite = False,
    full: Annotated[bool, typer.Option("--full", help="Every tensor that is not equal.")] = False,
) -> None:
    """Show how two converted models differ, or a converted model from its source: sites, tensors, predictions.

    A source is a file of weights, or a timm model's name with timm's weights. It is held against the filters that the
    converted model kept.

    augment diff resnet50-aa tuned/best --images photos
    """
    from augment_cli import specs

    inputs = [Path(model) for model in (first, second) if Path(model).exists()]
    form = writing.check_form(form, as_json, output, overwrite, inputs)
    for model in (first, second):
        specs.check_model(model)
    if images:
        specs.check_data(images)
    with common.working("comparing"):
        from augment_cli.difference import diff as differ

        found = differ(first, second, base, images, count)
    writing.write(form, output, lambda: found.table(full), found.to)
