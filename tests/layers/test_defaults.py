"""Torch's default dtype and default device are for what a user makes: the layers compute the same under all of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from augment_cli.layers import AAConv2d, AWConv2d, ScaledStandardize
from augment_cli.layers.aa.attention import BACKENDS as AA_BACKENDS
from augment_cli.layers.aa.blocked import free_blocks
from augment_cli.layers.aw.attended import BACKENDS as AW_BACKENDS
from tests.layers.helpers import for_cpu, needs_kernels, normal, randomised

SHAPE = (2, 32, 9, 7)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    **{str(dtype): (default_dtype, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)},
    "default meta": (default_device, "meta"),
    "with meta": (torch.device, "meta"),
}
every_default = pytest.mark.parametrize("default", DEFAULTS)


def aa_layer(backend: str) -> nn.Module:
    """A strided layer whose pooled map is not the one that its tables are for."""
    split = {"heads": 2, "key_channels": 16, "value_channels": 8, "resolution": (8, 4), "attention_pool": 2}
    layer = AAConv2d(32, 32, 3, stride=(1, 2), padding=1, **split, reorder=True)
    layer.backend = backend
    return layer


def aw_layer(backend: str) -> nn.Module:
    layer = AWConv2d(32, 32, 3, stride=(2, 1), padding="same", standardize=ScaledStandardize(32, 288**-0.5))
    layer.backend = backend
    return layer


LAYERS = {
    **{f"aa {backend}": (aa_layer, backend) for backend in AA_BACKENDS},
    **{f"aw {backend}": (aw_layer, backend) for backend in ("grouped", *AW_BACKENDS)},
}
every_layer = pytest.mark.parametrize("name", for_cpu(LAYERS))


def layer_of(name: str) -> nn.Module:
    make, backend = LAYERS[name]
    layer = randomised(make(backend), 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.4)
    return layer


def input_and_weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    x = normal(*SHAPE, seed=1, dtype=torch.float32)
    with torch.no_grad():
        return x, normal(*layer(x).shape, seed=2, dtype=torch.float32)


def run(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """The result, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    out = call(x)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


@cache
def expected(name: str) -> list[Tensor]:
    layer = layer_of(name)
    return run(layer, layer, *input_and_weights(layer))


def assert_same(found: list[Tensor], name: str) -> None:
    for a, b in zip(found, expected(name), strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


@every_default
@every_layer
def test_forward_and_backward(default, name):
    layer = layer_of(name)
    tensors = input_and_weights(layer)
    expected(name)
    free_blocks()
    change, value = DEFAULTS[default]
    with change(value):
        found = run(layer, layer, *tensors)
        with torch.no_grad():
            out = layer(tensors[0])
    assert_same(found, name)
    assert_same([out, *found[1:]], name)


@every_default
@pytest.mark.parametrize("name", ["aa auto", "aw auto"])
def test_compiled(default, name, monkeypatch):
    monkeypatch.setitem(LAYERS, "aa auto", (aa_layer, "auto"))
    monkeypatch.setitem(LAYERS, "aw auto", (aw_layer, "auto"))
    layer = layer_of(name)
    tensors = input_and_weights(layer)
    expected(name)
    change, value = DEFAULTS[default]
    torch.compiler.reset()
    with change(value):
        found = run(torch.compile(layer, backend="aot_eager", fullgraph=True), layer, *tensors)
    assert_same(found, name)


@every_default
@needs_kernels
def test_what_kernels_are_handed(default):
    """Every tensor that an operator makes is of its inputs' type."""
    change, value = DEFAULTS[default]
    maps = [normal(1, 2, c, 6, seed=c, dtype=torch.float32) for c in (4, 4, 3)]
    tables = [normal(2 * size - 1, 4, seed=size, dtype=torch.float32) for size in (2, 3)]
    with change(value):
        for t in torch.ops.augment_cli.relative_attention(*maps, *tables):
            assert (t.dtype, t.device.type) == (torch.float32, "cpu")
