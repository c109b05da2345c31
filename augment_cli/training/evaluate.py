"""Evaluate a model on labelled images: top-1, top-5, confusion, and agreement with another model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from augment_cli.errors import AugmentError
from augment_cli.training.loss import divergence
from augment_cli.training.models import logits_of


@dataclass(frozen=True)
class Scores:
    """Means over `images` images: `loss` is cross-entropy in nats, top-1 and top-5 are percent.

    agreement: percent of images that another model gives the same class; kl: KL(other || model) of the two models'
    probabilities, in nats. confusion: (classes, classes), row true, column predicted.
    """

    images: int
    loss: float
    top1: float
    top5: float
    agreement: float | None = None
    kl: float | None = None
    confusion: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"images": self.images, "loss": self.loss, "top1": self.top1, "top5": self.top5}
        if self.agreement is not None:
            values |= {"agreement": self.agreement, "kl": self.kl}
        return values


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    *,
    other: nn.Module | None = None,
    num_classes: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Scores of a model over a loader's images, in all processes together. Every module gets its mode back.

    Args:
        other: a second model on the same images, for agreement.
        num_classes: number of classes of a confusion matrix; None makes no matrix.
        advance: called after each batch with its number of images, in this process.

    Raises:
        AugmentError: there are no images, or a label is beyond the model's classes.
    """
    models = [model] if other is None else [model, other]
    modes = [(module, module.training) for m in models for module in m.modules()]
    for m in models:
        m.eval()
    rows, highest = [torch.zeros(6, device=accelerator.device)], []
    confusion = torch.zeros(num_classes or 0, num_classes or 0, device=accelerator.device)
    for images, labels in loader:
        with accelerator.autocast():
            logits = logits_of(model, images)
            reference = None if other is None else logits_of(other, images)
        classes = logits.shape[-1]
        highest.append(labels.max())
        if len(highest) == 1:  # reading a number waits for the device: not after every batch
            _check_labels(highest, classes)
        labels = labels.clamp(max=classes - 1)
        rows.append(_row(logits, labels, reference))
        if num_classes:
            predicted = labels * num_classes + logits.argmax(-1)
            confusion += torch.bincount(predicted, minlength=num_classes**2).view_as(confusion)
        advance(len(labels))
    for module, mode in modes:
        module.training = mode
    if highest:
        _check_labels(highest, classes)
    # float32 is exact enough for the sums of a batch, but not for those of all batches.
    sums = torch.stack([torch.stack(rows).cpu().double().sum(0)]).to(accelerator.device, _widest(accelerator.device))
    sums = accelerator.reduce(sums, reduction="sum")[0].tolist()
    return _scores(sums, other is not None, accelerator.reduce(confusion, "sum").long().cpu() if num_classes else None)


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _check_labels(labels: list[Tensor], classes: int) -> None:
    highest = int(torch.stack(labels).max())
    if highest >= classes:
        raise AugmentError(f"the data have a label {highest}, and the model has {classes} classes, from 0")


def _row(logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
    """Sums over a batch (6,): loss, top-1, top-5, agreement with the other model, divergence from it, images."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    zero = torch.zeros_like(loss)
    same = zero if reference is None else (reference.argmax(-1) == logits.argmax(-1)).sum()
    apart = zero if reference is None else divergence(reference, logits) * len(labels)
    values = (loss, best[:, 0].sum(), best.any(-1).sum(), same, apart, zero + len(labels))
    return torch.stack([value.float() for value in values])


def _scores(sums: list[float], compared: bool, confusion: Tensor | None) -> Scores:
    loss, first, five, same, apart, images = sums
    if not images:
        raise AugmentError("there are no images to evaluate on")
    return Scores(
        images=round(images),
        loss=loss / images,
        top1=100 * first / images,
        top5=100 * five / images,
        agreement=100 * same / images if compared else None,
        kl=apart / images if compared else None,
        confusion=confusion,
    )
