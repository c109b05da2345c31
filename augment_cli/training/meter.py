"""Running sums of loss and accuracy over all processes, with a check that every loss is finite."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from augment_cli.errors import AugmentError


class Diverged(AugmentError):
    """The loss is infinite or not a number."""


class Meter:
    """Loss and top-1 of an epoch so far.

    `add` keeps a batch's results on the device, and `look` reads several batches at once: waiting for the device after
    every batch would slow training down. `sums` are (loss times images, correct, images).
    """

    def __init__(self, accelerator: Accelerator, sums: list[float] | None = None) -> None:
        self.accelerator = accelerator
        self.sums = list(sums or (0.0, 0.0, 0.0))
        self.pending: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch. Shapes: loss a scalar, logits (N, classes), labels (N,)."""
        correct = (logits.detach().argmax(-1) == labels).sum()
        count = torch.tensor(float(len(labels)), device=loss.device)
        self.pending.append(torch.stack([loss.detach().float() * count, correct.float(), count]))

    def look(self, last: int, where: str) -> None:
        """Read the batches added since the last call, up to batch `last`, from 1. Every process must call it.

        Raises:
            Diverged: a loss is not finite.
        """
        if not self.pending:
            return
        rows = self.accelerator.reduce(torch.stack(self.pending), reduction="sum").tolist()
        self.pending.clear()
        for i, row in enumerate(rows):
            if not math.isfinite(row[0]):
                raise Diverged(f"the loss is {row[0]:g} {where}, batch {last - len(rows) + 1 + i}")
            self.sums = [a + b for a, b in zip(self.sums, row, strict=True)]

    @property
    def loss(self) -> float:
        return self.sums[0] / max(self.sums[2], 1)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.sums[1] / max(self.sums[2], 1)
