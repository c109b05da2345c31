"""Value and output projections of attention heads, in closed form from moments.

Head h sees A_h X: every position's average of the input X under the head's attention map. It contributes O_h V_h A_h X,
with V_h its value projection (rank x in_channels) and O_h its columns of W^O. With the maps given, O and V are a
reduced-rank ridge regression, head after head on what the other heads leave over: the full-rank solution B of a head is
projected on the leading `rank` eigenvectors U of B C B^T, C its features' second moments; then O_h = U and V_h = U^T B.
Every sweep over the heads brings U nearer by two power iterations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from augment_cli.surgery.inherit.moments import Covariance

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_SWEEPS, _POWERS = 4, 2


@dataclass(frozen=True)
class Heads:
    """Projections of all heads: `out` (targets, heads, rank), `value` (heads, rank, in_channels)."""

    out: Tensor
    value: Tensor

    def errors(self, moments: Covariance) -> Tensor:
        """Mean squared error of each target. Shape: (targets,)."""
        value, out = torch.block_diag(*self.value), self.out.flatten(1)
        features = moments.yy.flatten(0, 1).flatten(1)
        zz = value @ features @ value.T
        return moments.tt.diagonal() + ((out @ zz - 2 * moments.ty.flatten(1) @ value.T) * out).sum(1)

    def predict(self, features: Tensor) -> Tensor:
        """The heads' sum for features (heads, in_channels). Shape: (targets,)."""
        return torch.einsum("thr,hrc,hc->t", self.out, self.value, features)


def fit_heads(moments: Covariance, rank: int, ridge: float, sweeps: int = _SWEEPS) -> Heads:
    """Projections from moments of the heads' features and the targets.

    Args:
        rank: value channels of a head.
        ridge: penalty, as a share of the mean second moment of the features.
    """
    yy, ty = moments.yy, moments.ty
    heads, channels = yy.shape[:2]
    own = torch.stack([yy[h, :, h] for h in range(heads)])  # heads, channels, channels
    penalty = ridge * own.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-12)
    factors = torch.linalg.cholesky(own + penalty * torch.eye(channels, dtype=own.dtype))
    out = torch.randn(heads, len(ty), rank, dtype=ty.dtype, generator=torch.Generator().manual_seed(0))
    value = ty.new_zeros(heads, rank, channels)
    seen = ty.new_zeros(heads, rank, heads, channels)  # V_g E[(A_g X)(A_h X)^T]
    for _ in range(sweeps):
        for h in range(heads):
            seen[h] = 0
            left = ty[:, h] - out.movedim(1, 0).flatten(1) @ seen[:, :, h].flatten(0, 1)
            full = torch.cholesky_solve(left.T, factors[h]).T
            for _ in range(_POWERS):
                out[h] = torch.linalg.qr(full @ (own[h] @ (full.T @ out[h]))).Q
            value[h] = out[h].T @ full
            seen[h] = (value[h] @ yy[h].flatten(1)).unflatten(1, (heads, channels))
    return Heads(out.transpose(0, 1), value)


def choose_ridge(fitted: Covariance, unseen: Covariance, rank: int) -> float:
    """The ridge under which projections fitted to one half of the data err least on the other."""
    errors = {ridge: float(fit_heads(fitted, rank, ridge, sweeps=1).errors(unseen).sum()) for ridge in RIDGES}
    return min(errors, key=errors.__getitem__)
