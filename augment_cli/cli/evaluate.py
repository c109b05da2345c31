"""augment evaluate: how good a model is on labelled images, and how like another it is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from augment_cli import specs
from augment_cli.cli import common, writing
from augment_cli.errors import InputError

if TYPE_CHECKING:
    from augment_cli.training.assess import Result


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A converted model, or a timm model's name.")],
    data: Annotated[str, typer.Option("--data", "-d", metavar="SPEC", help="As of augment finetune.")],
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "validation",
    data_root: Annotated[str | None, typer.Option(metavar="DIR", help="Where torch/ and hfds/ data are kept.")] = None,
    input_key: Annotated[str | None, typer.Option(metavar="NAME", help="The images' column or entry.")] = None,
    target_key: Annotated[str | None, typer.Option(metavar="NAME", help="The labels' column or entry.")] = None,
    class_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line, in the order of the model's classes.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's weights for a name.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="A file's weights for a name.")] = None,
    ema: common.Ema = None,
    model_args: common.ModelArguments = None,
    base: common.Base = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Agreement with this model; a name has timm's weights.")
    ] = None,
    against_checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The other model's weights, for a name.")
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="FILE.csv|FILE.png", help="Write the confusion matrix.")
    ] = None,
    overwrite: writing.Overwrite = False,
    img_size: common.ImageSize = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 64,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Processes that read images.")] = 4,
    on_corrupt: Annotated[specs.OnCorrupt, typer.Option(help="At an image that cannot be read.")] = "fail",
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no accelerator.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The scores as JSON.")] = False,
) -> None:
    """Top-1 and top-5 of MODEL on labelled images; with --against, how far it agrees with another model.

    augment evaluate tuned/best --data imagenet --against resnet50
    """
    from augment_cli.files import check_output

    if confusion is not None and confusion.suffix not in (".csv", ".png"):
        raise InputError(f"--confusion {confusion}: the name ends in .csv or .png")
    common.check_ema(ema, checkpoint)
    specs.check_model(model)
    specs.check_data(data)
    if against:
        specs.check_model(against)
    for weights in (checkpoint, against_checkpoint):
        specs.check_file("checkpoint", weights)
    if confusion is not None:
        check_output(confusion, overwrite, inputs=(class_map, checkpoint, against_checkpoint))
    with common.working("importing torch, timm and accelerate"):
        from augment_cli.training.assess import Assessment, assess, write_confusion
    asked = Assessment(
        model=model,
        data=data,
        split=split,
        data_root=data_root,
        input_key=input_key,
        target_key=target_key,
        class_map=class_map,
        pretrained=pretrained,
        checkpoint=checkpoint,
        ema=ema,
        base=base,
        model_args=common.parse_arguments(model_args),
        against=against,
        against_checkpoint=against_checkpoint,
        confusion=confusion is not None,
        img_size=common.parse_image_size(img_size),
        batch_size=batch_size,
        workers=workers,
        on_corrupt=on_corrupt,
        cpu=cpu,
    )
    result = assess(asked)
    if result is None:  # another process of several shows it
        return
    if result.weights:
        common.say(f"weights: {result.weights}")
    if result.corrupt:
        common.say(f"{len(result.corrupt)} corrupt images skipped: {', '.join(result.corrupt[:5])}")
    if confusion is not None:
        write_confusion(result, confusion)
        common.say(f"wrote {confusion}")
    _show(model, data, result, as_json)


def _show(model: str, data: str, result: "Result", as_json: bool) -> None:
    scores = result.scores.to_dict()
    if as_json:
        common.echo(json.dumps({"model": model, "data": data, **scores, "corrupt": result.corrupt}, indent=2))
        return
    from rich.table import Table

    units = {"loss": "nats", "top1": "%", "top5": "%", "agreement": "%", "kl": "nats"}
    rows = Table(box=None, header_style="bold", title=f"{model} on {data}", title_justify="left")
    for column in ("", "value", "unit"):
        rows.add_column(column, justify="right" if column == "value" else "left")
    for name, value in scores.items():
        rows.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", units.get(name, ""))
    common.show(rows)
