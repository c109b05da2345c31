"""Queries, keys and relative tables whose attention maps depend on the content from the start. [ours]

A freshly initialised layer attends almost evenly behind most normalisations, whose outputs are small. Even attention is
global pooling, which says little about the content. So, before the projections are fitted:

1. Queries and keys read whitened content: every direction in which positions differ counts alike, so that rare contents
   stand out, and the mean, which all positions share, counts nothing.
2. Keys are made similar to queries, so that a position attends to positions whose content is like its own, as trained
   transformers do (mimetic initialisation, arXiv 2305.09828), and still to others.
3. Queries and keys of each head are scaled alike, and the tables of a layer, until a query's logits have a standard
   deviation over the keys of `content` and `position`, on average. Scaled alike, both turn at one rate in training.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from augment_cli.layers import AAConv2d
from augment_cli.layers.aa.relative import relative_logits
from augment_cli.surgery.inherit.calls import recorded
from augment_cli.surgery.inherit.sampling import check_finite

CONTENT, POSITION = 4.0, 0.3
SIMILARITY = 0.7
"""Correlation of the weights of keys with those of queries. docs/fitting.md lists the values tried, on one task."""
_SHRINKAGE = 0.05
"""Added to every variance, as a share of the mean variance: contents that hardly vary are not blown up."""
_MOST = 1e3
"""Largest factor of a logit, for inputs that are constant."""


@torch.no_grad()
def spread(
    model: nn.Module,
    layers: Mapping[str, AAConv2d],
    images: Tensor,
    content: float = CONTENT,
    position: float = POSITION,
    similarity: float = SIMILARITY,
) -> None:
    """Whiten and scale freshly initialised layers, in place, by the input that each gets from images (n, C, H, W).

    Args:
        content: standard deviation over the keys of a query's content logits.
        position: the same for its relative logits.
        similarity: correlation of the weights of keys with those of queries, 0 to 1.

    Raises:
        AugmentError: activations are not finite.
    """
    with recorded(model, layers) as calls:
        model(images)
    for name, layer in layers.items():
        x, computed = calls.pop(name)[-1]
        check_finite(name, x, computed)
        seen = layer.pool_for_attention(layer.reduce_to_output(x))
        both = layer.qkv.weight[: 2 * layer.key_channels]
        both.copy_((both.flatten(1) @ whitening(seen)).view_as(both))
        query, key = both.chunk(2)
        key.copy_(similarity * query + (1 - similarity**2) ** 0.5 * key)
        own, relative = deviations(layer, seen)
        factor = (content / own.clamp_min(1e-6)).clamp_max(_MOST).sqrt()
        both *= factor.repeat_interleave(len(both) // 2 // layer.heads).repeat(2).view(-1, 1, 1, 1)
        for table in (layer.rel_height, layer.rel_width):
            table.mul_(min(position / max(float((relative * factor).mean()), 1e-6), _MOST))


def whitening(seen: Tensor) -> Tensor:
    """Matrix that sends the mean over all positions to zero and evens out the variances of all directions.

    Shape: seen (N, in_channels, h, w); result (in_channels, in_channels), of the identity's Frobenius norm.
    """
    x = seen.movedim(1, -1).flatten(0, 2).double()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    identity = torch.eye(len(mean), dtype=x.dtype, device=x.device)
    values, vectors = torch.linalg.eigh(
        covariance + _SHRINKAGE * covariance.trace().clamp_min(1e-12) / len(mean) * identity
    )
    white = vectors * values.rsqrt() @ vectors.T
    white = white @ (identity - mean.outer(mean) / mean.dot(mean).clamp_min(1e-12))
    return (white * (len(mean) ** 0.5 / white.norm().clamp_min(1e-12))).to(seen)


def deviations(layer: AAConv2d, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations of the content's and of the positions' logits over the keys of a query, by head.

    Shapes: seen (N, in_channels, h, w); result (heads,) each.
    """
    query, key, _ = layer.qkv(seen).split([layer.key_channels, layer.key_channels, layer.value_channels], dim=1)
    query, key = (t.unflatten(1, (layer.heads, -1)).movedim(2, -1) for t in (query, key))  # N, heads, h, w, d
    query = query * query.shape[-1] ** -0.5
    key = key.flatten(2, 3) - key.flatten(2, 3).mean(2, keepdim=True)
    covariance = key.transpose(2, 3) @ key / key.shape[2]  # N, heads, d, d
    flat = query.flatten(2, 3)
    own = ((flat @ covariance) * flat).sum(-1).mean((0, 2)).sqrt()
    rows, columns = relative_logits(query, layer.rel_height, layer.rel_width)
    relative = (rows.var(-1, correction=0) + columns.var(-1, correction=0)).mean((0, 2, 3)).sqrt()
    return own, relative
