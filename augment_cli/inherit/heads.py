"""What attention heads can compute of a convolution's outputs, in closed form from moments.

Head h sees A_h X: every position's average of the input X under the head's pattern, and contributes O_h V_h A_h X, with
V_h its value projection (rank x in_channels) and O_h its columns of W^O. Two linear problems alternate:

- patterns given, O and V are a reduced-rank ridge regression, head after head on what the other heads leave over: the
  full-rank solution B of a head is projected on the leading `rank` eigenvectors U of B C B^T, C its features' second
  moments; then O_h = U and V_h = U^T B. Every sweep over the heads brings U nearer by two power iterations;
- O and V given, patterns over a window of taps are a least-squares problem with as many unknowns as taps. A pattern is
  a product of non-negative weights for rows and for columns, since the logits of relative positions are a sum
  S_H + S_W and the weights of a softmax are positive; rows and columns are solved for in turn.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import nnls
from torch import Tensor

from augment_cli.inherit.moments import Covariance

Window = tuple[int, int]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
_SWEEPS, _TURNS, _POWERS = 4, 3, 2


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


def fit_heads(moments: Covariance, rank: int, ridge: float, sweeps: int = _SWEEPS) -> Heads:
    """Projections for given patterns: `moments` are of the heads' features, a slot for each head.

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


def fit_patterns(moments: Covariance, patterns: Tensor, heads: Heads, window: Window) -> Tensor:
    """Better patterns (heads, taps) for given projections, from the last ones; `moments` are of the window's taps."""
    seen = torch.einsum("hrc,kcld->hrkld", heads.value, moments.yy)
    seen = torch.einsum("hrkld,gsd->hrkgls", seen, heads.value)
    mixed = torch.einsum("fhr,fgs->hrgs", heads.out, heads.out)
    gram = torch.einsum("hrkgls,hrgs->hkgl", seen, mixed).double()
    right = torch.einsum("fhr,fkc->hrkc", heads.out, moments.ty)
    right = torch.einsum("hrkc,hrc->hk", right, heads.value).double()
    patterns = patterns.clone()
    for _ in range(_TURNS):
        for h in range(len(patterns)):
            others = torch.einsum("kgl,gl->k", gram[h], patterns) - gram[h, :, h] @ patterns[h]
            patterns[h] = _separable(gram[h, :, h], right[h] - others, patterns[h], window)
    return patterns


def _separable(gram: Tensor, right: Tensor, pattern: Tensor, window: Window) -> Tensor:
    """The non-negative rows x columns that minimises p G p - 2 p r, from the last one on; its sum is made 1."""
    gram, right = gram.view(*window, *window), right.view(window)
    rows, columns = (pattern.view(window).sum(axis) for axis in (1, 0))
    for _ in range(_TURNS):
        rows = _non_negative(torch.einsum("ikjl,k,l->ij", gram, columns, columns), right @ columns)
        columns = _non_negative(torch.einsum("ikjl,i,j->kl", gram, rows, rows), rows @ right)
    solved = torch.outer(rows, columns).flatten()
    return solved / solved.sum() if solved.sum() > 0 else pattern


def _non_negative(gram: Tensor, right: Tensor) -> Tensor:
    """The x >= 0 that minimises x G x - 2 x r."""
    factor, failed = torch.linalg.cholesky_ex(gram + 1e-9 * gram.trace() * torch.eye(len(gram), dtype=gram.dtype))
    if failed:
        return torch.zeros_like(right)
    target = torch.linalg.solve_triangular(factor, right.unsqueeze(1), upper=False).squeeze(1)
    return torch.from_numpy(nnls(factor.T.numpy(), target.numpy())[0])


def first_patterns(heads: int, window: Window) -> Tensor:
    """Heads on one tap each, from the centre outwards. Shape: (heads, taps)."""
    height, width = window
    taps = [(abs(y - height // 2) + abs(x - width // 2), y * width + x) for y in range(height) for x in range(width)]
    patterns = torch.full((heads, len(taps)), 1e-3, dtype=torch.float64)
    for h in range(heads):
        patterns[h, sorted(taps)[h % len(taps)][1]] = 1
    return patterns / patterns.sum(1, keepdim=True)


def alternate(
    moments: Covariance, patterns: Tensor, window: Window, rank: int, ridge: float, rounds: int, sweeps: int = _SWEEPS
) -> tuple[Tensor, Heads]:
    """Patterns and projections in turn, from `patterns` on."""
    heads = fit_heads(moments.mixed(patterns), rank, ridge, sweeps)
    for _ in range(rounds):
        patterns = fit_patterns(moments, patterns, heads, window)
        heads = fit_heads(moments.mixed(patterns), rank, ridge, sweeps)
    return patterns, heads


def choose_ridge(fitted: Covariance, unseen: Covariance, rank: int) -> float:
    """The ridge under which projections fitted to one half of the data err least on the other."""
    errors = {ridge: float(fit_heads(fitted, rank, ridge, sweeps=1).errors(unseen).sum()) for ridge in RIDGES}
    return min(errors, key=errors.get)
