"""How much a model's answer depends on each channel of its convolutions.

To second order, a change d of a convolution's output moves a classifier's probabilities by KL = 1/2 d F d, with F the
Fisher information: the covariance of the gradient g of -log p(y), y drawn from the model's own probabilities. Of F only
the diagonal is used, averaged over images and positions: an error e in channel c costs E[g_c^2] E[e^2].
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.surgery.inherit.calls import recorded

_IMAGES, _BATCH = 128, 8


def fisher_roots(model: nn.Module, names: Iterable[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The root of E[g_c^2] of every channel of the named convolutions, on the first images of `batches`.

    A model that has no classes is taken for what its squared output says: g is the gradient of its output times random
    signs. Shape of each: (out_channels,).
    """
    generator = torch.Generator().manual_seed(0)
    names = list(names)
    widths = {name: int(model.get_parameter(f"{name}.weight").shape[0]) for name in names}
    sums = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}
    for batch in _first(batches):
        with recorded(model, names) as calls, torch.enable_grad():
            loss = _drawn_loss(model(batch.requires_grad_()), getattr(model, "num_classes", 0), generator)
        owners, outputs = zip(*((name, out) for name, made in calls.items() for _, out in made), strict=True)
        for name, gradient in zip(owners, torch.autograd.grad(loss, outputs, allow_unused=True), strict=True):
            if gradient is not None:
                sums[name] += gradient.double().square().sum((0, 2, 3)).cpu()
    return {name: _usable(total.sqrt().float()) for name, total in sums.items()}


def _first(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    count = 0
    for batch in batches:
        for part in batch[: _IMAGES - count].split(_BATCH):
            yield part.clone()
        count += len(batch)
        if count >= _IMAGES:
            return


def _drawn_loss(answer: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    if classes and answer.ndim == 2:
        # What is not finite is found at the first site, which can be named.
        probabilities = answer.detach().float().softmax(1).cpu().nan_to_num(1.0)
        drawn = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        return F.cross_entropy(answer, drawn.to(answer.device), reduction="sum")
    signs = torch.randint(0, 2, answer.shape, generator=generator) * 2 - 1
    return (answer * signs.to(answer)).sum()


def _usable(roots: Tensor) -> Tensor:
    """Relative to their mean; a channel that nothing depends on still has to be fitted somehow."""
    mean = roots.mean()
    return (roots / mean).clamp_min(1e-3) if mean > 0 and mean.isfinite() else torch.ones_like(roots)
