"""augment attention: what a converted model looks at."""

from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError

_KINDS = ("weights", "content", "position")


def attention(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted model.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Images to look at.")],
    beside: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A second one, such as the same after fine-tuning.")
    ] = None,
    sites: Annotated[
        list[str] | None, typer.Option("--site", metavar="GLOB", help="Layers by name. Repeatable. [one a map size]")
    ] = None,
    heads: Annotated[
        list[int] | None, typer.Option("--head", min=0, help="Heads by number, from 0. Repeatable. [all]")
    ] = None,
    rollout: Annotated[
        bool,
        typer.Option("--rollout", help="Follow positions back through all layers of AA together, or those of --site."),
    ] = False,
    at: Annotated[str, typer.Option(metavar="X,Y", help="The query of the PNG, as shares of the image.")] = "0.5,0.5",
    kind: Annotated[str, typer.Option(metavar="|".join(_KINDS), help="The logits of the PNG's maps.")] = "weights",
    image_size: common.ImageSize = None,
    base: common.Base = None,
    outputs: Annotated[
        list[Path] | None,
        typer.Option("--output", "-o", metavar="FILE.html|.png", help="A page, or a picture. Repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> None:
    """Show what the attention of MODEL looks at on images: maps by head and position, and numbers.

    augment attention tuned/best dog.jpg -o dog.html
    """
    from augment_cli import specs
    from augment_cli.checkpoint.metadata import locate
    from augment_cli.files import check_output, write_file

    place, size = _place(at), common.parse_image_size(image_size)
    if kind not in _KINDS:
        raise InputError(f"--kind {kind}: one of {', '.join(_KINDS)}")
    for output in outputs or ():
        if output.suffix not in (".html", ".png"):
            raise InputError(f"{output}: a page is written as .html, a picture as .png")
        check_output(output, overwrite, images)
    for image in images:
        specs.check_file("image", image)
    models = [name for name in (model, beside) if name]
    for name in models:
        if not locate(name).exists():
            raise InputError(f"{name}: no such file or folder; attention is looked at in a converted model")
    with common.working("looking"):
        from augment_cli.attention.looking import attention_maps

        found = attention_maps(models, images, tuple(sites or ()), tuple(heads or ()), size, base, rollout)
    for output in outputs or ():
        if output.suffix == ".html":
            write_file(output, lambda temporary: temporary.write_text(found.to("html"), encoding="utf-8"))
        else:
            found.write_png(output, place, kind)
        common.say(f"wrote {output}")
    if as_json:
        common.echo(found.to("json"))
    else:
        common.show(found.table())


def _place(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"--at {text}: write it as X,Y, each from 0 to 1, such as 0.5,0.25")
    return x, y
