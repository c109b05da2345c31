"""torch.utils.flop_counter counts the same on a processor as on the meta device, where plans count."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from augment_cli.layers import AAConv2d, AWConv2d, native
from augment_cli.layers.aw.attended import BACKENDS
from tests.layers.helpers import for_cpu, randomised

AA_BACKENDS, AW_BACKENDS = ("auto", "native", "triton", "blocked", "reference"), ("auto", "grouped", *BACKENDS)


def flops(layer: nn.Module, x: Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        out = layer(x)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def aa_layer(stride: int = 1, pool: int = 1, **options) -> AAConv2d:
    split = {"heads": 2, "key_channels": 16, "value_channels": 8, "resolution": 14 // stride, "attention_pool": pool}
    return AAConv2d(32, 64, 3, stride=stride, padding=1, **split, reorder=True, **options)


@pytest.mark.parametrize("backend", for_cpu(AA_BACKENDS))
@pytest.mark.parametrize(("stride", "pool"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_aa_counts_as_on_the_meta_device(backend, stride, pool):
    layer, x = aa_layer(stride, pool), torch.randn(2, 32, 14, 14)
    layer.backend = backend
    expected = flops(aa_layer(stride, pool, device="meta"), x.to("meta"))
    assert flops(layer, x) == expected
    with torch.no_grad():
        assert flops(layer, x) == expected


@pytest.mark.parametrize("backend", for_cpu(AA_BACKENDS))
def test_aa_counts_the_backward_pass_of_plain_operations(backend):
    found, expected = (aa_layer(2, 2) for _ in range(2))
    found.backend, expected.backend = backend, "reference"
    x = torch.randn(2, 32, 14, 14)
    assert flops(found, x, backward=True) == flops(expected, x, backward=True)


def aw_layer(in_channels: int = 32, reduction: int = 16, **options) -> AWConv2d:
    return AWConv2d(in_channels, 64, 3, stride=(2, 1), padding=1, reduction=reduction, **options)


@pytest.mark.parametrize("backend", for_cpu(AW_BACKENDS))
@pytest.mark.parametrize("batch", [1, 3])
def test_aw_counts_as_on_the_meta_device(backend, batch):
    layer, x = randomised(aw_layer(), 0), torch.randn(batch, 32, 9, 9)
    layer.backend = backend
    expected = flops(aw_layer(device="meta"), x.to("meta"))
    assert flops(layer, x) == expected
    with torch.no_grad():
        assert flops(layer, x) == expected


@pytest.mark.parametrize("backend", for_cpu(AW_BACKENDS))
def test_aw_counts_the_backward_pass_of_plain_operations(backend):
    """One sample and one map: of a convolution in groups torch counts too much, the kernel's gradient as if dense."""
    channels = 2 * native.library.lanes if native.library else 32
    found, expected = (randomised(aw_layer(channels, channels), 0) for _ in range(2))
    found.backend, expected.backend = backend, "grouped"
    x = torch.randn(1, channels, 9, 9, requires_grad=True)
    assert flops(found, x, backward=True) == flops(expected, x, backward=True)


@pytest.mark.parametrize("backend", for_cpu(BACKENDS))
def test_aw_counts_a_backward_pass_in_proportion_to_the_batch(backend):
    layer = randomised(aw_layer(), 0)
    layer.backend = backend
    one, three = (flops(layer, torch.randn(n, 32, 9, 9, requires_grad=True), backward=True) for n in (1, 3))
    assert three == 3 * one


@pytest.mark.parametrize("backend", for_cpu(BACKENDS))
def test_aw_counts_only_the_gradients_that_are_made(backend):
    layer, x = randomised(aw_layer(), 0), torch.randn(2, 32, 9, 9)
    layer.backend = backend
    forward, convolution = flops(layer, x), 2 * 2 * 5 * 9 * layer.weight.numel()
    reduced = flops(nn.Sequential(layer.reduce, layer.mix), torch.randn(2, 32, 3, 3))
    maps = forward - convolution - reduced
    assert maps == 2 * 2 * 64 * 2 * 9
    layer.requires_grad_(False)
    layer.weight.requires_grad_(True)
    assert flops(layer, x, backward=True) == forward + convolution + 2 * maps
