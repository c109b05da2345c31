"""Scale keys and relative tables so that attention maps depend on the content from the start.

Behind most normalisations, whose outputs are small, a freshly initialised layer attends almost evenly. Even attention
is global pooling: its output says little about the content. So the keys of each head and the tables of a layer are
scaled until a query's logits have a standard deviation over the keys of `content` and `position`, on average. [ours]
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from augment_cli.layers import AAConv2d
from augment_cli.layers.aa.relative import relative_logits
from augment_cli.surgery.inherit.calls import recorded

CONTENT, POSITION = 2.0, 1.0


@torch.no_grad()
def spread(
    model: nn.Module,
    layers: Mapping[str, AAConv2d],
    images: Tensor,
    content: float = CONTENT,
    position: float = POSITION,
) -> None:
    """Scale the keys and tables of layers, in place, by the input that each gets from images (n, C, H, W)."""
    with recorded(model, layers) as calls:
        model(images)
    for name, layer in layers.items():
        x, _ = calls.pop(name)[-1]
        seen = layer.pool_for_attention(layer.reduce_to_output(x))
        own, relative = deviations(layer, seen)
        keys = layer.qkv.weight[layer.key_channels : 2 * layer.key_channels].unflatten(0, (layer.heads, -1))
        keys *= (content / own.clamp_min(1e-6)).clamp_max(1e3).view(-1, 1, 1, 1, 1)
        for table in (layer.rel_height, layer.rel_width):
            table *= min(position / max(float(relative.mean()), 1e-6), 1e3)


def deviations(layer: AAConv2d, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation of the content's and of the positions' logits over the keys of a query, by head.

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
