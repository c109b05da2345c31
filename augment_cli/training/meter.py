"""Running sums over all processes, with a check that every loss is finite."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from augment_cli.errors import AugmentError


class Diverged(AugmentError):
    """The loss or its gradients are infinite or not a number."""


class Meter:
    """Sums over the images of an epoch so far.

    `add` keeps a batch's results on the device, and `look` reads several batches at once: waiting for the device after
    every batch would slow training down. `sums` are loss times images first, images last, and a task's between them.
    """

    def __init__(self, accelerator: Accelerator, sums: list[float]) -> None:
        self.accelerator = accelerator
        self.sums = list(sums)
        self.pending: list[Tensor] = []

    def add(self, row: Tensor) -> None:
        """Add a batch's sums. Shapes: row (len(sums),)."""
        self.pending.append(row)

    def reset(self) -> None:
        self.sums = [0.0] * len(self.sums)

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
        """Mean over the images."""
        return self.sums[0] / max(self.sums[-1], 1)

    def percent(self, index: int) -> float:
        """A sum as percent of the images."""
        return 100 * self.sums[index] / max(self.sums[-1], 1)
