"""Classification: images with one label each, on timm's loaders and losses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from augment_cli.dataset import ImageStream
from augment_cli.errors import AugmentError
from augment_cli.training.data import Loader, Splits, data_config, evaluation_loader, open_splits, training_loader
from augment_cli.training.evaluate import evaluate
from augment_cli.training.folder import STATE
from augment_cli.training.loss import Distillation, make_criterion, make_mixup
from augment_cli.training.meter import Meter
from augment_cli.training.models import (
    FINETUNED,
    Opened,
    logits_of,
    open_companion,
    open_model,
    set_label_names,
    with_classes,
    with_drop_path,
    write_trained,
)
from augment_cli.training.parameters import provenance
from augment_cli.training.settings import Settings
from augment_cli.training.task import Chart, Metric, Row, Task


class Classification(Task[Settings]):
    """The task of `augment finetune`."""

    name = "classification"
    scores = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5")
    charts = (
        Chart("loss, nats", {"val": "val_loss", "train": "train_loss"}),
        Chart("top-1, %", {"val": "val_top1", "train": "train_top1"}),
    )
    best = Metric("val_top1", "top-1")
    sums = 3

    def __init__(self, settings: Settings, accelerator: Accelerator, resumed: bool) -> None:
        super().__init__(settings, accelerator, resumed)
        opened, self.splits = _open_both(settings, resumed)
        self.kinds = provenance(opened)
        self.opened = _mark(opened, settings)
        set_label_names(self.opened.model, self.splits.classes)
        self.model = self.opened.model
        self.images, self.val_images = len(self.splits.train), len(self.splits.val)
        self.train, self.val = _loaders(self.opened, self.splits, settings, accelerator)
        self.mixup = make_mixup(settings, self.opened.num_classes)
        self.criterion = _criterion(settings, self.mixup, self.opened, accelerator)

    def describe(self) -> list[str]:
        lines = [f"{self.opened.name}, {self.opened.num_classes} classes"]
        return [*lines, f"source weights: {self.opened.weights}"] if self.opened.weights else lines

    def set_epoch(self, epoch: int) -> None:
        self.splits.train.set_epoch(epoch)

    def loss(self, model: nn.Module, images: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Shapes: images (N, C, H, W), targets (N,) to a scalar and (3,): loss times images, correct, images."""
        labels: Tensor = targets
        mixed, targets = self.mixup(images.clone(), labels) if self.mixup else (images, labels)
        logits = logits_of(model, mixed)
        loss = self._criterion(mixed, logits, targets)
        correct = (logits.detach().argmax(-1) == labels).sum()
        count = torch.full((), float(len(labels)), device=loss.device)  # torch.tensor would wait for the device
        return loss, torch.stack([loss.detach().float() * count, correct.float(), count])

    def _criterion(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        if isinstance(self.criterion, Distillation):
            with self.accelerator.autocast():
                return self.criterion(images, logits, targets)
        loss: Tensor = self.criterion(logits, targets)
        return loss

    def validate(self, model: nn.Module) -> Row:
        scores = evaluate(model, self.val, self.accelerator)
        return {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}

    def train_scores(self, meter: Meter) -> Row:
        return {"train_loss": meter.loss, "train_top1": meter.percent(1)}

    def running(self, meter: Meter) -> str:
        return f"loss {meter.loss:.4f}  top-1 {meter.percent(1):.2f}%"

    def summary(self, row: Row) -> str:
        return (
            f"train loss {row['train_loss']:.4f}, top-1 {row['train_top1']:.2f}%; validation loss "
            f"{row['val_loss']:.4f}, top-1 {row['val_top1']:.2f}%, top-5 {row['val_top5']:.2f}%"
        )

    def write(self, model: nn.Module, folder: Path, name: str) -> None:
        write_trained(model, self.opened, folder / name)

    def corrupt_names(self) -> list[str]:
        return [*self.splits.train.corrupt_names(), *self.splits.val.corrupt_names()]

    def check_resumed(self, position: tuple[int, int, int], before: Settings) -> None:
        if isinstance(self.splits.train, ImageStream) and position[1] and before.workers != self.settings.workers:
            raise AugmentError(
                f"{Path(self.settings.output) / STATE} was written within an epoch of a stream that {before.workers} "
                f"workers share: resume with `workers={before.workers}`"
            )


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
    options = (settings.batch_size, settings.workers, config, accelerator, settings.channels_last)
    return train, evaluation_loader(splits.val, *options)


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
