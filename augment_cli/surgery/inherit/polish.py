"""A converted model brought nearer to its source's predictions by gradient descent on what the conversion added.

Adam on the attention's parameters alone, on the calibration images without labels; nothing that was carried over
changes. The loss is KL(source || converted) of the predictions, or for a model without classes the mean squared
difference of its outputs, relative to their variance.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.planning.plan import Plan
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.replace import added_parameters

RATE = 1e-3
_STEPS, _BATCH = 120, 64
_FEWEST_STEPS, _SMALLEST_BATCH = 20, 16
_MOST_MACS = 1.5e12
"""Most multiply-adds of all forward passes: a model of more takes fewer and smaller steps. Chosen, not measured."""


def polish(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    targets: Tensor,
    progress: Callable[[str, int, int], None],
) -> None:
    """Train a converted model's attention, in place and in evaluation mode.

    Larger models take fewer and smaller steps: see `_MOST_MACS`.

    Args:
        targets: the source's outputs on the fitting images, in their order.
    """
    batch = _BATCH if _STEPS * _BATCH * plan.macs_after <= _MOST_MACS else _SMALLEST_BATCH
    steps = max(_FEWEST_STEPS, min(_STEPS, int(_MOST_MACS / (batch * max(plan.macs_after, 1)))))

    names = {name for site in plan.sites for name in added_parameters(model, site)}
    parameters = [p for name, p in model.named_parameters() if name in names]
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    images = torch.cat(list(calibration.fitting()))
    for step, drawn in enumerate(_batches(len(images), steps, batch)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        loss = _distance(model(images[drawn]), targets[drawn], bool(getattr(model, "num_classes", 0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(f"polishing, divergence {loss.item():.3g}", step + 1, steps)
    for p in model.parameters():
        p.requires_grad_(wanted[id(p)])
        p.grad = None


def _distance(out: Tensor, target: Tensor, classes: bool) -> Tensor:
    if classes and out.ndim == 2:
        return F.kl_div(out.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
    return F.mse_loss(out, target) / target.var().clamp_min(1e-12)


def _batches(images: int, steps: int, batch: int) -> Iterator[Tensor]:
    """Indices of each step's images: every image once before any comes again."""
    generator = torch.Generator().manual_seed(0)
    order = torch.empty(0, dtype=torch.long)
    size = min(batch, images)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(images, generator=generator)
        drawn, order = order[:size], order[size:]
        yield drawn
