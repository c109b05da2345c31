import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from augment_cli.layers import AWConv2d, ScaledStandardize, Standardize
from augment_cli.layers.aw.conv import pool_by_product
from tests.layers import oracles
from tests.layers.helpers import assert_equal, assert_gradients, normal, pairs, randomised, seeds


def layer_of(*args, seed: int = 0, **options) -> AWConv2d:
    return randomised(AWConv2d(*args, dtype=torch.float64, **options), seed)


@st.composite
def cases(draw, most_groups: int = 4) -> tuple[dict, tuple[int, ...]]:
    """Arguments of a layer, and the shape of an input that has an output; the kernel may be larger than the map."""
    kernel, stride, dilation = draw(pairs(1, 2, 3, 5)), draw(pairs(1, 2, 3)), draw(pairs(1, 2))
    padding = draw(st.just("same") | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [d * (k - 1) + 1 for k, d in zip(oracles.pair(kernel), oracles.pair(dilation), strict=True)]
    least = (1, 1) if padding == "same" else [max(r - 2 * p, 1) for r, p in zip(reach, padding, strict=True)]
    shape = [n + draw(st.integers(0, 4)) for n in least]
    groups = draw(st.integers(1, most_groups))
    arguments = {
        "in_channels": groups * draw(st.integers(1, 8 // groups)),
        "out_channels": groups * draw(st.integers(1, 4 // groups)),
        "groups": groups,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "bias": draw(st.booleans()),
    }
    return arguments, (draw(st.integers(1, 3)), arguments["in_channels"], *shape)


@given(cases(), st.integers(1, 9), seeds)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_forward_equals_the_formula(case, reduction, seed):
    arguments, shape = case
    layer = layer_of(**arguments, reduction=reduction, seed=seed)
    x = normal(*shape, seed=seed)
    options = {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
    assert_equal(layer(x), oracles.aw_conv(x, layer.state_dict(), reduction=reduction, **options))


@given(cases(), seeds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_fresh_layer_is_the_plain_convolution(case, seed):
    arguments, shape = case
    layer = AWConv2d(**arguments, reduction=3, dtype=torch.float64)
    if arguments["padding"] == "same":
        plain = Conv2dSame(**{**arguments, "padding": 0}, dtype=torch.float64)
    else:
        plain = nn.Conv2d(**arguments, dtype=torch.float64)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"reduce.weight", "mix.weight", "expand.weight"}
    assert not unexpected
    x = normal(*shape, seed=seed)
    assert_equal(layer(x), plain(x), 1e-12)


def test_valid_padding_is_padding_zero():
    layer, zero = (layer_of(4, 3, 3, padding=padding, reduction=2) for padding in ("valid", 0))
    x = normal(2, 4, 5, 6, seed=1)
    assert layer(x).shape == (2, 3, 3, 4)
    assert torch.equal(layer(x), zero(x))


@pytest.mark.parametrize("gamma", [1.0, 1.7])
@pytest.mark.parametrize("scaled", [False, True])
def test_standardized_kernel_is_the_one_attended(scaled, gamma):
    standardize = ScaledStandardize(3, gamma / math.sqrt(36), dtype=torch.float64) if scaled else Standardize(1e-3)
    layer = layer_of(4, 3, 3, stride=2, padding=1, reduction=2, standardize=standardize)
    gain, scale = (standardize.gain.detach(), standardize.scale) if scaled else (None, 1.0)
    kernel = oracles.standardized(layer.weight.detach(), standardize.eps, gain, scale)
    x = normal(2, 4, 5, 6, seed=1)
    expected = oracles.aw_conv(x, layer.state_dict(), reduction=2, stride=2, padding=1, kernel=kernel)
    assert_equal(layer(x), expected)


def test_kernels_differ_between_samples_and_not_with_the_company():
    layer = layer_of(4, 3, 3, padding=1, reduction=2)
    x = normal(3, 4, 5, 6, seed=1)
    kernels = layer.attended_kernels(x)
    assert kernels.shape == (3, 3, 4, 3, 3)
    assert not torch.allclose(kernels[0], kernels[1])
    assert_equal(layer(x)[1:2], layer(x[1:2]), 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3), "stride": (2, 1), "bias": False},
        {"kernel_size": 3, "stride": 2, "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": 1, "standardize": Standardize()},
        {"kernel_size": 3, "padding": 1, "standardize": ScaledStandardize(3, 0.3, dtype=torch.float64)},
    ],
    ids=["plain", "strided", "same", "grouped", "depthwise", "standardized", "scaled"],
)
def test_gradients_of_input_and_parameters(options):
    layer = layer_of(4, 4 if "groups" in options else 3, **options, reduction=2)
    x = normal(2, 4, 4, 3, seed=3)
    assert layer.scales(x).any()
    assert_gradients(layer, x)


@given(
    kernel=pairs(1, 2, 3, 5),
    inputs=st.integers(1, 30),
    outputs=st.integers(1, 30),
    reduction=st.integers(1, 32),
    bias=st.booleans(),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_parameters_are_those_of_our_reading(kernel, inputs, outputs, reduction, bias):
    in_channels, out_channels = 3 * inputs, 3 * outputs
    layer = AWConv2d(in_channels, out_channels, kernel, reduction=reduction, bias=bias, device="meta")
    r = max(d for d in range(1, reduction + 1) if in_channels % d == 0)
    hidden = in_channels // r
    static = in_channels * out_channels * math.prod(oracles.pair(kernel)) + bias * out_channels
    attention = in_channels * hidden + hidden**2 + out_channels * hidden
    assert sum(p.numel() for p in layer.parameters()) == static + attention


@pytest.mark.parametrize("reduction", [0, -2])
def test_reduction_out_of_range_is_named(reduction):
    with pytest.raises(ValueError, match=f"reduction={reduction}"):
        AWConv2d(4, 3, 3, reduction=reduction)


def test_reset_parameters_makes_it_a_plain_convolution_again():
    layer = layer_of(4, 3, 3, reduction=2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    assert not layer.expand.weight.any()
    assert all(not torch.equal(p, before[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize(
    ("groups", "reduction", "expected"),
    [
        (1, 16, 60 * 4 + 16 + 30 * 4),
        (5, 6, 60 * 10 + 100 + 30 * 2),
        (5, 24, 60 * 5 + 25 + 30),
        (30, 4, 60 * 15 + 225 + 30),
    ],
)
def test_attention_of_a_grouped_kernel_meets_its_own_group_only(groups, reduction, expected):
    """60 to 30 channels: with r = 15, 6, 12 and 4, an output channel meets 4, 2, 1 and 1 maps."""
    layer = AWConv2d(60, 30, 3, groups=groups, reduction=reduction, bias=False, device="meta")
    assert sum(p.numel() for p in layer.parameters()) - layer.weight.numel() == expected


def test_arguments_are_those_of_a_convolution_in_its_order():
    given = (4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, False, "zeros", "cpu", torch.float64)
    layer, plain = AWConv2d(*given), nn.Conv2d(*given)
    plain.load_state_dict({"weight": layer.weight.detach()})
    x = normal(2, 4, 7, 5, seed=1)
    assert layer.bias is None
    assert_equal(layer(x), plain(x), 1e-12)


def test_padding_with_anything_but_zeros_is_named():
    with pytest.raises(ValueError, match="padding_mode='reflect'"):
        AWConv2d(4, 3, 3, padding=1, padding_mode="reflect")


@pytest.mark.parametrize("size", [(7, 5), (6, 9), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("window", [(3, 3), (1, 2), (5, 1)], ids=str)
def test_pooling_by_a_product_is_torchs(size, window):
    """It is what runs on CUDA in deterministic mode, where torch has none that is."""
    x = normal(2, 3, *size, seed=0).requires_grad_()
    found, expected = pool_by_product(x, window), nn.functional.adaptive_avg_pool2d(x, window)
    assert_equal(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=x.dtype).view(found.shape)
    assert_equal(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected)))
