"""On CUDA "auto" takes Triton's kernels, and a compiler finds one graph. Fake tensors need no GPU for it."""

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses import FakeTensorMode

from augment_cli.layers import AAConv2d, AWConv2d, triton
from tests.layers.helpers import needs_triton

pytestmark = needs_triton

LAYERS = {
    "aa": lambda: AAConv2d(8, 8, 3, heads=2, key_channels=8, value_channels=4, resolution=26, device="cuda"),
    "aw": lambda: AWConv2d(8, 8, 3, padding=1, reduction=2, device="cuda"),
}
OPERATORS = {"aa": "triton_attention", "aw": "attended_conv"}


def compiled_operators(name: str) -> list[str]:
    """Operators of this package in the one graph of a compiled layer on CUDA."""
    return [target.split(".")[1] for target in compiled_targets(name) if target.startswith("augment_cli.")]


def compiled_targets(name: str) -> list[str]:
    """All that is called in that graph."""
    seen = []

    def compiler(module, example):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    with FakeTensorMode():
        out = torch.compile(LAYERS[name](), backend=compiler, fullgraph=True)(torch.empty(2, 8, 28, 28, device="cuda"))
    assert out.device.type == "cuda"
    return seen


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU on which Triton works."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(triton, "_start", lambda: None)
    triton._check_gpu.cache_clear()
    torch.compiler.reset()
    yield
    triton._check_gpu.cache_clear()


@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_with_triton(name):
    assert compiled_operators(name) == [OPERATORS[name]]


@pytest.mark.parametrize("name", LAYERS)
def test_a_gpu_that_is_too_old(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert not compiled_operators(name)
    assert "7.5, below 8.0" in triton._check_gpu(0)


@pytest.mark.parametrize("name", LAYERS)
def test_no_triton(name, monkeypatch):
    monkeypatch.setattr(triton, "INSTALLED", False)
    assert not compiled_operators(name)


@pytest.mark.parametrize("name", LAYERS)
def test_triton_without_its_compiler(name, monkeypatch):
    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton, "_start", fail)
    with pytest.warns(UserWarning, match=r"does not work here \(Failed to find C compiler"):
        assert not compiled_operators(name)
    assert not compiled_operators(name)


def test_aw_pools_by_a_product_in_deterministic_mode():
    """torch refuses the gradient of its adaptive pool there."""
    pools = []
    for mode in (False, True):
        torch.use_deterministic_algorithms(mode)
        try:
            pools.append(any("adaptive_avg_pool2d" in target for target in compiled_targets("aw")))
        finally:
            torch.use_deterministic_algorithms(False)
    assert pools == [True, False]


def test_a_triton_that_is_too_old(monkeypatch):
    import triton as library

    monkeypatch.undo()
    monkeypatch.setattr(library, "__version__", "3.5.1")
    with pytest.raises(RuntimeError, match="is older than"):
        triton._start()
