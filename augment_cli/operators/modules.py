"""Layers made of a convolution: its filters, kernels and biases are taken over, what is added starts at random."""

import copy
from typing import Any

import torch
from torch import nn

from augment_cli.analysis.graph import conv_padding
from augment_cli.layers import AAConv2d, AWConv2d, ScaledStandardize, Standardize


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
        _pair(conv.kernel_size),
        reduction=reduction,
        standardize=_standardization(conv),
        **_like(conv),
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new


def _like(conv: nn.Conv2d) -> dict[str, Any]:
    """Arguments that a replacement shares with its convolution."""
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
    """The standardisation of a kernel that timm's convolutions of that name have; None for others."""
    own: Any = conv
    if hasattr(own, "gain"):
        standardize = ScaledStandardize(own.out_channels, own.scale, own.eps)
        standardize.gain = own.gain
        return standardize
    return Standardize(own.eps) if hasattr(own, "eps") else None


def augment(conv: nn.Conv2d, branch: nn.Conv2d, kept: list[int], **attention: Any) -> AAConv2d:
    """AAConv2d around a convolution branch, its output channels in the source's order; `attention` are its settings."""
    new = AAConv2d(
        conv.in_channels,
        conv.out_channels,
        _pair(conv.kernel_size),
        reorder=True,
        conv_layer=lambda *args, **kwargs: branch,
        **attention,
        **_like(conv),
    )
    order = torch.tensor(channel_order(kept, conv.out_channels), device=conv.weight.device)
    new.channel_order = order.to(torch.int64)
    return new


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return height, width


def channel_order(kept: list[int], out_channels: int) -> list[int]:
    """For each output channel its place in Concat[kept filters, attention]."""
    given_up = sorted(set(range(out_channels)) - set(kept))
    place = {channel: i for i, channel in enumerate([*kept, *given_up])}
    return [place[channel] for channel in range(out_channels)]
