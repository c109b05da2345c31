"""Second moments of features and targets, summed batch by batch: all that a linear fit has to know of its data."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """Moments of features y and targets t.

    `yy` (heads, channels, heads, channels), `ty` (targets, heads, channels), `tt` (targets, targets).
    """

    yy: Tensor
    ty: Tensor
    tt: Tensor

    def targets(self, chosen: Tensor, scale: Tensor) -> "Covariance":
        """The same of some of the targets, each multiplied by its entry of `scale` (chosen,)."""
        ty = self.ty[chosen] * scale.view(-1, 1, 1)
        return Covariance(self.yy, ty, self.tt[chosen][:, chosen] * scale.view(-1, 1) * scale)


class Moments:
    """Streaming sums over positions, about an origin: the means of the first batch.

    Products of a batch are taken in single precision, and sums kept in double: about an origin that is near the means,
    little is lost where these are large beside the deviations from them.

    Args:
        like: sums that these are to be added to: they take that origin.
    """

    def __init__(self, like: "Moments | None" = None) -> None:
        self.count = 0
        self.sums: list[Tensor] = []
        self.origin: tuple[Tensor, Tensor] | None = like.origin if like else None
        self.shape = torch.Size()

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Shapes: features (positions, heads, channels), targets (positions, targets)."""
        y, t = features.flatten(1), targets
        self.shape = features.shape[1:]
        origin = self.origin = self.origin or (y.mean(0), t.mean(0))
        y, t = y - origin[0], t - origin[1]
        products = (y.T @ y, t.T @ y, t.T @ t, y.sum(0), t.sum(0))
        if not self.count:
            self.sums = [torch.zeros_like(product, dtype=torch.float64) for product in products]
        for total, product in zip(self.sums, products, strict=True):
            total += product
        self.count += len(y)

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(like=self)
        both.count, both.shape = self.count + other.count, self.shape
        both.sums = [mine + theirs for mine, theirs in zip(self.sums, other.sums, strict=True)]
        return both

    def covariance(self, centred: bool) -> Covariance:
        """Averages over the positions; `centred` about the means, for a fit with an intercept."""
        yy, ty, tt, y, t = (total / self.count for total in self.sums)
        yy, ty, tt = yy - y.outer(y), ty - t.outer(y), tt - t.outer(t)
        if not centred and self.origin is not None:
            y, t = y + self.origin[0], t + self.origin[1]
            yy, ty, tt = yy + y.outer(y), ty + t.outer(y), tt + t.outer(t)
        heads, channels = self.shape
        yy, ty, tt = yy.float(), ty.float(), tt.float()
        return Covariance(yy.view(heads, channels, heads, channels), ty.view(-1, heads, channels), tt)

    def means(self) -> tuple[Tensor, Tensor]:
        """Means of the features (heads, channels) and of the targets (targets,)."""
        y, t = ((total / self.count) for total in self.sums[3:])
        if self.origin is not None:
            y, t = y + self.origin[0], t + self.origin[1]
        y, t = y.float(), t.float()
        return y.view(self.shape), t
