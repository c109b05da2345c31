"""A fine-tuning run: model, data, optimiser and progress, new or from a checkpoint.

No random state is saved. Every draw is seeded by the run's seed and its place, (epoch, image) for augmentation and
(epoch, batch, process) for the rest, so that a resumed run draws the same numbers as one that was never interrupted.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from timm.utils import ModelEmaV3
from torch import nn

from augment_cli.dataset import ImageStream
from augment_cli.errors import AugmentError, boundary
from augment_cli.planning.recipe import describe_errors
from augment_cli.training import state
from augment_cli.training.data import Loader, Splits, data_config, evaluation_loader, open_splits, training_loader
from augment_cli.training.folder import STATE
from augment_cli.training.history import Row, check_row
from augment_cli.training.loss import Distillation, make_criterion, make_mixup
from augment_cli.training.meter import Meter
from augment_cli.training.models import (
    FINETUNED,
    Opened,
    open_companion,
    open_model,
    set_label_names,
    with_classes,
    with_drop_path,
)
from augment_cli.training.parameters import Provenance, make_optimizer, make_scheduler, provenance
from augment_cli.training.settings import FIXED, Settings, settings_of


@dataclass
class Run:
    """A run's parts and progress: `batch` batches of `epoch` (from 0) and `updates` weight updates are done."""

    settings: Settings
    accelerator: Accelerator
    opened: Opened
    kinds: dict[str, Provenance]
    splits: Splits
    train: Loader
    val: Loader
    model: nn.Module
    optimizer: Any
    scheduler: Any
    ema: ModelEmaV3 | None
    criterion: nn.Module
    mixup: Any
    meter: Meter
    epoch: int = 0
    batch: int = 0
    updates: int = 0
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)
    saved: tuple[int, int] = (0, 0)

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    @property
    def trained(self) -> nn.Module:
        """The model to evaluate and write: the moving average if there is one, else the model in training."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module


def prepare(settings: Settings, accelerator: Accelerator, saved: dict[str, Any] | None) -> Run:
    """Make a run: new, or continued from `saved`, a checkpoint's contents.

    Raises:
        AugmentError: model, data and settings contradict each other, or the checkpoint belongs to another run.
    """
    opened, splits = _open_both(settings, resumed=saved is not None)
    kinds = provenance(opened)
    if saved is not None:
        if saved["kinds"].keys() != kinds.keys():
            raise AugmentError(f"{Path(settings.output) / STATE} is the checkpoint of another model")
        kinds = saved["kinds"]
    if settings.new_first and set(kinds.values()) == {"carried"}:
        raise AugmentError(
            f"`new_first`: all parameters of {opened.name} are carried over, so that none would be trained"
        )
    opened = _mark(opened, settings)
    set_label_names(opened.model, splits.classes)
    model = _configured(opened.model, settings, accelerator)
    train, val = _loaders(opened, splits, settings, accelerator)
    if saved is not None:
        _check_saved(saved, settings, accelerator, splits)
        with boundary(f"{Path(settings.output) / STATE} does not fit the run"):
            model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model, kinds, settings)
    scheduler = make_scheduler(optimizer, settings, -(-len(train) // settings.accumulate))
    ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
    mixup = make_mixup(settings, opened.num_classes)
    criterion = _criterion(settings, mixup, opened, accelerator)
    freeze_carried(model, kinds, frozen=(saved["position"][0] if saved else 0) < settings.new_first)
    if settings.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    parts = (settings, accelerator, opened, kinds, splits, train, val, model, optimizer, scheduler, ema, criterion)
    run = Run(*parts, mixup, Meter(accelerator))
    if saved is not None:
        with boundary(f"{run.folder / STATE} does not fit the run"):
            _restore(run, saved)
    return run


def _open_both(settings: Settings, resumed: bool) -> tuple[Opened, Splits]:
    """Open model and data, and give the model a classifier for the classes to train."""
    if resumed:
        opened = open_model(Path(settings.output) / "last", base=settings.base)
    else:
        opened = open_model(
            settings.model,
            pretrained=settings.pretrained,
            weights=settings.checkpoint,
            ema=settings.ema,
            base=settings.base,
            args=settings.model_args,
            seed=settings.seed,
        )
    splits = open_splits(settings, opened.input_size[0])
    if not resumed:
        opened = with_classes(opened, count_classes(settings, splits.classes, opened.num_classes), settings.seed)
    if settings.drop_path:
        opened = with_drop_path(opened, settings.drop_path)
    splits.train.num_classes = splits.val.num_classes = opened.num_classes
    return opened, splits


def _loaders(opened: Opened, splits: Splits, settings: Settings, accelerator: Accelerator) -> tuple[Loader, Loader]:
    config = data_config(opened.model, opened.input_size, settings.img_size)
    train = training_loader(splits.train, settings, config, accelerator)
    if len(train) == 0:
        together = settings.batch_size * accelerator.num_processes
        raise AugmentError(f"{len(splits.train)} training images do not fill one batch of {together}")
    return train, evaluation_loader(splits.val, settings.batch_size, settings.workers, config, accelerator)


def _mark(opened: Opened, settings: Settings) -> Opened:
    """Add to the metadata that the weights were fine-tuned."""
    if opened.metadata is None or FINETUNED in opened.metadata.weights:
        return opened
    weights = f"{opened.metadata.weights}, {FINETUNED} {Path(settings.data).name}"
    return replace(opened, metadata=opened.metadata.model_copy(update={"weights": weights}))


def count_classes(settings: Settings, classes: dict[str, int] | None, own: int) -> int:
    """Number of classes to train: the setting, else the data's, else the model's.

    Raises:
        AugmentError: the data have more classes than the setting says, or fewer than two.
    """
    found = 1 + max(classes.values()) if classes else None
    if settings.num_classes and found and found > settings.num_classes:
        raise AugmentError(f"data {settings.data} have {found} classes, more than `num_classes={settings.num_classes}`")
    count = settings.num_classes or found or own
    if count < 2:
        raise AugmentError(f"data {settings.data} have {count} class: training takes two at least")
    return count


def _configured(model: nn.Module, settings: Settings, accelerator: Accelerator) -> nn.Module:
    """Move the model to its device and memory format; switch on gradient checkpointing and SyncBatchNorm if asked."""
    model = model.to(accelerator.device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if settings.grad_checkpointing:
        switch: Callable[[bool], None] | None = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise AugmentError(f"{type(model).__name__} has no gradient checkpointing: leave out `grad_checkpointing`")
        switch(True)
    if settings.sync_norm and accelerator.num_processes > 1:
        from timm.layers import convert_sync_batchnorm

        if accelerator.device.type == "cpu":
            raise AugmentError("`sync_norm` needs accelerators: torch's SyncBatchNorm does not run on CPUs")
        model = convert_sync_batchnorm(model)
    return model


def _criterion(settings: Settings, mixup: Any, opened: Opened, accelerator: Accelerator) -> nn.Module:
    criterion = make_criterion(settings, mixed=mixup is not None)
    if settings.teacher is None:
        return criterion
    teacher = open_companion(settings.teacher, settings.teacher_checkpoint)
    if teacher.num_classes != opened.num_classes:
        raise AugmentError(
            f"the teacher {settings.teacher} has {teacher.num_classes} classes, and the model {opened.num_classes}: "
            f"fine-tune the teacher on these data first"
        )
    return Distillation(criterion, teacher.model.to(accelerator.device), settings.distill, settings.temperature)


def contents(run: Run) -> dict[str, Any]:
    """The contents of a checkpoint."""
    return {
        "settings": asdict(run.settings),
        "processes": run.accelerator.num_processes,
        "images": len(run.splits.train),
        "kinds": run.kinds,
        "position": [run.epoch, run.batch, run.updates],
        "seconds": run.seconds,
        "sums": run.meter.sums,
        "history": run.history,
        "model": run.accelerator.unwrap_model(run.model).state_dict(),
        "ema": None if run.ema is None else run.ema.module.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": state.pack_scaler(run.accelerator),
    }


_Number = Annotated[int, Field(ge=0, le=2**53)]


class _Saved(BaseModel):
    """The structure of a checkpoint's contents. Models and optimisers check their own parts when they load them."""

    settings: dict[str, Any]
    processes: _Number
    images: _Number
    kinds: dict[str, Provenance]
    position: tuple[_Number, _Number, _Number]
    seconds: Annotated[float, Field(ge=0, le=2**53)]
    sums: Annotated[list[float], Field(min_length=3, max_length=3)]
    history: list[Annotated[Row, AfterValidator(check_row)]]
    model: dict[str, Any]
    ema: dict[str, Any] | None
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None


def read_saved(path: Path) -> dict[str, Any]:
    """Read a checkpoint's contents, as `contents` made them.

    Raises:
        AugmentError: the file is not a checkpoint, or a damaged one.
    """
    saved = state.read_state(path)
    try:
        _Saved.model_validate(saved)
    except ValidationError as error:
        raise AugmentError(f"{path} is no checkpoint of a run: {describe_errors(error, _Saved)}") from error
    return saved


def _check_saved(saved: dict[str, Any], settings: Settings, accelerator: Accelerator, splits: Splits) -> None:
    where = Path(settings.output) / STATE
    before = settings_of(saved["settings"], str(where))
    if other := next((name for name in FIXED if getattr(before, name) != getattr(settings, name)), None):
        raise AugmentError(
            f"{where} belongs to another run than settings.json beside it: `{other}` was "
            f"{getattr(before, other)}, and is {getattr(settings, other)}"
        )
    if isinstance(splits.train, ImageStream) and saved["position"][1] and before.workers != settings.workers:
        raise AugmentError(
            f"{where} was written within an epoch of a stream that {before.workers} workers share: resume "
            f"with `workers={before.workers}`"
        )
    if saved["processes"] != accelerator.num_processes:
        raise AugmentError(
            f"{where} was written by {saved['processes']} processes, and now there are {accelerator.num_processes}: "
            f"resume with {saved['processes']}, or start a new run from {Path(settings.output) / 'last'}"
        )
    if saved["images"] != len(splits.train):
        raise AugmentError(
            f"data {settings.data} had {saved['images']:,} training images when the run began, and now "
            f"{len(splits.train):,}: a resumed run would train on them in another order"
        )


def _restore(run: Run, saved: dict[str, Any]) -> None:
    run.epoch, run.batch, run.updates = saved["position"]
    run.saved = (run.epoch, run.batch)
    run.seconds, run.history = saved["seconds"], saved["history"]
    run.meter = Meter(run.accelerator, saved["sums"])
    _restore_optimizer(run, saved["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(saved["ema"])
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])


def _restore_optimizer(run: Run, saved: dict[str, Any]) -> None:
    """Take the optimiser's moments from the checkpoint; learning rates and weight decay stay those of the settings."""
    own = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    run.optimizer.load_state_dict(saved)
    for group, options in zip(run.optimizer.param_groups, own, strict=True):
        group.update(options)
    if run.updates:
        run.scheduler.step_update(run.updates)


def freeze_carried(model: nn.Module, kinds: dict[str, Provenance], frozen: bool) -> bool:
    """Freeze the carried parameters, or unfreeze them. Returns whether that changed anything."""
    parameters = [p for name, p in model.named_parameters() if kinds[name] == "carried"]
    changed = [p for p in parameters if p.requires_grad is frozen]
    for parameter in changed:
        parameter.requires_grad_(not frozen)
    return bool(changed)
