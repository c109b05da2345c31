"""augment detect: train and evaluate torchvision's detectors over converted or plain backbones, on COCO's format."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from augment_cli import specs
from augment_cli.cli import common, runs, writing
from augment_cli.detection.run_settings import DetectionSettings
from augment_cli.detection.settings import Kind, Norm
from augment_cli.errors import InputError
from augment_cli.training.settings import TRACKERS, Precision, Schedule, option

if TYPE_CHECKING:
    from augment_cli.detection.assess import Result

app = typer.Typer(no_args_is_help=True, help="Train and evaluate detectors on data in COCO's format.")

_run, _model, _data, _augmentation, _optimisation, _rates, _machine = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in (
        "Run",
        "Model",
        "Data",
        "Augmentation",
        "Optimisation",
        "Learning rates by provenance",
        "Machine",
    )
)
_Default = DetectionSettings


@app.command("finetune")
def finetune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A converted model or a timm model's name, or a detector's file."),
    ] = None,
    data: Annotated[
        str | None, _run("--data", "-d", metavar="DIR", help="A folder with annotations in COCO's format.")
    ] = None,
    output: Annotated[str | None, _run("--output", "-o", metavar="DIR", help="A new folder for the results.")] = None,
    overwrite: Annotated[bool, _run("--overwrite", help="Replace the run in the output folder.")] = False,
    resume: Annotated[
        Path | None,
        _run("--resume", metavar="DIR", help="Go on with the run in this folder; its settings, but for options given."),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        _run(metavar="N|Nm|Ns", help="Write a checkpoint within epochs, too: every N updates, minutes or seconds."),
    ] = None,
    log_with: Annotated[
        list[str] | None, _run(metavar="NAME", help=f"Log with {', '.join(TRACKERS)}. Repeatable.")
    ] = None,
    log_every: Annotated[int, _run(metavar="N", help="Updates from one logged to the next.")] = _Default.log_every,
    seed: Annotated[int, _run(min=0, help="Of order, augmentation and whatever else is drawn.")] = _Default.seed,
    detector: Annotated[
        Kind | None, _model(help="Which of torchvision's detectors MODEL becomes the backbone of.")
    ] = None,
    levels: Annotated[
        str | None, _model(metavar="N,N,...", help="timm's feature levels that the pyramid reads. [by their strides]")
    ] = None,
    norm: Annotated[
        Norm | None,
        _model(
            help="The backbone's batch statistics: kept, or those of each batch. [frozen; batch for random weights]"
        ),
    ] = None,
    channels: Annotated[int, _model(help="Width of the pyramid and of what follows it.")] = _Default.channels,
    anchor_base: Annotated[
        int | None, _model(min=1, metavar="PIXELS", help="Side of the smallest anchor on the first level. [32]")
    ] = None,
    anchor_scales: Annotated[
        int | None, _model(min=1, help="Sizes of anchors an octave. [3 for RetinaNet, else 1]")
    ] = None,
    anchor_ratios: Annotated[str | None, _model(metavar="R,R,...", help="Height / width of anchors. [0.5,1,2]")] = None,
    pretrained: Annotated[bool, _model("--pretrained", help="timm's weights for a timm model's name.")] = False,
    checkpoint: Annotated[str | None, _model(metavar="FILE", help="A file's weights for a timm model's name.")] = None,
    ema: common.Ema = None,
    model_args: Annotated[
        list[str] | None, _model("--model-arg", "-a", metavar="KEY=VALUE", help="For a timm model's name. Repeatable.")
    ] = None,
    train_split: Annotated[str, _data(help="The split to train on.")] = _Default.train_split,
    val_split: Annotated[str, _data(help="The split to validate on.")] = _Default.val_split,
    img_size: Annotated[
        str | None, _data(metavar="N|NxM", help="Pixels of the shorter side, and the most of the longer. [800x1333]")
    ] = None,
    workers: Annotated[int, _data("--workers", "-j", help="Processes that read images.")] = _Default.workers,
    on_corrupt: Annotated[specs.OnCorrupt, _data(help="At an image that cannot be read.")] = "fail",
    scales: Annotated[
        str | None, _augmentation(metavar="LOW,HIGH", help="Training resizes by a factor between these. [0.8,1.2]")
    ] = None,
    crop_scale: Annotated[
        float, _augmentation(help="The smallest random crop, as a share of the image's area; 1: none.")
    ] = _Default.crop_scale,
    flip: Annotated[float, _augmentation(help="How often images are mirrored.")] = _Default.flip,
    epochs: Annotated[int, _optimisation()] = _Default.epochs,
    batch_size: Annotated[
        int, _optimisation("--batch-size", "-b", help="Images a process and step.")
    ] = _Default.batch_size,
    accumulate: Annotated[int, _optimisation(help="Steps whose gradients make one update.")] = _Default.accumulate,
    opt: Annotated[str, _optimisation(help="timm's name of an optimiser.")] = _Default.opt,
    lr: Annotated[float, _optimisation(help="Learning rate of new parameters, see below.")] = _Default.lr,
    weight_decay: Annotated[float, _optimisation(help="Not of biases, norms, tables.")] = _Default.weight_decay,
    momentum: Annotated[float, _optimisation(help="For optimisers that have one.")] = _Default.momentum,
    clip_grad: Annotated[float, _optimisation(help="Largest norm of the gradient; 0: any.")] = _Default.clip_grad,
    schedule: Annotated[Schedule, _optimisation(help="timm's scheduler, by updates.")] = "cosine",
    warmup_epochs: Annotated[float, _optimisation(min=0, help="Linear warm-up.")] = _Default.warmup_epochs,
    min_lr: Annotated[float, _optimisation(min=0, help="Where schedules end that fall.")] = _Default.min_lr,
    patience: Annotated[
        int, _optimisation(metavar="EPOCHS", help="Stop after so many without a better AP; 0: never.")
    ] = _Default.patience,
    ema_decay: Annotated[
        float, _optimisation(help="Decay of a moving average of the weights, which is evaluated and kept; 0: none.")
    ] = _Default.ema_decay,
    lr_carried: Annotated[float, _rates(help="--lr times this for the source's weights.")] = _Default.lr_carried,
    lr_fitted: Annotated[float, _rates(help="The same for attention that was fitted.")] = _Default.lr_fitted,
    lr_new: Annotated[float, _rates(help="The same for what starts at random.")] = _Default.lr_new,
    new_first: Annotated[
        int, _rates(min=0, metavar="EPOCHS", help="So many epochs at first train nothing that was carried over.")
    ] = _Default.new_first,
    precision: Annotated[Precision, _machine(help="Mixed precision.")] = "no",
    cpu: Annotated[bool, _machine("--cpu", help="Use no accelerator.")] = _Default.cpu,
    sync_norm: Annotated[
        bool, _machine("--sync-norm", help="Batch statistics over all processes; not on CPUs.")
    ] = False,
    grad_checkpointing: Annotated[bool, _machine("--grad-checkpointing", help="Less memory, more time.")] = False,
    compile: Annotated[bool, _machine("--compile", help="torch.compile the backbone.")] = _Default.compile,
) -> None:
    """Train a detector on MODEL's feature levels. On several processes: accelerate launch -m augment_cli detect ...

    augment detect finetune resnet50-aa --detector retinanet --data coco -o run

    augment detect finetune --resume run
    """
    values = _plain(context.params)
    given = runs.given_options(context)
    if resume is not None:
        settings = runs.resumed(
            resume, {name: values[name] for name in given - {"resume"}}, DetectionSettings, "last.safetensors"
        )
    elif missing := next((name for name in ("model", "data", "output") if name not in given), None):
        raise InputError(f"{runs.name_of(missing)} is missing; a run needs MODEL, --data and --output, or --resume DIR")
    else:
        known = {entry.name for entry in fields(DetectionSettings)} & values.keys()
        settings = DetectionSettings(**{name: values[name] for name in known if values[name] is not None})
    _check(settings, resume is not None, overwrite)
    _run_it(settings, resume is not None, overwrite)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values of options as settings have them."""
    plain = dict(values)
    plain["model_args"] = common.parse_arguments(values["model_args"])
    plain["img_size"] = _parse_sides(values["img_size"])
    plain["log_with"] = tuple(values["log_with"] or ())
    plain["levels"] = _numbers("--levels", values["levels"], int)
    for name in ("anchor_ratios", "scales"):
        plain[name] = _numbers(option(name), values[name], float)
    if plain["scales"] is not None and len(plain["scales"]) != 2:
        raise InputError(f"--scales {values['scales']}: write it as LOW,HIGH, such as 0.8,1.2")
    return plain


def _parse_sides(text: str | None) -> tuple[int, int] | None:
    """Pixels of the shorter side and the most of the longer one, which is 5/3 of it where it is not given."""
    sides = common.parse_image_size(text)
    if text is None or sides is None:
        return None
    return sides if "x" in text else (sides[0], sides[0] * 5 // 3)


def _numbers(name: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{name} {text}: write numbers with commas between them") from error


def _check(settings: DetectionSettings, resume: bool, overwrite: bool) -> None:
    """Refuse what can be refused before torch is imported."""
    from augment_cli.detection.coco import check_folder
    from augment_cli.training.folder import check_free

    if not resume:
        common.check_ema(settings.ema, settings.checkpoint)
        check_free(Path(settings.output), overwrite, settings.inputs())
        specs.check_model(settings.model)
        specs.check_file("checkpoint", settings.checkpoint)
    for split in (settings.train_split, settings.val_split):
        check_folder(Path(settings.data), split)


def _run_it(settings: DetectionSettings, resume: bool, overwrite: bool) -> None:
    with common.working("importing torch, timm and accelerate"):
        from augment_cli.detection.assess import finetune as run
    with runs.interruptible(settings.output):
        run(settings, resume=resume, overwrite=overwrite)


@app.command("evaluate")
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="A detector's file, such as run/best.safetensors.")],
    data: Annotated[Path, typer.Option("--data", "-d", metavar="DIR", help="As of augment detect finetune.")],
    split: Annotated[str, typer.Option(help="The split to evaluate on.")] = "validation",
    img_size: Annotated[
        str | None, typer.Option(metavar="N|NxM", help="Sides of images, if not those of the training.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw four images with true boxes and those found.")
    ] = None,
    overwrite: writing.Overwrite = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 4,
    workers: Annotated[int, typer.Option("--workers", "-j", min=0, help="Processes that read images.")] = 4,
    on_corrupt: Annotated[specs.OnCorrupt, typer.Option(help="At an image that cannot be read.")] = "fail",
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no accelerator.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The scores as JSON.")] = False,
) -> None:
    """Average precision of a detector, by pycocotools: overall, by size and by class.

    augment detect evaluate run/best.safetensors --data coco
    """
    from augment_cli.detection.coco import check_folder
    from augment_cli.files import check_output

    specs.check_file("detector", model)
    check_folder(data, split)
    if pictures is not None:
        if pictures.suffix != ".png":
            raise InputError(f"--pictures {pictures}: the name ends in .png")
        check_output(pictures, overwrite, inputs=(model,))
    with common.working("importing torch and torchvision"):
        from augment_cli.detection.assess import Assessment, assess
    size = _parse_sides(img_size)
    asked = Assessment(str(model), str(data), split, size, batch_size, workers, on_corrupt, pictures, cpu)
    result = assess(asked)
    if result is None:  # another process of several shows it
        return
    for note in result.notes:
        common.say(f"note: {note}")
    if result.corrupt:
        common.say(f"{len(result.corrupt)} corrupt images skipped: {', '.join(result.corrupt[:5])}")
    if pictures is not None:
        common.say(f"wrote {pictures}")
    _show(model, data, result, as_json)


def _show(model: Path, data: Path, result: "Result", as_json: bool) -> None:
    kinds = {"boxes": result.boxes} | ({"masks": result.masks} if result.masks else {})
    if as_json:
        scores = {kind: found.to_dict() | {"classes": found.classes} for kind, found in kinds.items()}
        common.echo(json.dumps({"model": str(model), "data": str(data), "images": result.images, **scores}, indent=2))
        return
    from rich.table import Table

    table = Table(
        box=None, header_style="bold", title=f"{model} on {data}, {result.images:,} images, %", title_justify="left"
    )
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for name in result.boxes.to_dict():
        table.add_row(name, *(_percent(found.to_dict()[name]) for found in kinds.values()))
    for name in result.boxes.classes:
        table.add_row(f"AP of {name}", *(_percent(found.classes[name]) for found in kinds.values()))
    common.show(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
