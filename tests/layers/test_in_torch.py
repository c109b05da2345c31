"""Both layers in PyTorch: dtypes, memory formats, copies, files, compilation, export."""

import copy
import io
import os
import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from augment_cli.layers import AAConv2d, AWConv2d, ScaledStandardize
from tests.layers.helpers import assert_equal, normal, randomised


def scaled_aw(device=None, dtype=None) -> AWConv2d:
    dd = {"device": device, "dtype": dtype}
    standardize = ScaledStandardize(8, 54**-0.5, **dd)
    return AWConv2d(6, 8, 3, stride=2, padding="same", reduction=3, standardize=standardize, **dd)


AA = partial(AAConv2d, 6, 8, 3, padding=1, heads=2, key_channels=4)
BUILDERS = {
    "aa": partial(AA, value_channels=4, resolution=(4, 5)),
    "aa_reduced": partial(AA, value_channels=4, resolution=(2, 3), stride=2, attention_pool=2, reorder=True),
    "aa_alone": partial(AA, value_channels=8, resolution=(6, 3)),
    "aw": partial(AWConv2d, 6, 8, 3, padding=1, reduction=2),
    "aw_grouped": partial(AWConv2d, 6, 8, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, reduction=3),
    "aw_scaled": scaled_aw,
}
both_layers = pytest.mark.parametrize("name", ["aa", "aw"])
every_layer = pytest.mark.parametrize("name", BUILDERS)


def layer_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Weights of the size that training starts from, all of them non-zero."""
    layer = randomised(BUILDERS[name](dtype=dtype), 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.4)
    return layer


def input_of(dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return normal(batch, 6, 4, 5, seed=1, dtype=dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """No further off than a share of the largest value."""
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max() <= share * expected.float().abs().max()


@every_layer
def test_autocast_is_close_to_float32(name):
    layer, x = layer_of(name), input_of()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_near(out, expected, 0.03)
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@every_layer
def test_bfloat16_weights_are_close_to_float32(name):
    layer, x = layer_of(name).to(torch.bfloat16), input_of(torch.bfloat16)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_near(out, layer.float()(x.float()), 0.03)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_of_the_constructor_is_the_dtype_of_all(name, dtype):
    layer = layer_of(name, dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    out = layer(input_of(dtype))
    assert out.dtype == dtype
    assert_near(out, copy.deepcopy(layer).double()(input_of(dtype).double()), 0.01 if dtype == torch.float16 else 1e-12)


@every_layer
def test_channels_last_gives_the_same_values(name):
    layer, x = layer_of(name, torch.float64), input_of(torch.float64)
    expected = layer(x)
    last = x.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert_equal(layer(last), expected)
    assert_equal(layer.to(memory_format=torch.channels_last)(last), expected)


@every_layer
def test_deepcopy_is_equal_and_independent(name):
    layer, x = layer_of(name), input_of()
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(layer(x), expected)
    assert not torch.allclose(twin(x), expected)


def through_a_file(thing, weights_only: bool):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@every_layer
def test_pickle_round_trip(name):
    layer, x = layer_of(name), input_of()
    assert torch.equal(through_a_file(layer, weights_only=False)(x), layer(x))


@every_layer
def test_state_dict_round_trip(name):
    layer, x = layer_of(name), input_of()
    fresh = BUILDERS[name]()
    assert not torch.allclose(fresh(x), layer(x))
    fresh.load_state_dict(through_a_file(layer.state_dict(), weights_only=True), strict=True)
    assert torch.equal(fresh(x), layer(x))


@every_layer
def test_meta_device_knows_the_shape(name):
    meta = BUILDERS[name](device="meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    out = meta(input_of().to("meta"))
    assert out.device.type == "meta"
    assert out.shape == layer_of(name)(input_of()).shape


@every_layer
def test_one_step_lowers_the_loss(name):
    torch.manual_seed(0)
    layer, x = BUILDERS[name](), input_of()
    target = torch.randn_like(layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(layer(x), target)

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before


@every_layer
def test_export_with_a_static_shape(name):
    layer, x = layer_of(name), input_of()
    exported = torch.export.export(layer, (x,)).module()
    assert_equal(exported(x), layer(x), 1e-5)


@every_layer
def test_export_with_a_dynamic_batch(name):
    layer = layer_of(name)
    program = torch.export.export(layer, (input_of(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    for batch in (1, 2, 7):
        x = input_of(batch=batch)
        assert_equal(exported(x), layer(x), 1e-5)


@every_layer
def test_traced_for_one_batch_serves_others(name):
    layer = layer_of(name)
    with torch.no_grad():
        traced = torch.jit.trace(layer, input_of())
        for batch in (1, 2, 7):
            x = input_of(batch=batch)
            assert_equal(traced(x), layer(x), 1e-5)


def compiler() -> str:
    """The default backend where C++ can be built, tracing with autograd alone where it cannot."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return "inductor" if shutil.which(os.environ.get("CXX", "g++")) and headers.exists() else "aot_eager"


@both_layers
def test_compiled_layer_equals_eager_forward_and_backward(name):
    layer, x = layer_of(name), input_of().requires_grad_()
    inputs = [x, *layer.parameters()]
    compiled = torch.compile(layer, backend=compiler(), fullgraph=True)

    def run(module: nn.Module) -> tuple[torch.Tensor, ...]:
        out = module(x)
        return out.detach(), *torch.autograd.grad(out.square().mean(), inputs)

    for actual, expected in zip(run(compiled), run(layer), strict=True):
        assert_near(actual, expected, 1e-4)
