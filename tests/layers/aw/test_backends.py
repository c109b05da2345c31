"""All backends of AWConv2d compute the same, in bounded memory, and `choose_backend` takes the expected one."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from augment_cli.layers import AWConv2d, ScaledStandardize
from augment_cli.layers.aw import attended, chunked, unfolded
from augment_cli.layers.geometry import Geometry
from tests.layers import oracles
from tests.layers.aw.test_conv import cases
from tests.layers.helpers import assert_equal, assert_gradients, normal, peak_bytes, randomised, seeds

# The two others are for at most 32 bits: native/test_attended.py, triton/test_attended.py.
FAST = tuple(backend for backend in attended.BACKENDS if backend not in ("native", "triton"))
each_backend = pytest.mark.parametrize("backend", FAST)
drawn = partial(settings, derandomize=True, deadline=None)


def layer_of(*args, backend: str, seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> AWConv2d:
    layer = randomised(AWConv2d(*args, **options), seed).to(dtype)
    layer.backend = backend
    return layer


def results(layer: AWConv2d, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a sum that weighs every number of it differently."""
    x = x.detach().requires_grad_()
    out = layer(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    named = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((out * weights).sum(), list(named.values()))
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, b in expected.items():
        a = found[name]
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), name


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even small layers are done in several parts, the last of them smaller."""
    monkeypatch.setattr(chunked, "KERNELS_BYTES", 5_000)
    monkeypatch.setattr(unfolded, "CHUNK_BYTES", 5_000)
    monkeypatch.setattr(unfolded, "BLOCK_BYTES", 0)  # 32 rows


@given(cases(most_groups=1), st.integers(1, 9), seeds, st.sampled_from(FAST))
@drawn(max_examples=150)
def test_forward_equals_the_formula(case, reduction, seed, backend):
    arguments, shape = case
    layer = layer_of(**arguments, reduction=reduction, seed=seed, backend=backend)
    x = normal(*shape, seed=seed)
    options = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    assert_equal(layer(x), oracles.aw_conv(x, layer.state_dict(), reduction=reduction, **options))


@given(cases(most_groups=1), st.integers(1, 9), seeds)
@drawn(max_examples=60)
def test_gradients_are_those_of_the_grouped_way(case, reduction, seed):
    arguments, shape = case
    x = normal(*shape, seed=seed)
    expected, *others = (
        results(layer_of(**arguments, reduction=reduction, seed=seed, backend=backend), x)
        for backend in ("grouped", *FAST)
    )
    for found in others:
        assert_same(found, expected, 1e-12)


@each_backend
def test_a_grouped_kernel_is_refused_by_all_but_grouped(backend):
    layer = AWConv2d(4, 4, 3, groups=2)
    layer.backend = backend
    with pytest.raises(ValueError, match=f"{backend}.*2 groups"):
        layer(torch.zeros(1, 4, 5, 5))


def test_an_unknown_backend_is_refused_by_name():
    layer = layer_of(4, 3, 3, backend="winograd")
    with pytest.raises(ValueError, match=r"'winograd'.*'grouped'"):
        layer(normal(1, 4, 5, 5, seed=0))


@each_backend
def test_gradcheck(backend):
    layer = layer_of(4, 3, 3, stride=(2, 1), padding="same", reduction=2, backend=backend)
    assert_gradients(layer, normal(2, 4, 4, 3, seed=3))


@each_backend
@pytest.mark.usefixtures("small_blocks")
def test_parts_make_the_whole(backend):
    x = normal(7, 8, 5, 6, seed=1)
    layer = layer_of(8, 70, 3, padding=1, reduction=4, standardize=ScaledStandardize(70, 0.1), backend=backend)
    found = results(layer, x)
    layer.backend = "grouped"
    assert_same(found, results(layer, x), 1e-12)


@each_backend
def test_a_zero_expand_is_the_plain_convolution_and_still_learns(backend):
    x = normal(3, 8, 5, 6, seed=1)
    layers = [layer_of(8, 6, 3, padding=1, reduction=2, backend=w) for w in (backend, "grouped")]
    for layer in layers:
        nn.init.zeros_(layer.expand.weight)
    found, expected = (results(layer, x) for layer in layers)
    assert_equal(found["out"], nn.functional.conv2d(x, layers[0].weight, layers[0].bias, padding=1), 1e-12)
    assert found["expand.weight"].all()
    assert_same(found, expected, 1e-12)


@each_backend
@pytest.mark.parametrize("frozen", ["input", "parameters", "kernel"])
def test_only_the_gradients_that_are_needed(backend, frozen):
    layer, x = layer_of(8, 6, 3, padding=1, reduction=2, backend=backend), normal(3, 8, 5, 6, seed=1)
    expected = results(layer, x)
    layer.requires_grad_(frozen != "parameters")
    layer.weight.requires_grad_(frozen == "input")
    x.requires_grad_(frozen != "input")
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            assert_equal(tensor.grad, expected[name])


@each_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)], ids=str)
def test_lower_precision(backend, dtype, tolerance):
    layer, x = (
        layer_of(8, 6, 3, padding=1, reduction=2, backend=backend, dtype=dtype),
        normal(5, 8, 5, 6, seed=1, dtype=dtype),
    )
    found = results(layer, x)
    assert {t.dtype for t in found.values()} == {dtype}
    expected = results(layer.double(), x.double())
    assert_same({name: t.double() for name, t in found.items()}, expected, tolerance)


@each_backend
def test_autocast_rounds_what_a_convolution_rounds(backend):
    layer = layer_of(8, 6, 3, padding=1, reduction=2, backend=backend, dtype=torch.float32)
    x = normal(5, 8, 5, 6, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(layer, x)
    assert found.pop("out").dtype == torch.bfloat16
    assert {t.dtype for t in found.values()} == {torch.float32}
    layer.backend = "grouped"
    assert_same(found, {name: t for name, t in results(layer, x).items() if name != "out"}, 0.03)


@each_backend
def test_channels_last_goes_in_and_comes_out(backend):
    layer, x = layer_of(8, 6, 3, padding=1, reduction=2, backend=backend), normal(3, 8, 5, 6, seed=1)
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert_same(results(layer, last), results(layer, x), 1e-12)


@each_backend
def test_second_derivatives(backend):
    layer, x = layer_of(4, 3, 3, padding=1, reduction=2, backend=backend), normal(2, 4, 4, 3, seed=3).requires_grad_()
    tensors = [x, *layer.parameters()]

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(layer(x).pow(3).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), tensors)

    found = second()
    layer.backend = "grouped"
    for a, b in zip(found, second(), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@each_backend
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_function_transforms(backend):
    layer, x, v = (
        layer_of(4, 3, 3, padding=1, reduction=2, backend=backend),
        *(normal(2, 4, 4, 3, seed=s) for s in (3, 4)),
    )

    def run() -> list[Tensor]:
        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        batched = torch.func.vmap(layer)(torch.stack([x, v]))
        gradients = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x).square().sum())(parameters)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
        return [batched, dual, torch.func.jvp(layer, (x,), (v,))[1], *gradients.values()]

    found = run()
    layer.backend = "grouped"
    for a, b in zip(found, run(), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("backend", ["auto", "grouped", *FAST])
def test_no_samples_are_as_good_as_in_a_plain_convolution(backend):
    x = torch.empty(0, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    layer = layer_of(4, 3, 3, stride=2, reduction=2, backend=backend)
    out = layer(x)
    assert out.shape == nn.Conv2d(4, 3, 3, stride=2, dtype=torch.float64)(x).shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not layer.weight.grad.any()


def chosen(shape: tuple[int, ...], out_channels: int, kernel: int = 3, stride: int = 1, **options) -> str:
    geometry = Geometry(*((n, n) for n in (kernel, stride, kernel // 2, 1)))
    weight = torch.empty(out_channels, shape[1], kernel, kernel, **options)
    return attended.choose_backend(torch.empty(shape, **options), weight, geometry, max(1, shape[1] // 16))


@pytest.mark.usefixtures("without_kernels")
def test_the_rule_by_size():
    assert chosen((1, 512, 7, 7), 512) == "unfolded"
    with torch.no_grad():
        assert chosen((1, 512, 7, 7), 512) == "grouped"
    assert chosen((1, 256, 14, 14), 256) == "grouped"
    assert chosen((8, 32, 14, 14), 32) == "grouped"  # 8 kernels of 37 kB
    assert chosen((32, 64, 56, 56), 64) == "chunked"
    assert chosen((32, 128, 28, 28), 128) == "chunked"
    assert chosen((32, 256, 14, 14), 256) == "unfolded"
    assert chosen((32, 512, 7, 7), 512) == "unfolded"
    assert chosen((32, 512, 14, 14), 512, stride=2) == "unfolded"
    assert chosen((32, 512, 4, 4), 512) == "static"
    assert chosen((256, 64, 7, 7), 64) == "chunked"  # a small kernel, and many of them


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_rule_takes_the_differentiable_operations_where_others_do_not_work():
    assert chosen((32, 256, 14, 14), 256, device="meta") == "grouped"
    with torch._subclasses.FakeTensorMode():
        assert chosen((32, 256, 14, 14), 256) == "grouped"
    taken = []

    def ask(x: Tensor) -> Tensor:
        taken.append(chosen((32, 256, 14, 14), 256))
        return x + 1

    torch.jit.trace(ask, torch.ones(1), check_trace=False)
    torch.compile(ask, backend="eager")(torch.ones(1))
    assert set(taken) == {"grouped"}


@each_backend
def test_the_layer_follows_the_rule(backend, monkeypatch):
    monkeypatch.setattr("augment_cli.layers.aw.conv.choose_backend", lambda *_: backend)
    used = []
    made = attended.BACKENDS[backend]
    monkeypatch.setitem(
        attended.BACKENDS, backend, type("Counted", (made,), {"run": lambda *a: used.append(made.run(*a))})
    )
    x = normal(2, 4, 4, 3, seed=3)
    found, expected = (layer_of(4, 3, 3, reduction=2, backend=w)(x) for w in ("auto", "grouped"))
    assert len(used) == 1
    assert_equal(found, expected)


@each_backend
def test_what_training_holds_for_a_sample_is_of_the_size_of_its_maps(backend):
    """Kernels and unfoldings are nine and 256 times as large as a map."""
    layer = layer_of(256, 256, 3, padding=1, backend=backend, dtype=torch.float32)
    small, large = (normal(n, 256, 4, 4, seed=1, dtype=torch.float32) for n in (64, 192))
    held = [peak_bytes(partial(results, layer, x)) for x in (small, large)]
    assert held[1] - held[0] <= 6 * (large.nbytes - small.nbytes)
    kernel = layer.weight.nbytes
    assert held[1] <= 8 * kernel + 4 * unfolded.CHUNK_BYTES + 6 * large.nbytes  # 192 kernels would be 453 MB


@each_backend
def test_inference_holds_less_than_two_kernels_for_each_block(backend):
    layer = layer_of(256, 256, 3, padding=1, backend=backend, dtype=torch.float32)
    x = normal(64, 256, 4, 4, seed=1, dtype=torch.float32)
    with torch.no_grad():
        held = peak_bytes(partial(layer, x))
    assert held <= 4 * layer.weight.nbytes + 2 * unfolded.CHUNK_BYTES + 4 * x.nbytes
