"""A detector's backbone: timm's feature extractor of a model, converted or plain, and torchvision's feature pyramid."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from timm.models import get_model_args
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from augment_cli.analysis.source import describe_module, quiet_timm
from augment_cli.checkpoint.metadata import Metadata, metadata_of
from augment_cli.checkpoint.rebuild import own_name, transplant
from augment_cli.compat import pretrained_cfg
from augment_cli.detection.settings import Norm
from augment_cli.errors import InputError, boundary
from augment_cli.seeds import seeded
from augment_cli.training.models import Opened, open_model
from augment_cli.training.parameters import Provenance, provenance

Extra = Literal["p6p7", "pool"]


class Pyramid(nn.Module):
    """Feature maps of `body`, and torchvision's feature pyramid over them.

    Attributes:
        body: timm's feature extractor, a module that returns a list of maps.
        out_channels: width of every map, as torchvision's detectors ask for it.
    """

    def __init__(self, body: nn.Module, widths: list[int], out_channels: int = 256, extra: Extra | None = None) -> None:
        super().__init__()
        blocks: dict[Extra | None, ExtraFPNBlock | None] = {None: None, "pool": LastLevelMaxPool()}
        if extra == "p6p7":
            blocks["p6p7"] = LastLevelP6P7(out_channels, out_channels)
        self.body = body
        self.fpn = FeaturePyramidNetwork(widths, out_channels, blocks[extra])
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Shapes: x (N, channels, H, W) to maps (N, out_channels, H_i, W_i) by name, the largest first."""
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        switch: Callable[[bool], None] = cast(Any, self.body).set_grad_checkpointing
        switch(enable)


@dataclass(frozen=True)
class Body:
    """A feature extractor with its origin: names and arguments in timm, and each parameter's provenance.

    widths: channels of its maps. metadata: None for a plain model. weights: those of a checkpoint that were taken.
    """

    module: nn.Module
    name: str
    args: dict[str, Any]
    levels: tuple[int, ...]
    widths: list[int]
    metadata: Metadata | None
    kinds: dict[str, Provenance] = field(default_factory=dict)
    weights: str | None = None


def backbone(
    model: str | Path | nn.Module,
    levels: Sequence[int] | None = None,
    *,
    norm: Norm = "frozen",
    out_channels: int = 256,
    extra: Extra | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
) -> Pyramid:
    """A model's feature extractor with torchvision's feature pyramid, for any detector of torchvision.

    Args:
        model: a converted model's file or folder, the name of a timm model, or a timm model, converted or not, which is
            left as it is.
        levels: timm's feature levels that the pyramid reads; None takes those with strides of 4, 8, 16 and 32.
        norm: "frozen" keeps the batch statistics, gains and biases of the model; "batch" uses those of each batch and
            trains gains and biases.
        out_channels: width of the pyramid.
        extra: what follows its last map: "p6p7" two convolutions, as in RetinaNet and FCOS; "pool" one pooling, as in
            Faster R-CNN.
        pretrained, checkpoint: weights for a name, as in `augment_cli.convert`.
        seed: of random weights.

    Raises:
        AugmentError: no such model, or one without feature levels of these numbers.

    Example:
        >>> maps = backbone("test_resnet", levels=(1, 2))(torch.zeros(1, 3, 64, 64))
        >>> [tuple(level.shape) for level in maps.values()]
        [(1, 256, 16, 16), (1, 256, 8, 8)]
    """
    body = open_body(model, levels, strides=(4, 8, 16, 32), pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    with seeded(seed, "pyramid"):
        return make_pyramid(body, norm, out_channels, extra)


def make_pyramid(body: Body, norm: Norm, out_channels: int, extra: Extra | None) -> Pyramid:
    """The pyramid over a body, whose batch normalisation is frozen if `norm` says so."""
    module = freeze_batch_norm_2d(body.module) if norm == "frozen" else body.module
    return Pyramid(module, body.widths, out_channels, extra)


def open_body(
    model: str | Path | nn.Module,
    levels: Sequence[int] | None,
    strides: Collection[int],
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    ema: bool | None = None,
    args: dict[str, Any] | None = None,
    seed: int = 0,
) -> Body:
    """The feature extractor of a model; `levels` None takes the deepest level of each of the strides.

    Raises:
        AugmentError: as of `backbone`.
    """
    if isinstance(model, nn.Module):
        if pretrained or checkpoint:
            raise InputError("a model has its weights: leave out `pretrained` and `checkpoint`")
        opened = _given(model)
    else:
        opened = open_model(model, pretrained=pretrained, weights=checkpoint, ema=ema, args=args, seed=seed)
    metadata = opened.metadata
    if metadata is not None and metadata.plan.base == "other":
        raise InputError(
            f"{opened.name} is not a model of timm, which has the feature levels: convert the backbone within its "
            f"detector, `convert(detector.backbone, ...)`"
        )
    name = opened.name if metadata is None else metadata.plan.model
    created = dict(get_model_args(opened.model)) if metadata is None else dict(metadata.plan.model_args)
    sites = frozenset[str]() if metadata is None else frozenset(site.name for site in metadata.plan.sites)
    body = extract(opened.model, name, created, sites, levels, strides)
    kinds = provenance(opened)
    names = {key: own_name(kinds, key) for key, _ in body.module.named_parameters()}
    own_kinds: dict[str, Provenance] = {key: kinds[own] if own else "carried" for key, own in names.items()}
    return replace(body, metadata=metadata, kinds=own_kinds, weights=opened.weights)


def _given(model: nn.Module) -> Opened:
    """A model in memory, copied."""
    metadata, copied = metadata_of(model), copy.deepcopy(model)
    if metadata is not None:
        return Opened(copied, metadata.plan.model, metadata, metadata.plan.input_size, frozenset(metadata.fresh))
    described, _ = describe_module(model, (224, 224))  # its size plays no part here
    if described.base == "other":
        raise InputError(f"{described.name} is not a model of timm, which has the feature levels: give one of timm's")
    return Opened(copied, described.name, None, described.input_size)


def extract(
    model: nn.Module,
    name: str,
    args: dict[str, Any],
    sites: Collection[str],
    levels: Sequence[int] | None,
    strides: Collection[int],
) -> Body:
    """timm's feature extractor of `name`, with a model's modules at `sites` and all its weights.

    Raises:
        AugmentError: the architecture has no such levels.
    """
    args = {key: value for key, value in args.items() if key != "features_only"}
    levels = tuple(levels) if levels is not None else _default_levels(name, args, strides)
    with boundary(f"the feature levels {', '.join(map(str, levels))} of {name}"), quiet_timm():
        module: Any = timm.create_model(name, features_only=True, out_indices=levels, **args)
        transplant(model, module, set(sites))
        widths = list(module.feature_info.channels())
    return Body(module, name, args, levels, widths, None)


def _default_levels(name: str, args: dict[str, Any], strides: Collection[int]) -> tuple[int, ...]:
    """The deepest level of each stride that the architecture has."""
    with boundary(f"{name} has no feature levels"), quiet_timm(), torch.device("meta"), seeded("shapes"):
        extractor: Any = timm.create_model(name, features_only=True, **args)
        info = extractor.feature_info
    found = {stride: index for index, stride in zip(info.out_indices, info.reduction(), strict=True)}
    levels = tuple(found[stride] for stride in sorted(strides) if stride in found)
    if not levels:
        known = ", ".join(map(str, found))
        raise InputError(f"{name} has no feature level of stride {', '.join(map(str, sorted(strides)))}, but {known}")
    return levels


def channel_statistics(model: nn.Module, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of an image's channels, for which timm made a model."""
    cfg = pretrained_cfg(model)
    mean, std = cfg.get("mean", (0.485, 0.456, 0.406)), cfg.get("std", (0.229, 0.224, 0.225))
    return _of_channels(mean, channels), _of_channels(std, channels)


def _of_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
