"""Apply a plan to a model: the chosen convolutions are replaced in the module tree, in place.

What this does not do: it does not wrap the model, replace its forward or turn it into a GraphModule. The graph serves
to find the sites before and to prove the result after.
"""

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from augment_cli.analysis.graph import ModelGraph, conv_padding, meta_copy, propagate_shapes
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d, AWConv2d, ScaledStandardize, Standardize
from augment_cli.planning.plan import Plan, SitePlan

# What timm calls to fold branches and normalisations into plain convolutions.
_FOLDING = ("fuse", "reparameterize", "switch_to_deploy")


class KeepFilters(Protocol):
    """Names the filters that an augmented convolution keeps: `count` indices, ascending, as many of every group."""

    def __call__(self, name: str, conv: nn.Conv2d, count: int) -> list[int]: ...


def keep_first(name: str, conv: nn.Conv2d, count: int) -> list[int]:
    """The first of every group: attention takes the place of the last output channels, as in the AA paper."""
    return keep_highest(range(conv.out_channels, 0, -1), conv, count)


def keep_highest(scores: Sequence[float], conv: nn.Conv2d, count: int) -> list[int]:
    """The filters of the highest scores, as many of every group; among equals the first."""
    outputs, kept = conv.out_channels // conv.groups, []
    for first in range(0, conv.out_channels, outputs):
        group = sorted(range(first, first + outputs), key=lambda i: -scores[i])
        kept += group[: count // conv.groups]
    return sorted(kept)


def apply_plan(model: nn.Module, plan: Plan, keep: KeepFilters = keep_first) -> None:
    """Replace the plan's sites in `model`.

    Kept filters, kernels and biases are the model's own tensors; what attention adds is freshly initialised.

    Raises:
        AugmentError: a site that the model does not have or has in another shape.
    """
    for site in plan.sites:
        conv = find_conv(model, site)
        model.set_submodule(site.name, replacement(conv, site, keep))
        keep_unfolded(model, site.name)


def keep_unfolded(model: nn.Module, name: str) -> None:
    """Let the blocks around a replaced convolution be when timm folds a model for inference, and say so.

    A folded block is one plain convolution, which `reparameterize_model` makes of the kernel alone: attention would be
    lost. The model's own method stays, since it only calls those of its parts.
    """
    parts = name.split(".")[:-1]
    for i in range(1, len(parts) + 1):
        block = model.get_submodule(".".join(parts[:i]))
        for method in _FOLDING:
            if hasattr(block, method):
                setattr(block, method, partial(_stay, block))


def _stay(block: nn.Module) -> nn.Module:
    warnings.warn(f"{type(block).__name__} stays as it is: no plain convolution computes its attention", stacklevel=2)
    return block


def find_conv(model: nn.Module, site: SitePlan) -> nn.Conv2d:
    try:
        conv = model.get_submodule(site.name)
    except AttributeError:
        conv = None
    if not isinstance(conv, nn.Conv2d):
        raise AugmentError(f"{type(model).__name__} has no convolution {site.name}")
    # Not the stride: a model created with another output_stride has others, and dilation, with the same weights.
    for key in ("in_channels", "out_channels", "kernel_size", "groups"):
        if getattr(conv, key) != getattr(site, key):
            raise AugmentError(f"{site.name} has {key} {getattr(conv, key)}, and {getattr(site, key)} in the plan")
    return conv


def replacement(conv: nn.Conv2d, site: SitePlan, keep: KeepFilters = keep_first) -> nn.Module:
    """What the plan puts in the place of a convolution."""
    filters = conv.out_channels - site.value_channels
    kept = keep(site.name, conv, filters) if site.value_channels else None
    branch = conv if kept is None else select_filters(conv, kept)
    if site.reduction:
        branch = attend_kernel(branch, site.reduction)
    new = branch if kept is None else augment(conv, branch, kept, site)
    return new.train(conv.training)


def added_parameters(model: nn.Module, site: SitePlan) -> list[str]:
    """Names of the parameters in a converted model that a site's source did not have."""
    module = model.get_submodule(site.name)
    return [f"{site.name}.{name}" for name, _ in module.named_parameters() if _is_added(module, name)]


def _is_added(module: nn.Module, name: str) -> bool:
    if isinstance(module, AAConv2d):
        branch, _, rest = name.partition(".")
        return branch != "conv" or (isinstance(module.conv, AWConv2d) and _is_added(module.conv, rest))
    return isinstance(module, AWConv2d) and name.partition(".")[0] not in ("weight", "bias", "standardize")


def select_filters(conv: nn.Conv2d, kept: list[int]) -> nn.Conv2d:
    """A convolution of the same class and behaviour with some of the filters: every parameter cut along dimension 0."""
    memo = {id(p): nn.Parameter(p.detach()[kept], p.requires_grad) for p in conv.parameters()}
    selected = copy.deepcopy(conv, memo)
    selected.out_channels = len(kept)
    return selected


def attend_kernel(conv: nn.Conv2d, reduction: int) -> AWConv2d:
    """AWConv2d on a convolution's own kernel, bias and weight standardisation."""
    new = AWConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        reduction=reduction,
        standardize=_standardization(conv),
        **_like(conv),
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new


def _like(conv: nn.Conv2d) -> dict[str, Any]:
    """What a replacement has in common with a convolution."""
    return {
        "stride": conv.stride,
        "padding": conv_padding(conv),
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "device": conv.weight.device,
        "dtype": conv.weight.dtype,
    }


def _standardization(conv: nn.Conv2d) -> Standardize | None:
    if hasattr(conv, "gain"):
        standardize = ScaledStandardize(conv.out_channels, conv.scale, conv.eps)
        standardize.gain = conv.gain
        return standardize
    return Standardize(conv.eps) if hasattr(conv, "eps") else None


def augment(conv: nn.Conv2d, branch: nn.Conv2d, kept: list[int], site: SitePlan) -> AAConv2d:
    """AAConv2d around a convolution branch, its output channels in the source's order."""
    new = AAConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        heads=site.heads,
        key_channels=site.key_channels,
        value_channels=site.value_channels,
        resolution=site.resolution,
        attention_pool=site.attention_pool,
        reorder=True,
        conv_layer=lambda *args, **kwargs: branch,
        **_like(conv),
    )
    order = channel_order(kept, conv.out_channels)
    new.channel_order.copy_(torch.tensor(order, device=new.channel_order.device))
    return new


def channel_order(kept: list[int], out_channels: int) -> list[int]:
    """For each output channel its place in Concat[kept filters, attention]."""
    given_up = sorted(set(range(out_channels)) - set(kept))
    place = {channel: i for i, channel in enumerate([*kept, *given_up])}
    return [place[channel] for channel in range(out_channels)]


def verify(model: nn.Module, plan: Plan, graph: ModelGraph) -> None:
    """Prove a plan on a copy of the model on the meta device: the rewritten graph is linted and its shapes propagated.

    A replaced convolution keeps its name, so its node in the graph calls the replacement.

    Raises:
        AugmentError: a node whose shape is not what it was.
    """
    model = meta_copy(model).eval().requires_grad_(False)
    apply_plan(model, plan)
    for name, constant in graph.constants.items():
        setattr(model, name, constant)
    torch.fx.GraphModule(model, graph.graph).graph.lint()
    shapes = propagate_shapes(model, graph.graph, graph.input_size)
    changed = [name for name, shape in graph.shapes.items() if shapes[name] != shape]
    if changed:
        first = changed[0]
        raise AugmentError(
            f"the plan changes the shape of {first} from {graph.shapes[first]} to {shapes[first]}, and of "
            f"{len(changed) - 1} more; please report the model and the plan"
        )
