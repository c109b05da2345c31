import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from augment_cli.layers import AWConv2d, ScaledStandardize, Standardize
from tests.layers import oracles
from tests.layers.helpers import assert_equal, normal, pairs, randomised, seeds


@given(st.integers(1, 4), st.integers(1, 5), pairs(1, 2, 3), st.sampled_from([1e-6, 1e-2]), seeds)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_standardized_filters_equal_the_formula(out_channels, in_channels, kernel, eps, seed):
    weight = normal(out_channels, in_channels, *oracles.pair(kernel), seed=seed) * 3 + 1
    assert_equal(Standardize(eps)(weight), oracles.standardized(weight, eps))
    scaled = randomised(ScaledStandardize(out_channels, 0.7, eps, dtype=torch.float64), seed)
    assert_equal(scaled(weight), oracles.standardized(weight, eps, scaled.gain.detach(), 0.7))


def test_standardized_filters_have_mean_zero_and_variance_one():
    weight = Standardize()(normal(4, 8, 3, 3, seed=0) * 5 + 2)
    assert_equal(weight.mean((1, 2, 3)), torch.zeros(4, dtype=torch.float64))
    assert_equal(weight.var((1, 2, 3), correction=0), torch.ones(4, dtype=torch.float64), 1e-6)


def test_a_constant_filter_becomes_zero():
    weight = torch.full((2, 3, 3, 3), 0.5, dtype=torch.float64)
    assert_equal(Standardize()(weight), torch.zeros_like(weight))


def test_fresh_gain_is_one():
    weight = normal(4, 8, 3, 3, seed=0)
    assert_equal(ScaledStandardize(4, 0.25, dtype=torch.float64)(weight), Standardize()(weight) * 0.25)


def attended(peer: nn.Conv2d, padding, standardize: nn.Module) -> AWConv2d:
    """A fresh AWConv2d with the weights of a timm convolution."""
    shape = (peer.in_channels, peer.out_channels, peer.kernel_size)
    options = {"stride": peer.stride, "padding": padding, "dilation": peer.dilation, "standardize": standardize}
    layer = AWConv2d(*shape, **options, bias=peer.bias is not None, reduction=2, dtype=torch.float64)
    layer.load_state_dict({"weight": peer.weight.detach(), "bias": peer.bias.detach()}, strict=False)
    return layer


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 7), (5, 1)])
def test_standardize_is_timms_std_conv(size, stride, same):
    build, padding = (StdConv2dSame, "same") if same else (StdConv2d, 1)
    peer = randomised(build(4, 3, 3, stride, padding, bias=True, eps=1e-4).double(), 0)
    layer = attended(peer, padding, Standardize(1e-4))
    x = normal(2, 4, *size, seed=1)
    assert_equal(layer(x), peer(x))


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_scaled_standardize_is_timms_scaled_std_conv(gamma, stride, same):
    build, padding = (ScaledStdConv2dSame, "same") if same else (ScaledStdConv2d, 1)
    peer = randomised(build(4, 3, 3, stride, padding, gamma=gamma, eps=1e-4).double(), 0)
    standardize = ScaledStandardize(3, gamma / (4 * 3 * 3) ** 0.5, 1e-4, dtype=torch.float64)
    standardize.load_state_dict({"gain": peer.gain.detach()})
    layer = attended(peer, padding, standardize)
    x = normal(2, 4, 6, 7, seed=1)
    assert_equal(layer(x), peer(x))
