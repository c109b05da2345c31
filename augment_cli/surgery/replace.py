"""Apply a plan to a model: the chosen convolutions are replaced in the module tree, in place.

What this does not do: it does not wrap the model, replace its forward or turn it into a GraphModule. The graph serves
to find the sites before and to prove the result after.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from timm.layers import register_notrace_module
from torch import nn

from augment_cli.analysis.graph import ModelGraph, meta_copy, propagate_shapes
from augment_cli.errors import InputError
from augment_cli.operators import get_operator
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
    apply_sites(model, plan.sites, keep)


def apply_sites(model: nn.Module, sites: Iterable[SitePlan], keep: KeepFilters = keep_first) -> None:
    """Replace some sites, as `apply_plan` does a plan's."""
    for site in sites:
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
        raise InputError(f"{type(model).__name__} has no convolution {site.name}")
    # Not the stride: a model created with another output_stride has others, and dilation, with the same weights.
    for key in ("in_channels", "out_channels", "kernel_size", "groups"):
        if getattr(conv, key) != getattr(site, key):
            raise InputError(f"{site.name} has {key} {getattr(conv, key)}, and {getattr(site, key)} in the plan")
    return conv


def replacement(conv: nn.Conv2d, site: SitePlan, keep: KeepFilters = keep_first) -> nn.Module:
    """The module that the plan puts in the place of a convolution; timm and torch.fx take it for a leaf."""
    operator = get_operator(site.operator)
    given_up = operator.given_up(site.split)
    kept = keep(site.name, conv, conv.out_channels - given_up) if given_up else list(range(conv.out_channels))
    new = operator.build(conv, site, site.split, kept)
    register_notrace_module(type(new))
    return new.train(conv.training)


def added_parameters(model: nn.Module, site: SitePlan) -> list[str]:
    """Names of the parameters in a converted model that a site's source did not have."""
    added = get_operator(site.operator).added(model.get_submodule(site.name))
    return [f"{site.name}.{name}" for name in added]


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
        raise InputError(
            f"the plan changes the shape of {first} from {graph.shapes[first]} to {shapes[first]}, and of "
            f"{len(changed) - 1} more; please report the model and the plan"
        )
