"""The compiled convolution of AW computes what the formula says, in float32, with either instruction set."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers import AWConv2d, native
from augment_cli.layers.aw.attended import attended_conv, choose_backend
from augment_cli.layers.geometry import Geometry
from tests.layers import oracles
from tests.layers.aa.test_backends import gradients
from tests.layers.aw.test_backends import results
from tests.layers.helpers import needs_kernels, normal, pairs, peak_bytes, randomised, seeds

pytestmark = needs_kernels
drawn = settings(derandomize=True, deadline=None, max_examples=80)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[dict, tuple[int, ...]]:
    """Arguments of a layer that there is a kernel for, and the shape of an input."""
    size, dilation, stride = draw(pairs(1, 2, 3)), draw(pairs(1, 2)), draw(pairs(1, 2, 3))
    both = [(n, n) if isinstance(n, int) else n for n in (size, dilation)]
    padding = draw(pairs(0, 1, 2))
    least = [d * (k - 1) + 1 for k, d in zip(*both, strict=True)]
    height, width = (draw(st.integers(smallest, smallest + 17)) for smallest in least)
    channels = [32 * draw(st.integers(1, 3)) for _ in range(2)]
    arguments = {"in_channels": channels[0], "out_channels": channels[1], "kernel_size": size}
    arguments |= {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw(st.booleans())}
    return arguments, (draw(st.integers(1, 3)), channels[0], height, width)


def layer_of(seed: int, backend: str, **arguments) -> AWConv2d:
    layer = randomised(AWConv2d(**arguments), seed)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.expand.weight.mul_(0.1)
    layer.backend = backend
    return layer


@drawn
@given(convolutions(), st.sampled_from([8, 16]), seeds)
def test_convolution_equals_the_formula(case, reduction, seed):
    arguments, shape = case
    reduction = max(reduction, native.library.lanes)
    layer = layer_of(seed, "native", **arguments, reduction=reduction)
    x = normal(*shape, seed=seed, dtype=torch.float32)
    options = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    state = {name: t.double() for name, t in layer.state_dict().items()}
    expected = oracles.aw_conv(x.double(), state, reduction=reduction, **options)
    assert (layer(x) - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@drawn
@given(convolutions(), seeds)
def test_gradients_are_those_of_the_grouped_way(case, seed):
    arguments, shape = case
    found = results(layer_of(seed, "native", **arguments), normal(*shape, seed=seed, dtype=torch.float32))
    expected = results(
        layer_of(seed, "grouped", **arguments).double(), normal(*shape, seed=seed, dtype=torch.float32).double()
    )
    for name, b in expected.items():
        assert (found[name] - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), name


def test_large_layers_in_many_parts():
    for shape in ((9, 96, 31, 33), (40, 256, 7, 7)):
        x = normal(*shape, seed=1, dtype=torch.float32)
        found, expected = (
            results(layer_of(0, backend, in_channels=shape[1], out_channels=128, kernel_size=3, padding=1), x)
            for backend in ("native", "chunked")
        )
        for name, b in expected.items():
            assert (found[name] - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_number_of_a_convolution(threads):
    geometry = Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    shapes = (5, 64, 9, 11), (96, 64, 3, 3), (4, 96), (5, 4, 3, 3)  # x, kernel, mixing, scales
    inputs = [normal(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate(shapes)]
    run = partial(attended_conv, geometry=geometry, backend="native")
    expected, before = gradients(run, inputs), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = gradients(run, inputs)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_no_samples():
    layer = layer_of(0, "native", in_channels=32, out_channels=32, kernel_size=3)
    found = results(layer, torch.empty(0, 32, 5, 6))
    assert found["out"].shape == (0, 32, 3, 4)
    assert not found["weight"].any()


def test_several_calls_at_once():
    layer = layer_of(0, "native", in_channels=64, out_channels=64, kernel_size=3, padding=1)
    maps = [normal(2, 64, 9, 8, seed=i, dtype=torch.float32) for i in range(8)]
    expected = [results(layer, x)["weight"] for x in maps]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: results(layer, x)["weight"], maps * 4))
    for a, b in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_that_no_window_sees():
    arguments = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "stride": 8, "padding": 4}
    x = normal(2, 32, 1, 2, seed=1, dtype=torch.float32)
    found, expected = (results(layer_of(0, backend, **arguments), x) for backend in ("native", "grouped"))
    for name, b in expected.items():
        assert (found[name] - b).abs().max() <= 1e-5, name


@pytest.mark.parametrize("frozen", ["input", "parameters", "kernel"])
def test_only_the_gradients_that_are_needed(frozen):
    layer = layer_of(0, "native", in_channels=32, out_channels=32, kernel_size=3, padding=1)
    x = normal(3, 32, 5, 6, seed=1, dtype=torch.float32)
    expected = results(layer, x)
    layer.requires_grad_(frozen != "parameters")
    layer.weight.requires_grad_(frozen == "input")
    x.requires_grad_(frozen != "input")
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, expected[name])


def test_channels_last_goes_in_and_comes_out():
    layer = layer_of(0, "native", in_channels=32, out_channels=32, kernel_size=3, padding=1)
    x = normal(3, 32, 5, 6, seed=1, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    expected = results(layer, x)
    layer = layer.to(memory_format=torch.channels_last)
    for name, t in results(layer, last).items():
        torch.testing.assert_close(t, expected[name])


def test_second_derivatives_and_transforms_go_to_another_backend():
    layer = layer_of(0, "auto", in_channels=32, out_channels=32, kernel_size=3, padding=1)
    x = normal(2, 32, 4, 3, seed=3, dtype=torch.float32).requires_grad_()
    assert choose_backend(x, layer.weight, layer.geometry, 2) == "native"

    def run() -> list[torch.Tensor]:
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), x)
        return [*second, torch.func.vmap(layer)(torch.stack([x, x])), torch.func.jvp(layer, (x,), (x,))[1]]

    found = run()
    layer.backend = "grouped"
    for a, b in zip(found, run(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"in_channels": 40, "out_channels": 32},
        {"in_channels": 32, "out_channels": 40},
        {"in_channels": 32, "out_channels": 32, "reduction": 4},
        {"in_channels": 32, "out_channels": 32, "dtype": torch.float64},
        {"in_channels": 64, "out_channels": 64, "groups": 2},
    ],
    ids=str,
)
def test_the_rule_leaves_what_there_is_no_kernel_for(options):
    layer = AWConv2d(kernel_size=3, **options)
    x = torch.zeros(2, options["in_channels"], 5, 5, dtype=layer.weight.dtype)
    assert choose_backend(x, layer.weight, layer.geometry, layer.expand.groups) != "native"
    layer.backend = "native"
    with pytest.raises(ValueError, match=r"no compiled kernel|dense kernels only"):
        layer(x)


def test_the_rule_leaves_autocast_and_other_devices():
    x, geometry = torch.zeros(2, 32, 5, 5), Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.zeros(32, 32, 3, 3)
    assert choose_backend(x, weight, geometry, 2) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_backend(x, weight, geometry, 2) != "native"
    assert choose_backend(x.to("meta"), weight.to("meta"), geometry, 2) == "grouped"


def test_convolution_holds_a_bounded_amount():
    layer = layer_of(0, "native", in_channels=256, out_channels=256, kernel_size=3, padding=1)
    small, large = (normal(n, 256, 4, 4, seed=1, dtype=torch.float32) for n in (192, 576))
    held = [peak_bytes(partial(results, layer, x)) for x in (small, large)]
    assert held[1] - held[0] <= 6 * (large.nbytes - small.nbytes)
    assert held[0] <= 5 * layer.weight.nbytes + 2**23 + 6 * small.nbytes  # 192 kernels would be 453 MB
