"""The compiled library: which one is loaded, what compilers and exporters see of it, and the layers without it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from augment_cli.layers import AAConv2d, AWConv2d, native
from tests.layers.aa.test_backends import make_inputs
from tests.layers.aw.test_backends import results
from tests.layers.helpers import needs_kernels, normal, randomised

pytestmark = needs_kernels


def test_a_library_was_compiled():
    assert native.library.instructions in native.LANES


@pytest.mark.skipif(
    native.library is None or native.library.instructions != "AVX512", reason="these are AVX2's already"
)
def test_with_avx2_too():
    """Run these tests again with the instruction set that a processor with AVX-512 does not choose."""
    here = Path(__file__).parent
    folders = here, here.parent / "aa" / "test_large_logits.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *folders]
    done = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
    assert native._load().instructions == native.library.instructions
    (tmp_path / "vector.h").write_text("// changed")
    assert native._load() is None
