"""augment finetune: train a converted model, or a plain one beside it, on labelled images."""

from dataclasses import fields
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from augment_cli.cli import common, runs
from augment_cli.errors import InputError
from augment_cli.training.settings import TRACKERS, Schedule, Settings

_run, _model, _data, _augmentation, _loss, _optimisation, _rates, _machine = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in (
        "Run",
        "Model",
        "Data",
        "Augmentation",
        "Loss and distillation",
        "Optimisation",
        "Learning rates by provenance",
        "Machine",
    )
)

OnCorrupt = StrEnum("OnCorrupt", ["fail", "skip"])
Loss = StrEnum("Loss", ["ce", "bce"])
Precision = StrEnum("Precision", ["no", "bf16", "fp16"])


def finetune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A converted model's file or folder, or a timm model's name."),
    ] = None,
    data: Annotated[
        str | None,
        _run("--data", "-d", metavar="SPEC", help="A folder, a tar file, or hfds/NAME, wds/PATH, torch/NAME, ..."),
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
        list[str] | None,
        _run(metavar="NAME", help=f"Log epochs and updates with {', '.join(TRACKERS)}. Repeatable."),
    ] = None,
    log_every: Annotated[int, _run(metavar="N", help="Updates from one logged to the next.")] = Settings.log_every,
    seed: Annotated[int, _run(min=0, help="Of order, augmentation and whatever else is drawn.")] = Settings.seed,
    pretrained: Annotated[bool, _model("--pretrained", help="timm's weights for a timm model's name.")] = False,
    checkpoint: Annotated[
        str | None, _model(metavar="FILE", help="A file's weights for a timm model's name: safetensors or torch.")
    ] = None,
    ema: common.Ema = None,
    base: common.Base = None,
    num_classes: Annotated[
        int | None, _model(min=2, help="Classes to train; as many as the data have, if not given.")
    ] = None,
    model_args: Annotated[
        list[str] | None, _model("--model-arg", "-a", metavar="KEY=VALUE", help="For a timm model's name. Repeatable.")
    ] = None,
    train_split: Annotated[str, _data(help="The split to train on.")] = Settings.train_split,
    val_split: Annotated[str, _data(help="The split to validate on.")] = Settings.val_split,
    val_data: Annotated[str | None, _data(metavar="SPEC", help="Validate on other data than --data.")] = None,
    hold_out: Annotated[
        float, _data(help="Validate on this share of the training images, for data without splits.")
    ] = Settings.hold_out,
    data_root: Annotated[str | None, _data(metavar="DIR", help="Where torch/ and hfds/ data are kept.")] = None,
    input_key: Annotated[
        str | None,
        _data(metavar="NAME", help="The images' column of hfds/, hfids/, tfds/ data, or entry of wds/ ones."),
    ] = None,
    target_key: Annotated[str | None, _data(metavar="NAME", help="The labels' column or entry.")] = None,
    download: Annotated[bool, _data("--download", help="Fetch torch/ and tfds/ data that are not there.")] = False,
    img_size: Annotated[
        str | None, _data(metavar="N|HxW", help="Image size to train at, if not the model's own.")
    ] = None,
    workers: Annotated[int, _data("--workers", "-j", help="Processes that read images.")] = Settings.workers,
    on_corrupt: Annotated[
        OnCorrupt, _data(help="At an image that cannot be read: stop, or take the next and report it.")
    ] = OnCorrupt.fail,
    augmentation: Annotated[bool, _augmentation(help="Random crops, flips and all below.")] = Settings.augmentation,
    crop_scale: Annotated[
        float, _augmentation(help="The smallest random crop, as a share of the image's area.")
    ] = Settings.crop_scale,
    flip: Annotated[float, _augmentation(help="How often images are mirrored; 0 for digits, text.")] = Settings.flip,
    color_jitter: Annotated[
        float, _augmentation(help="Brightness, contrast and saturation vary by up to this share.")
    ] = Settings.color_jitter,
    auto_augment: Annotated[
        str | None, _augmentation(metavar="POLICY", help="timm's policy, such as rand-m7-mstd0.5.")
    ] = None,
    random_erasing: Annotated[
        float, _augmentation(help="How often a part of the image is erased.")
    ] = Settings.random_erasing,
    mixup: Annotated[float, _augmentation(min=0, help="Alpha of mixup; 0 for none.")] = Settings.mixup,
    cutmix: Annotated[float, _augmentation(min=0, help="Alpha of cutmix; 0 for none.")] = Settings.cutmix,
    loss: Annotated[Loss, _loss(help="Cross-entropy, or binary cross-entropy of every class.")] = Loss.ce,
    smoothing: Annotated[float, _loss(help="Label smoothing.")] = Settings.smoothing,
    teacher: Annotated[
        str | None, _loss(metavar="MODEL", help="Distil from this model: as MODEL; a name has timm's weights.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, _loss(metavar="FILE", help="The teacher's weights, for a timm model's name.")
    ] = None,
    distill: Annotated[float, _loss(help="The teacher's share of the loss.")] = Settings.distill,
    temperature: Annotated[float, _loss(help="Both models' logits are divided by it.")] = Settings.temperature,
    epochs: Annotated[int, _optimisation("--epochs", "-e", help="Times through the data.")] = Settings.epochs,
    batch_size: Annotated[
        int, _optimisation("--batch-size", "-b", help="Images a step, in every process.")
    ] = Settings.batch_size,
    accumulate: Annotated[int, _optimisation(help="Steps whose gradients make one update.")] = Settings.accumulate,
    opt: Annotated[str, _optimisation(metavar="NAME", help="timm's optimiser of this name.")] = Settings.opt,
    lr: Annotated[float, _optimisation(help="Learning rate of new parameters, see below.")] = Settings.lr,
    weight_decay: Annotated[float, _optimisation(help="Not of biases, norms, tables.")] = Settings.weight_decay,
    momentum: Annotated[float, _optimisation(help="For optimisers that have one.")] = Settings.momentum,
    clip_grad: Annotated[float, _optimisation(help="Largest norm of the gradient; 0: any.")] = Settings.clip_grad,
    schedule: Annotated[Schedule, _optimisation(help="timm's scheduler, by updates.")] = "cosine",
    warmup_epochs: Annotated[
        float, _optimisation(min=0, help="Linear warm-up; at most half of all epochs.")
    ] = Settings.warmup_epochs,
    min_lr: Annotated[float, _optimisation(min=0, help="Where schedules end that fall.")] = Settings.min_lr,
    patience: Annotated[
        int, _optimisation(metavar="EPOCHS", help="Stop after so many without a better validation top-1; 0: never.")
    ] = Settings.patience,
    drop_path: Annotated[
        float, _optimisation(metavar="RATE", help="Stochastic depth: how often the last block is skipped.")
    ] = Settings.drop_path,
    ema_decay: Annotated[
        float,
        _optimisation(help="Decay of a moving average of the weights, which is then evaluated and kept; 0: none."),
    ] = Settings.ema_decay,
    lr_carried: Annotated[float, _rates(help="--lr times this for the source's weights.")] = Settings.lr_carried,
    lr_fitted: Annotated[float, _rates(help="The same for attention that was fitted.")] = Settings.lr_fitted,
    lr_new: Annotated[float, _rates(help="The same for what starts at random.")] = Settings.lr_new,
    layer_decay: Annotated[
        float, _rates(help="Times this again for every layer down from the last; 1 for none.")
    ] = Settings.layer_decay,
    new_first: Annotated[
        int, _rates(min=0, metavar="EPOCHS", help="So many epochs at first train nothing that was carried over.")
    ] = Settings.new_first,
    freeze_norm: Annotated[
        bool, _machine("--freeze-norm", help="Batch normalisation keeps its statistics.")
    ] = Settings.freeze_norm,
    sync_norm: Annotated[
        bool, _machine("--sync-norm", help="Batch normalisation over all processes; not on CPUs.")
    ] = Settings.sync_norm,
    precision: Annotated[Precision, _machine(help="Mixed precision.")] = Precision.no,
    cpu: Annotated[bool, _machine("--cpu", help="Use no accelerator.")] = Settings.cpu,
    channels_last: Annotated[
        bool, _machine("--channels-last", help="Channels innermost in memory.")
    ] = Settings.channels_last,
    grad_checkpointing: Annotated[
        bool, _machine("--grad-checkpointing", help="Less memory, more time.")
    ] = Settings.grad_checkpointing,
    compile: Annotated[bool, _machine("--compile", help="torch.compile the model.")] = Settings.compile,
) -> None:
    """Fine-tune MODEL on labelled images. On several processes: accelerate launch -m augment_cli finetune ...

    augment finetune resnet50-aa --data imagenet --epochs 30 -o tuned

    augment finetune --resume tuned
    """
    values, given = _plain(context.params), runs.given_options(context)
    if resume is not None:
        settings = runs.resumed(resume, {name: values[name] for name in given - {"resume"}}, Settings, "last")
    elif missing := next((name for name in ("model", "data", "output") if name not in given), None):
        raise InputError(f"{runs.name_of(missing)} is missing; a run needs MODEL, --data and --output, or --resume DIR")
    else:
        settings = Settings(**{entry.name: values[entry.name] for entry in fields(Settings)})
    _check(settings, resume is not None, overwrite)
    _run_it(settings, resume=resume is not None, overwrite=overwrite)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values of options as settings have them."""
    plain = {key: value.value if isinstance(value, StrEnum) else value for key, value in values.items()}
    plain["model_args"] = common.parse_arguments(values["model_args"])
    plain["img_size"] = common.parse_image_size(values["img_size"])
    plain["log_with"] = tuple(values["log_with"] or ())
    return plain


def _check(settings: Settings, resume: bool, overwrite: bool) -> None:
    """Refuse what can be refused before torch is imported."""
    from augment_cli import specs
    from augment_cli.training.folder import check_free

    if not resume:
        common.check_ema(settings.ema, settings.checkpoint)
        check_free(Path(settings.output), overwrite, settings.inputs())
        specs.check_model(settings.model)
        specs.check_file("checkpoint", settings.checkpoint)
    if settings.teacher:
        specs.check_model(settings.teacher)
    specs.check_file("checkpoint", settings.teacher_checkpoint)
    for data in (settings.data, settings.val_data):
        if data:
            specs.check_data(data)


def _run_it(settings: Settings, resume: bool, overwrite: bool) -> None:
    with common.working("importing torch, timm and accelerate"):
        from augment_cli.training.finetune import finetune as run
    with runs.interruptible(settings.output):
        run(settings, resume=resume, overwrite=overwrite)
