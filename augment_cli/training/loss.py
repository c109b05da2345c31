"""Losses: timm's for classification, with or without mixed targets, and distillation."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.training.models import logits_of
from augment_cli.training.settings import Settings


def make_mixup(settings: Settings, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix; None if neither is on."""
    from timm.data import Mixup

    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=num_classes,
    )


def make_criterion(settings: Settings, mixed: bool) -> nn.Module:
    """timm's loss on logits (N, classes) and labels (N,), or mixed targets (N, classes)."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    if settings.loss == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixed else settings.smoothing)
    return SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(settings.smoothing)


class Distillation(nn.Module):
    """(1 - weight) loss(logits, targets) + weight T^2 KL(teacher || student), both softened by the temperature T."""

    def __init__(self, criterion: nn.Module, teacher: nn.Module, weight: float, temperature: float) -> None:
        super().__init__()
        self.criterion, self.weight, self.temperature = criterion, weight, temperature
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Shapes: images (N, C, H, W), logits (N, classes), targets (N,) or (N, classes), to a scalar."""
        with torch.no_grad():
            taught = logits_of(self.teacher, images)
        loss = self.criterion(logits, targets)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence(
            taught / self.temperature, logits / self.temperature
        )


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) in nats, the mean over samples. Shapes: both (N, classes)."""
    return F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
