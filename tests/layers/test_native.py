"""The compiled kernels compute what the formulas say, in float32, with either of the instruction sets."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers import AAConv2d, AWConv2d, attended, native, per_sample
from augment_cli.layers.attention import choose_path, relative_attention
from augment_cli.layers.native.attention import native_relative_attention
from tests.layers import oracles
from tests.layers.helpers import normal, pairs, peak_bytes, randomised, seeds
from tests.layers.test_attention_paths import assert_same, gradients, make_inputs
from tests.layers.test_aw_paths import results

pytestmark = pytest.mark.skipif(
    native.instructions is None and os.environ.get("AUGMENT_NATIVE") != "1",
    reason="no kernels were compiled; AUGMENT_NATIVE=1 makes that an error",
)
TESTS = "test_native.py", "test_native_calls.py", "test_large_logits.py"
drawn = settings(derandomize=True, deadline=None, max_examples=80)


def test_they_were_compiled():
    assert native.instructions in native.LANES


@pytest.mark.skipif(native.instructions != "AVX512", reason="these are AVX2's already")
def test_with_avx2_too():
    """All of this again, for the instructions that a processor with AVX-512 does not choose."""
    files = (str(Path(__file__).with_name(name)) for name in TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *files]
    done = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- attention

maps = st.fixed_dictionaries(
    {
        "n": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "height": st.integers(1, 24),
        "width": st.integers(1, 24),
        "d": st.integers(1, 35),
        "e": st.integers(1, 9),
        "seed": seeds,
    }
)


def exact(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return gradients(relative_attention, [t.detach().double().requires_grad_() for t in inputs])


@drawn
@given(maps, st.sampled_from([0.1, 1.0, 4.0]))
def test_attention_is_the_reference(shape, scale):
    inputs = make_inputs(**shape, scale=scale, dtype=torch.float32)
    found = gradients(native_relative_attention, inputs)
    assert_same([t.double() for t in found], exact(inputs), 1e-4 * max(1.0, scale**2))


def test_large_maps_in_many_chunks():
    inputs = make_inputs(n=1, heads=2, height=41, width=37, d=20, e=3, dtype=torch.float32)
    assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    inputs = make_inputs(n=2, heads=3, height=9, width=11, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-5)
    finally:
        torch.set_num_threads(before)


def test_any_layout():
    inputs = make_inputs(dtype=torch.float32)
    expected = exact(inputs)
    for order in ((0, 2, 3, 1, 4), (4, 3, 2, 1, 0), (0, 1, 2, 3, 4)):
        back = [order.index(axis) for axis in range(5)]
        laid = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in inputs[:3]]
        found = gradients(native_relative_attention, [*laid, *inputs[3:]])
        assert_same([t.double() for t in found], expected, 1e-5)


def test_tables_made_for_another_resolution():
    *qkv, _, _ = make_inputs(dtype=torch.float32)
    inputs = [*qkv, *make_inputs(height=4, width=9, dtype=torch.float32)[3:]]
    assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-5)


@pytest.mark.parametrize("size", [1e4, 1e12])
def test_logits_that_would_overflow(size):
    q, k, v, *tables = (t.detach() for t in make_inputs(dtype=torch.float32))
    inputs = [q * size, k * size, v, *tables]
    expected = relative_attention(*(t.double() for t in inputs))
    torch.testing.assert_close(native_relative_attention(*inputs).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_large_values_whatever_the_logits(scale):
    """Up to both sides of the sums from which the largest logit is subtracted."""
    q, k, v, *tables = make_inputs(height=9, width=9, dtype=torch.float32, scale=scale)
    inputs = [q, k, v * 1e9, *tables]
    expected = relative_attention(*(t.double() for t in inputs))
    torch.testing.assert_close(
        native_relative_attention(*inputs).double(), expected, rtol=1e-4, atol=1e-4 * 1e9 * scale
    )


def test_a_nan_stays_one():
    q, *others = (t.detach() for t in make_inputs(dtype=torch.float32))
    q[0, 0, 0, 0, 0] = float("nan")
    out = native_relative_attention(q, *others)
    assert out[0, 0, 0, 0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    half = make_inputs(height=14, width=9, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(native_relative_attention, half)
    assert {t.dtype for t in found} == {dtype}
    expected = relative_attention(*(t.detach().double() for t in half))
    torch.testing.assert_close(found[0].double(), expected, rtol=2**-8, atol=1e-6)


def test_what_attention_cannot_do_it_says():
    inputs = make_inputs(dtype=torch.float32)
    first = torch.autograd.grad(native_relative_attention(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; use augment_cli.layers.attention"):
        torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
    with pytest.raises(ValueError, match=r"at most 32 bits.*use augment_cli.layers.attention"):
        native_relative_attention(*make_inputs())


def test_attention_trains_in_a_hundredth_of_the_memory():
    inputs = make_inputs(n=1, heads=2, height=56, width=56, d=20, e=1, dtype=torch.float32)
    logits = 2 * 56**4 * 4
    assert peak_bytes(partial(gradients, native_relative_attention, inputs)) < 2 * logits / 10


def test_the_rule_takes_the_kernel_for_attention():
    q = make_inputs(dtype=torch.float32)[0]
    assert choose_path(q) == choose_path(q.bfloat16()) == "native"
    assert choose_path(q.double()) == choose_path(q.to("meta")) == "reference"


# ---- AW's convolution


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


def layer_of(seed: int, way: str | None, **arguments) -> AWConv2d:
    layer = randomised(AWConv2d(**arguments), seed)
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.expand.weight.mul_(0.1)
    layer.way = way
    return layer


@drawn
@given(convolutions(), st.sampled_from([8, 16]), seeds)
def test_convolution_equals_the_formula(case, reduction, seed):
    arguments, shape = case
    reduction = max(reduction, native.lanes())
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
            results(layer_of(0, way, in_channels=shape[1], out_channels=128, kernel_size=3, padding=1), x)
            for way in ("native", "chunked")
        )
        for name, b in expected.items():
            assert (found[name] - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max())), name


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_number_of_a_convolution(threads):
    geometry = per_sample.Geometry((3, 3), (1, 1), (0, 0), (1, 1))
    shapes = (5, 64, 9, 11), (96, 64, 3, 3), (4, 96), (5, 4, 3, 3)  # x, kernel, mixing, scales
    inputs = [normal(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate(shapes)]
    run = partial(attended.attended_conv, geometry=geometry, way="native")
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
    assert native_relative_attention(*make_inputs(n=0, dtype=torch.float32)).shape == (0, 2, 6, 5, 3)


def test_several_calls_at_once():
    layer = layer_of(0, "native", in_channels=64, out_channels=64, kernel_size=3, padding=1)
    maps = [normal(2, 64, 9, 8, seed=i, dtype=torch.float32) for i in range(8)]
    heads = [[t.detach() for t in make_inputs(seed=i, height=9, dtype=torch.float32)] for i in range(8)]
    run = [lambda x: results(layer, x)["weight"], lambda qkv: native_relative_attention(*qkv)]
    with ThreadPoolExecutor(4) as pool:
        for function, inputs in zip(run, (maps, heads), strict=True):
            for found, expected in zip(pool.map(function, inputs * 4), [function(x) for x in inputs] * 4, strict=True):
                torch.testing.assert_close(found, expected)


def test_padding_that_no_window_sees():
    arguments = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "stride": 8, "padding": 4}
    x = normal(2, 32, 1, 2, seed=1, dtype=torch.float32)
    found, expected = (results(layer_of(0, way, **arguments), x) for way in ("native", "grouped"))
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


def test_second_derivatives_and_transforms_go_another_way():
    layer = layer_of(0, None, in_channels=32, out_channels=32, kernel_size=3, padding=1)
    x = normal(2, 32, 4, 3, seed=3, dtype=torch.float32).requires_grad_()
    assert attended.fastest_way(x, layer.weight, layer.geometry, 2) == "native"

    def run() -> list[torch.Tensor]:
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), x)
        return [*second, torch.func.vmap(layer)(torch.stack([x, x])), torch.func.jvp(layer, (x,), (x,))[1]]

    found = run()
    layer.way = "grouped"
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
    assert attended.fastest_way(x, layer.weight, layer.geometry, layer.expand.groups) != "native"
    layer.way = "native"
    with pytest.raises(ValueError, match=r"no compiled kernel|dense kernels only"):
        layer(x)


def test_the_rule_leaves_autocast_and_other_devices():
    x, geometry = torch.zeros(2, 32, 5, 5), per_sample.Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    weight = torch.zeros(32, 32, 3, 3)
    assert attended.fastest_way(x, weight, geometry, 2) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert attended.fastest_way(x, weight, geometry, 2) != "native"
    assert attended.fastest_way(x.to("meta"), weight.to("meta"), geometry, 2) == "grouped"


def test_convolution_holds_a_bounded_amount():
    layer = layer_of(0, "native", in_channels=256, out_channels=256, kernel_size=3, padding=1)
    small, large = (normal(n, 256, 4, 4, seed=1, dtype=torch.float32) for n in (192, 576))
    held = [peak_bytes(partial(results, layer, x)) for x in (small, large)]
    assert held[1] - held[0] <= 6 * (large.nbytes - small.nbytes)
    assert held[0] <= 5 * layer.weight.nbytes + 2**23 + 6 * small.nbytes  # 192 kernels would be 453 MB


# ---- compilers and exporters

layers = pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (partial(AWConv2d, 32, 64, 3, stride=(2, 1), padding=1), "augment_cli.attended_conv"),
        (
            partial(AAConv2d, 32, 32, 3, heads=2, key_channels=16, value_channels=8, resolution=7),
            "augment_cli.relative_attention",
        ),
    ],
    ids=["aw", "aa"],
)


@layers
def test_torch_compile_is_given_an_operator(layer, operator):
    layer, seen = randomised(layer(), 0), []

    def backend(module, example):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    for batch in (2, 3, 5):
        x = normal(batch, 32, 9, 9, seed=1, dtype=torch.float32)
        for compiler in (backend, "aot_eager"):
            found = results(torch.compile(layer, backend=compiler, fullgraph=True), x)
            for name, expected in results(layer, x).items():
                a = found[name] if name in found else found[f"_orig_mod.{name}"]
                assert (a - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), name
    exporting = torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(torch.zeros(1))
    assert any(operator in target for target in seen) != bool(exporting)  # which torch 2.9 believes it is


@layers
def test_operators_are_what_torch_wants_of_them(layer, operator):
    q, k, v, *tables = (t.detach().clone().requires_grad_() for t in make_inputs(n=1, heads=1, dtype=torch.float32))
    if "attention" in operator:
        maps = (t.movedim(-1, 2).flatten(3).contiguous().detach().requires_grad_() for t in (q, k, v))
        torch.library.opcheck(torch.ops.augment_cli.relative_attention.default, (*maps, *tables))
    else:
        shapes = (2, 32, 5, 6), (32, 2, 16, 9), (32, 2, 1, 1), (2, 2, 1, 9)
        tensors = (normal(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate(shapes))
        arguments = *tensors, [3, 3], [2, 1], [1, 0], [1, 1], "native"
        torch.library.opcheck(torch.ops.augment_cli.attended_conv.default, arguments)


@layers
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_exported_or_traced_runs_without_us(layer, operator):
    layer, x = randomised(layer(), 0), normal(2, 32, 9, 9, seed=1, dtype=torch.float32)
    exported = torch.export.export(layer, (x,))
    assert operator not in str(exported.graph_module.code)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert "augment_cli::" not in str(traced.inlined_graph)
    expected = layer(x)
    for out in (exported.module()(x), traced(x)):
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


# ---- without them


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(
    "layer", [AWConv2d(32, 32, 3), AAConv2d(32, 32, 3, heads=2, key_channels=16, value_channels=8, resolution=7)]
)
def test_layers_do_without(layer):
    layer = randomised(layer, 0)
    x = normal(2, 32, 7, 7, seed=0, dtype=torch.float32)
    assert torch.isfinite(layer(x)).all()


def test_a_library_of_other_sources_is_not_taken(tmp_path, monkeypatch):
    for path in native.HERE.iterdir():
        if path.suffix in (".cpp", ".h", ".so"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "HERE", tmp_path)
    assert native._load()[0] == native.instructions
    (tmp_path / "vector.h").write_text("// changed")
    assert native._load() == (None, None)
