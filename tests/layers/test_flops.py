"""torch.utils.flop_counter counts the same on a processor as on the meta device, where plans count."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from augment_cli.layers import AAConv2d, AWConv2d, attended, native
from tests.layers.helpers import randomised

AA_PATHS, AW_WAYS = ("auto", "native", "blocked", "reference"), (None, "grouped", *attended.WAYS)


def marked(names: tuple) -> list:
    """Native ones are skipped where there are no kernels."""
    skip = pytest.mark.skipif(native.instructions is None, reason="no kernels")
    return [pytest.param(name, marks=skip) if name == "native" else name for name in names]


def flops(layer: nn.Module, x: Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def aa_layer(stride: int = 1, pool: int = 1, **options) -> AAConv2d:
    split = {"heads": 2, "key_channels": 16, "value_channels": 8, "resolution": 14 // stride, "attention_pool": pool}
    return AAConv2d(32, 64, 3, stride=stride, padding=1, **split, reorder=True, **options)


@pytest.mark.parametrize("path", marked(AA_PATHS))
@pytest.mark.parametrize(("stride", "pool"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_aa_counts_as_on_the_meta_device(path, stride, pool):
    layer, x = aa_layer(stride, pool), torch.randn(2, 32, 14, 14)
    layer.attention_path = path
    expected = flops(aa_layer(stride, pool, device="meta"), x.to("meta"))
    assert flops(layer, x) == expected
    with torch.no_grad():
        assert flops(layer, x) == expected


@pytest.mark.parametrize("path", marked(AA_PATHS))
def test_aa_counts_the_backward_pass_of_plain_operations(path):
    found, expected = (aa_layer(2, 2) for _ in range(2))
    found.attention_path, expected.attention_path = path, "reference"
    x = torch.randn(2, 32, 14, 14)
    assert flops(found, x, backward=True) == flops(expected, x, backward=True)


def aw_layer(in_channels: int = 32, reduction: int = 16, **options) -> AWConv2d:
    return AWConv2d(in_channels, 64, 3, stride=(2, 1), padding=1, reduction=reduction, **options)


@pytest.mark.parametrize("way", marked(AW_WAYS))
@pytest.mark.parametrize("batch", [1, 3])
def test_aw_counts_as_on_the_meta_device(way, batch):
    layer, x = randomised(aw_layer(), 0), torch.randn(batch, 32, 9, 9)
    layer.way = way
    expected = flops(aw_layer(device="meta"), x.to("meta"))
    assert flops(layer, x) == expected
    with torch.no_grad():
        assert flops(layer, x) == expected


@pytest.mark.parametrize("way", marked(AW_WAYS))
def test_aw_counts_the_backward_pass_of_plain_operations(way):
    """One sample and one map: of a convolution in groups torch counts too much, the kernel's gradient as if dense."""
    channels = 2 * native.lanes() if native.instructions else 32
    found, expected = (randomised(aw_layer(channels, channels), 0) for _ in range(2))
    found.way, expected.way = way, "grouped"
    x = torch.randn(1, channels, 9, 9, requires_grad=True)
    assert flops(found, x, backward=True) == flops(expected, x, backward=True)


@pytest.mark.parametrize("way", marked(tuple(attended.WAYS)))
def test_aw_counts_a_backward_pass_in_proportion_to_the_batch(way):
    layer = randomised(aw_layer(), 0)
    layer.way = way
    one, three = (flops(layer, torch.randn(n, 32, 9, 9, requires_grad=True), backward=True) for n in (1, 3))
    assert three == 3 * one


@pytest.mark.parametrize("way", marked(tuple(attended.WAYS)))
def test_aw_counts_only_the_gradients_that_are_made(way):
    layer, x = randomised(aw_layer(), 0), torch.randn(2, 32, 9, 9)
    layer.way = way
    forward, convolution = flops(layer, x), 2 * 2 * 5 * 9 * layer.weight.numel()
    reduced = flops(nn.Sequential(layer.reduce, layer.mix), torch.randn(2, 32, 3, 3))
    maps = forward - convolution - reduced
    assert maps == 2 * 2 * 64 * 2 * 9
    layer.requires_grad_(False)
    layer.weight.requires_grad_(True)
    assert flops(layer, x, backward=True) == forward + convolution + 2 * maps
