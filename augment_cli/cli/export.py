"""augment export: a model as a file for other runtimes, checked in the one that will run it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from augment_cli import specs
from augment_cli.cli import common

if TYPE_CHECKING:
    from augment_cli.exporting.export import Exported


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted model, or a timm model's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help=".onnx, .pt2 or .xml (OpenVINO).")],
    precision: Annotated[str, typer.Option(help="fp32, fp16, or int8 (ONNX, OpenVINO).")] = "fp32",
    opset: Annotated[int, typer.Option(help="Of ONNX.")] = 20,
    dynamic: Annotated[str, typer.Option(help="What may vary: batch, or batch,size.")] = "batch",
    img_size: common.ImageSize = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Images to compare on, and for int8 to measure ranges on.")
    ] = None,
    calibrate_images: Annotated[int, typer.Option(metavar="N", help="How many of them are drawn.")] = 128,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference, as a share of the largest output. [by precision]")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's weights for a name.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="A file's weights for a name.")] = None,
    ema: common.Ema = None,
    model_args: common.ModelArguments = None,
    base: common.Base = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The comparison as JSON.")] = False,
) -> None:
    """Write MODEL for another runtime, run the file there, and compare it with the model in torch.

    augment export resnet50-aa -o resnet50-aa.onnx
    """
    from augment_cli.files import check_output

    specs.check_model(model)
    specs.check_file("checkpoint", checkpoint)
    common.check_ema(ema, checkpoint)
    size = common.parse_image_size(img_size)
    check_output(output, overwrite, inputs=(checkpoint,))
    with common.working("importing torch and timm"):
        from augment_cli.exporting.formats import format_of
        from augment_cli.surgery.calibration import load_images
        from augment_cli.training.models import open_model
    format_of(output)
    args = common.parse_arguments(model_args)
    opened = open_model(model, pretrained=pretrained, weights=checkpoint, ema=ema, base=base, args=args)
    input_size = (opened.input_size[0], *size) if size else opened.input_size
    calibration = load_images(calibrate, opened.model, input_size, calibrate_images) if calibrate else None
    from augment_cli.exporting.export import export as write

    with common.working(f"exporting to {output}"):
        exported = write(
            opened.model,
            output,
            input_size,
            dynamic=dynamic,
            precision=precision,
            opset=opset,
            calibration=calibration,
            tolerance=tolerance,
            overwrite=overwrite,
        )
    if as_json:
        common.echo(exported.to_json())
    else:
        _describe(exported, calibrate)
    common.say(f"wrote {output}")


def _describe(exported: "Exported", calibrate: str | None) -> None:
    from rich.table import Table

    rows = Table(box=None, show_header=False)
    size = "x".join(map(str, exported.input_size))
    images = f"{exported.images} {'' if calibrate else 'random '}images of {size}"
    if exported.stride:
        images += f" and another size; sides may be multiples of {exported.stride}"
    if calibrate:
        images += f", from {calibrate}"
    rows.add_row("format", f"{exported.format}, {exported.precision}")
    rows.add_row("compared on", images)
    rows.add_row("largest difference", f"{exported.difference:.2g} of the largest output")
    if exported.agreement is not None:
        rows.add_row("same first class", f"{exported.agreement:g}%")
    common.show(rows)
