"""Every backend of both layers computes on a GPU what the formula says, in every way that torch runs layers."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from augment_cli.layers import AAConv2d, AWConv2d
from tests.gpu.helpers import (
    COMPILER,
    CUDA,
    DEVICE,
    PRECISIONS,
    assert_near,
    assert_same_bits,
    backends,
    exact,
    needs_cuda,
    on_cuda,
    run,
)


class Case(NamedTuple):
    """A layer and the shape of its input. `plain` is the backend that is held to be right, in float64 on the CPU."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    plain: str


def aa(*size: int, batch: int = 1, **options) -> Case:
    split = {"heads": 2, "key_channels": 40, "value_channels": 12, **options}
    make = lambda: AAConv2d(8, 20, 3, padding=1, bias=False, **split, resolution=size)  # noqa: E731
    return Case(make, (batch, 8, *size), "reference")


def aw(*size: int, batch: int = 2, **options) -> Case:
    def make() -> nn.Module:
        layer = AWConv2d(16, 12, 3, reduction=8, **{"padding": 1, **options})
        nn.init.normal_(layer.expand.weight, std=0.3)
        for part in (layer.reduce, layer.mix):  # open ReLUs: at zero rounding would decide of a gradient
            part.weight.data.abs_()
        return layer

    return Case(make, (batch, 16, *size), "grouped")


AA = {"4x5": aa(4, 5), "7x7": aa(7, 7, batch=2), "14x14": aa(14, 14, batch=2), "28x28": aa(28, 28), "50x84": aa(50, 84)}
AW = {
    "same": aw(5, 6),
    "strided": aw(7, 6, stride=2),
    "dilated": aw(6, 7, dilation=2, padding=2),
    "28x28": aw(28, 28, batch=4),
    "28x28 strided": aw(28, 28, batch=4, stride=2),
    "28x28 dilated": aw(28, 28, batch=4, dilation=2, padding=2),
}
SMALL = {"aa": AA["4x5"], "aw": AW["same"]}
AA_BACKENDS = ("reference", "blocked", "fused", "triton", "auto")
AW_BACKENDS = ("grouped", "chunked", "unfolded", "static", "triton", "auto")
"""All but `native`, which is for CPUs."""

BOTH = [*(("aa", name) for name in AA_BACKENDS), *(("aw", name) for name in AW_BACKENDS)]
each_backend = pytest.mark.parametrize(
    ("layer", "backend"),
    [pytest.param(layer, *backends(name)[0].values, marks=backends(name)[0].marks) for layer, name in BOTH],
)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


def made(case: Case, backend: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    layer, x = case.make(), torch.randn(case.shape) + 0.5
    layer.backend = backend
    return layer.to(DEVICE), x.to(DEVICE)


def check(case: Case, backend: str, precision: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
    """Result and gradients are near those in float64 on the CPU. `change` changes the input's layout."""
    layer, x = made(case, backend)
    wanted = PRECISIONS[precision]
    found = run(layer, change(x), wanted)
    assert_near(found, exact(layer, change(x).to(wanted.dtype), case.plain), wanted.tolerance)


@each_backend
@each_precision
def test_every_backend_in_every_precision(layer, backend, precision):
    check(SMALL[layer], backend, precision)


@pytest.mark.parametrize("backend", backends("fused", "triton"))
@pytest.mark.parametrize("precision", ["float32", "tf32", "amp-bfloat16", "amp-float16"])
@pytest.mark.parametrize("size", [on_cuda(size) for size in AA if size != "4x5"])
def test_aa_on_maps_of_several_tiles(size, precision, backend):
    check(AA[size], backend, precision)


@pytest.mark.parametrize("backend", backends(*AW_BACKENDS))
@pytest.mark.parametrize("case", [case if "28" not in case else on_cuda(case) for case in AW if case != "same"])
def test_aw_strided_and_dilated(case, backend):
    check(AW[case], backend, "float32")


@pytest.mark.parametrize("backend", backends("fused", "triton"))
@pytest.mark.parametrize("options", [{"stride": 2}, {"attention_pool": 2}], ids=["strided", "pooled"])
def test_aa_strided_and_pooled(options, backend):
    layer = lambda: AAConv2d(8, 20, 3, padding=1, heads=2, key_channels=8, value_channels=4, resolution=4, **options)  # noqa: E731
    check(Case(layer, (2, 8, 7, 8), "reference"), backend, "float32")


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every_second_column": lambda x: torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part_of_the_channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout(layer, backend, layout):
    check(SMALL[layer], backend, "float32", layout)


FAST = [("aa", "fused"), ("aa", "triton"), ("aw", "grouped"), ("aw", "static"), ("aw", "triton")]
each_fast = pytest.mark.parametrize(
    ("layer", "backend"),
    [pytest.param(layer, *backends(name)[0].values, marks=backends(name)[0].marks) for layer, name in FAST],
)
LARGE = {"aa": AA["28x28"], "aw": AW["28x28"]} if CUDA else SMALL
"""For what goes wrong only where kernels take their time."""


@each_fast
@pytest.mark.parametrize("precision", ["amp-bfloat16", on_cuda("float32")])
def test_compiled(layer, backend, precision):
    torch.compiler.reset()
    module, x = made(SMALL[layer], backend)
    compiled = torch.compile(module, backend=COMPILER, fullgraph=True)
    found = run(module, x, PRECISIONS[precision], compiled)
    assert_near(found, exact(module, x, SMALL[layer].plain), PRECISIONS[precision].tolerance)


def captured(call: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """The call as a CUDA graph; without CUDA it is the call itself."""
    if not CUDA:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return {name: t.clone() for name, t in found.items()}

    return replay


@each_fast
def test_a_cuda_graph_of_both_passes(layer, backend):
    module, x = made(SMALL[layer], backend)
    replay = captured(lambda: run(module, x))
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        assert_near(replay(), exact(module, x, SMALL[layer].plain), PRECISIONS["float32"].tolerance)


@each_fast
def test_two_streams_at_once(layer, backend):
    pairs = [made(LARGE[layer], backend, seed) for seed in (1, 2)]
    expected = [run(module, x) for module, x in pairs]
    streams = [torch.cuda.Stream() if CUDA else None for _ in pairs]
    for stream in filter(None, streams):
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(4 if CUDA else 1):
        for stream, (module, x) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(module, x))
    if CUDA:
        torch.cuda.synchronize()
    for i, one in enumerate(found):
        assert_near(one, expected[i % 2], 1e-5)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch raises for operations that are not, and fills memory that is not written with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_fast
@pytest.mark.parametrize("precision", ["float32", "amp-bfloat16"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms(layer, backend, precision):
    wanted = PRECISIONS[precision]
    module, x = made(LARGE[layer], backend)
    first, second = (run(module, x, wanted) for _ in range(2))
    assert_same_bits(first, second)
    assert_near(first, exact(module, x, LARGE[layer].plain), wanted.tolerance)


@pytest.mark.parametrize("backend", backends("fused", "triton"))
@pytest.mark.usefixtures("deterministic")
def test_resized_tables_and_pooled_maps_in_deterministic_mode(backend):
    split = {"heads": 2, "key_channels": 8, "value_channels": 4, "resolution": 4, "attention_pool": 2}
    module, x = made(Case(lambda: AAConv2d(8, 20, 3, padding=1, **split), (2, 8, 7, 10), "reference"), backend)
    assert_near(run(module, x), exact(module, x, "reference"), PRECISIONS["float32"].tolerance)


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_aa_repeats_bit_for_bit_in_any_mode(backend, precision):
    module, x = made(LARGE["aa"], backend)
    first, second = (run(module, x, PRECISIONS[precision]) for _ in range(2))
    assert_same_bits(first, second)


@needs_cuda
def test_memory_grows_with_the_map_and_not_with_its_square():
    peaks = []
    for side in (28, 56):
        module, x = made(aa(side, side), "triton")
        run(module, x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(module, x)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 8 * peaks[0]
