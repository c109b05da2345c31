"""A converted model as a graph made for inference: few nodes, and constants where training has parameters.

Attention layers become `InferenceAA` and `InferenceAW`, which compute the same: for images of one size, with what
depends on the size laid out in advance, or for images of any, with it computed in the graph. A batch
normalisation that follows one is folded into its weights, and the order of AA's channels into the convolution that
reads them, where there is one.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

from augment_cli.analysis.graph import analyze
from augment_cli.analysis.site import Size
from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.layers.aa.pooling import average_pool
from augment_cli.layers.aa.relative import by_position

_ALIKE = (
    nn.Identity,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.ELU,
    nn.LeakyReLU,
    nn.Dropout,
    nn.Dropout2d,
)
"""Modules that do the same to every channel."""


@dataclass(frozen=True)
class Affine:
    """Scale and shift of every channel. Shapes: (channels,) each."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, norm: nn.BatchNorm2d | None, layer: AAConv2d | AWConv2d) -> "Affine":
        """A batch normalisation in evaluation mode; for None the identity on a layer's channels."""
        if norm is None:
            like = next(layer.parameters()).new_ones(layer.out_channels)
            return cls(like, torch.zeros_like(like))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
        shift = (0 if norm.bias is None else norm.bias.detach()) - norm.running_mean * scale
        return cls(scale, shift)

    def __getitem__(self, chosen: Tensor | slice) -> "Affine":
        return Affine(self.scale[chosen], self.shift[chosen])

    def after(self, conv: nn.Conv2d) -> nn.Conv2d:
        """A copy of a convolution that computes this of its outputs."""
        made = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            stride=_pair(conv.stride),
            padding=conv.padding if isinstance(conv.padding, str) else _pair(conv.padding),
            dilation=_pair(conv.dilation),
            groups=conv.groups,
        )
        made.weight.data = conv.weight.detach() * self.scale.view(-1, 1, 1, 1)
        made.bias = nn.Parameter(self.shift if conv.bias is None else self.shift + conv.bias.detach() * self.scale)
        return made


class InferenceAA(nn.Module):
    """An AA convolution; its channels come out as the concatenation has them.

    Weights of queries, keys and values are grouped by head, queries scaled, and tables laid out by positions. Logits
    are keys x queries: sums of them run along contiguous memory, and the result is channels first. The largest logit of
    a query is found from the largest of each column of keys, which spares a pass over all logits.

    Args:
        layer: the layer, in evaluation mode.
        sizes: (height, width) of its input and output maps.
        affine: of its output channels, in the layer's own order.
        any_size: for maps of other sizes too.
    """

    rel_height: Tensor
    rel_width: Tensor

    def __init__(self, layer: AAConv2d, sizes: tuple[Size, Size], affine: Affine, any_size: bool = False) -> None:
        super().__init__()
        self.heads, self.value_channels, self.pool = layer.heads, layer.value_channels, layer.attention_pool
        self.split = [layer.key_channels // layer.heads] * 2 + [layer.value_channels // layer.heads]
        self.any_size = any_size
        count = layer.out_channels - layer.value_channels
        affine = affine if layer.channel_order is None else affine[layer.channel_order.argsort()]
        self.conv = None if layer.conv is None else _convolution(layer.conv, sizes[0], affine[:count], any_size)
        self.qkv, self.proj = _by_head(layer), affine[count:].after(layer.proj)
        for name, side in zip(("rel_height", "rel_width"), sizes[1], strict=True):
            table = getattr(layer, name).detach()
            laid_out = by_position(table, math.ceil(side / self.pool)).contiguous()
            self.register_buffer(name, table if any_size else laid_out)
        self.border, self.stride = layer.border, layer.stride

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, in_channels, H, W) to (N, out_channels, H', W')."""
        top, left = self.border
        inner = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left] if top or left else x
        inner = inner if self.stride == (1, 1) else average_pool(inner, self.stride)
        out: Tensor = self.proj(self.attended(inner if self.pool == 1 else average_pool(inner, (self.pool, self.pool))))
        if self.pool > 1:
            out = self.enlarged(out, inner.shape[-2:])
        return out if self.conv is None else torch.cat([self.conv(x), out], dim=1)

    def attended(self, x: Tensor) -> Tensor:
        """Shapes: x (N, in_channels, H, W) to (N, value_channels, H, W)."""
        height, width = x.shape[-2:]
        q, k, v = self.qkv(x).view(-1, sum(self.split), height * width).split(self.split, dim=1)  # N heads, d, HW
        rows, columns = self.relative_logits(q.view(-1, self.split[0], height, width))
        logits = (k.transpose(1, 2) @ q).view(-1, height, width, height * width) + rows
        peaks = (logits.amax(1, keepdim=True) + columns).amax(2, keepdim=True)  # N heads, 1, 1, HW
        weights = (logits + (columns - peaks)).exp().view(-1, height * width, height * width)
        out = (v @ weights) / weights.sum(1, keepdim=True)
        return out.view(-1, self.value_channels, height, width)

    def relative_logits(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The products of every query with its two tables, for each row and each column of the keys.

        Shapes: q (N heads, d, H, W) to (N heads, H, 1, HW) and (N heads, 1, W, HW).
        """
        d, height, width = q.shape[1:]
        by_row, by_column = self.rel_height, self.rel_width
        if self.any_size:
            by_row, by_column = _gathered(by_row, height), _gathered(by_column, width)
        lines = q.permute(2, 1, 0, 3).reshape(height, d, -1)  # one product by row, over all heads at once
        rows = (by_row @ lines).view(height, height, -1, width).permute(2, 1, 0, 3)
        columns = (by_column @ q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return rows.reshape(-1, height, 1, height * width), columns.reshape(-1, 1, width, height * width)

    def enlarged(self, out: Tensor, size: torch.Size) -> Tensor:
        """The attention's result at the output's size; a factor, where it is known, takes fewer nodes than sizes do."""
        if not self.any_size and size == out.shape[-2:]:
            return out
        if not self.any_size and size == torch.Size(side * self.pool for side in out.shape[-2:]):
            return F.interpolate(out, scale_factor=float(self.pool), mode="bilinear", align_corners=False)
        return F.interpolate(out, size=size, mode="bilinear", align_corners=False)


class InferenceAW(nn.Module):
    """An AW convolution.

    With K the static kernel, A2[c, t] the scale of input channel c at tap t, which r channels share, and s the weights
    of `expand`, a sample's kernel and output are

        W[o, c, t] = K[o, c, t] (1 + s[o, c] A2[c, t])
        out[o] = sum over c and t of  W[o, c, t] I[c] shifted by t

    A depthwise convolution makes the shifted inputs, and one product for each sample takes the sum: the batch may have
    any size. A convolution with a kernel for each sample needs its batch in `groups`, which a file holds as a constant.

    Args:
        layer: the layer, in evaluation mode.
        size: (height, width) of its input map.
        affine: of its output channels.
        any_size: for maps of other sizes too; with padding as TensorFlow's, those that leave the same rest by the
            stride.
    """

    rows: Tensor
    columns: Tensor
    kernel: Tensor
    own: Tensor
    shift: Tensor

    def __init__(self, layer: AWConv2d, size: Size, affine: Affine, any_size: bool = False) -> None:
        super().__init__()
        hidden, maps, taps = layer.expand.groups, layer.maps, math.prod(layer.kernel_size)
        self.any_size, self.kernel_size = any_size, layer.kernel_size
        self.pad = _same_padding(layer, size) if layer.same_pad else None
        kernel, inputs, self.groups = layer.static_kernel().detach(), layer.in_channels, layer.groups
        options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.shifted = nn.Conv2d(inputs, inputs * taps, layer.kernel_size, groups=inputs, bias=False, **options)
        self.shifted.weight.data = torch.eye(taps).view(taps, 1, *layer.kernel_size).repeat(inputs, 1, 1, 1).to(kernel)

        kernel = kernel * affine.scale.view(-1, 1, 1, 1)
        own = layer.expand.weight.detach().view(hidden // maps, maps, -1).transpose(1, 2)  # ..., a
        bias = affine.shift if layer.bias is None else affine.shift + layer.bias.detach() * affine.scale
        shape = (1, self.groups, layer.out_channels // self.groups, maps, -1)
        for name, value in (("kernel", kernel), ("own", own), ("shift", bias)):
            self.register_buffer(name, value.reshape(shape if name != "shift" else (*shape[:3], 1)))

        self.reduce, self.mix = layer.reduce, nn.Conv2d(hidden, inputs, 1, bias=False)
        self.mix.weight.data = layer.mix.weight.detach().repeat_interleave(inputs // hidden, 0)
        rows, columns = (
            F.adaptive_avg_pool1d(torch.eye(side).to(kernel), count)  # side, count
            for side, count in zip(size, layer.kernel_size, strict=True)
        )
        self.register_buffer("rows", rows.T.contiguous())
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, C1, H, W) to (N, C2, H', W'); kernels (N, groups, C2 / groups, C1 / groups, taps)."""
        rows, columns = self.rows, self.columns
        if self.any_size:
            height, width = x.shape[-2:]
            rows, columns = _means(height, self.kernel_size[0], rows), _means(width, self.kernel_size[1], rows).T
        pooled = rows @ (x @ columns)  # N, C1, h, w
        scales = F.relu(self.mix(F.relu(self.reduce(pooled)))).view(-1, self.groups, 1, *self.kernel.shape[3:])
        shifted = self.shifted(x if self.pad is None else F.pad(x, self.pad))
        height, width = shifted.shape[-2:]
        values = shifted.view(-1, self.groups, math.prod(self.kernel.shape[3:]), height * width)
        out = (self.kernel * (self.own * scales + 1)).flatten(3) @ values + self.shift
        return out.view(-1, self.groups * out.shape[2], height, width)


def _gathered(table: Tensor, size: int) -> Tensor:
    """`by_position` by operations that runtimes have. Shapes: table (2 S - 1, d) to (size, size, d)."""
    resized = F.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear", align_corners=True)
    places = torch.arange(size)
    offsets = places - places.unsqueeze(1) + (size - 1)
    return resized.squeeze(0).t().index_select(0, offsets.flatten()).view(size, size, -1)


def _means(size: int, count: int, like: Tensor) -> Tensor:
    """The matrix of adaptive average pooling along an axis, whose windows overlap. Shapes: (count, size)."""
    places, windows = torch.arange(size), torch.arange(count).unsqueeze(1)
    starts, ends = windows * size // count, ((windows + 1) * size + count - 1) // count
    inside = ((places >= starts) & (places < ends)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def for_inference(model: nn.Module, input_size: tuple[int, int, int], any_size: bool = False) -> fx.GraphModule:
    """A copy of a model that computes the same in evaluation mode, for batches of any size.

    Args:
        input_size: (channels, height, width) of the images.
        any_size: for images of other sizes too, in multiples of `total_stride`.

    Raises:
        AugmentError: the model cannot be traced, or does not run on images of this size.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    graph = analyze(model, input_size)
    made = fx.GraphModule(model, graph.graph)
    for name, value in graph.constants.items():
        setattr(made, name, value)
    for node in list(made.graph.nodes):
        layer = _module(made, node)
        if isinstance(layer, (AAConv2d, AWConv2d)):
            before, after = (graph.shapes[n.name][-2:] for n in (node.all_input_nodes[0], node))
            _replace(made, node, layer, (before, after), any_size)
    made.graph.lint()
    made.recompile()
    return made


def total_stride(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """How many times smaller than the image a model's smallest map is, as a power of two; maps of 1x1 do not count."""
    results = analyze(model, input_size).shapes.values()
    parts = [part for result in results for part in (result if isinstance(result, (tuple, list)) else ())]
    sides = [shape[2] for shape in (*results, *parts) if _is_map(shape) and min(shape[2:]) > 1]
    return 2 ** math.ceil(math.log2(max(1.0, input_size[1] / min(sides, default=input_size[1]))))


def _is_map(shape: Any) -> bool:
    return isinstance(shape, tuple) and len(shape) == 4 and all(isinstance(side, int) for side in shape)


def _replace(
    made: fx.GraphModule, node: fx.Node, layer: AAConv2d | AWConv2d, sizes: tuple[Size, Size], any_size: bool
) -> None:
    user = _only_user(node)
    norm = None if user is None else _module(made, user)
    folded = norm if isinstance(norm, nn.BatchNorm2d) and _foldable(norm, layer) else None
    affine = Affine.of(folded, layer)
    if user is not None and folded is not None:
        rest = nn.Sequential(folded.drop, folded.act) if isinstance(folded, BatchNormAct2d) else nn.Identity()
        made.set_submodule(str(user.target), rest)
    if isinstance(layer, AWConv2d):
        made.set_submodule(str(node.target), InferenceAW(layer, sizes[0], affine, any_size))
        return
    made.set_submodule(str(node.target), InferenceAA(layer, sizes, affine, any_size))
    if layer.channel_order is not None:
        _keep_order(made, node, layer.channel_order)


def _keep_order(made: fx.GraphModule, node: fx.Node, order: Tensor) -> None:
    """Let a node's channels, which come in another order, be read rightly: channel c was channel order[c]."""
    if readers := _readers(made, node):
        for reader in readers:
            reader.weight.data = reader.weight.detach()[:, order.argsort()].contiguous()
        return
    name = f"{str(node.target).replace('.', '_')}_order"
    made.register_buffer(name, order)
    with made.graph.inserting_after(node):
        constant = made.graph.get_attr(name)
    with made.graph.inserting_after(constant):
        permuted = made.graph.call_function(torch.index_select, (node, 1, constant))
    node.replace_all_uses_with(permuted, lambda user: user is not permuted)


def _readers(made: fx.GraphModule, node: fx.Node) -> list[nn.Conv2d]:
    """The dense convolutions of the one module that reads a node, with nothing between but what treats channels alike.

    A plain convolution, or an AA layer that is still to be replaced, whose two convolutions read the same.
    """
    while (user := _only_user(node)) is not None:
        module = _module(made, user)
        if module is None:
            return []
        if isinstance(module, AAConv2d):
            convs = [conv for conv in (module.conv, module.qkv) if conv is not None]
            return convs if all(_is_dense(conv) for conv in convs) else []
        if isinstance(module, nn.Conv2d):
            return [module] if _is_dense(module) else []
        if not all(isinstance(m, _ALIKE) for m in module.modules() if type(m) is not nn.Sequential):
            return []
        node = user
    return []


def _is_dense(conv: nn.Conv2d) -> bool:
    return type(conv) is nn.Conv2d and conv.groups == 1


def _module(made: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return made.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _foldable(norm: nn.BatchNorm2d, layer: AAConv2d | AWConv2d) -> bool:
    """Whether a normalisation has statistics of its own, and is called once after a convolution that can take them."""
    conv = layer.conv if isinstance(layer, AAConv2d) else None
    known = conv is None or type(conv) is nn.Conv2d or isinstance(conv, AWConv2d)
    return known and type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and norm.running_mean is not None


def _convolution(conv: nn.Conv2d, size: Size, affine: Affine, any_size: bool) -> nn.Module:
    """The convolution branch, with its outputs scaled and shifted; other classes than torch's stay, and are not."""
    if isinstance(conv, AWConv2d):
        return InferenceAW(conv, size, affine, any_size)
    return affine.after(conv) if type(conv) is nn.Conv2d else conv


def _by_head(layer: AAConv2d) -> nn.Conv2d:
    """The projection to queries, keys and values, its channels (heads, q then k then v), queries scaled by d^(-1/2)."""
    counts = [layer.key_channels] * 2 + [layer.value_channels]
    scales = [(layer.key_channels // layer.heads) ** -0.5, 1.0, 1.0]
    made = nn.Conv2d(layer.in_channels, sum(counts), 1, bias=layer.qkv.bias is not None)

    def grouped(tensor: Tensor) -> Tensor:
        parts = zip(tensor.detach().split(counts), scales, strict=True)
        return torch.cat([(part * scale).unflatten(0, (layer.heads, -1)) for part, scale in parts], dim=1).flatten(0, 1)

    made.weight.data = grouped(layer.qkv.weight)
    if layer.qkv.bias is not None and made.bias is not None:
        made.bias.data = grouped(layer.qkv.bias)
    return made


def _same_padding(layer: AWConv2d, size: Size) -> list[int]:
    """TensorFlow's padding of a map: left, right, top, bottom."""
    found: list[int] = []
    for side, kernel, stride, dilation in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max((-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side, 0)
        found = [total // 2, total - total // 2, *found]
    return found


def _pair(sides: tuple[int, ...]) -> Size:
    height, width = sides
    return height, width
