import functools
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported, as torch.utils.flop_counter does
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's deterministic mode asks for it on CUDA

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.recipe import load_recipe

TESTS = Path(__file__).parent

# Tests that start processes, train, or go through many models: what `make test-fast` leaves out.
SLOW = (
    "analysis/test_cache.py",
    "attention",
    "benchmarks",
    "checkpoint/test_rebuild.py",
    "cli/test_bad_input.py",
    "cli/test_escaping.py",
    "cli/test_fit.py",
    "cli/test_latency.py",
    "cli/test_outputs.py",
    "detection",
    "docs/test_pages.py",
    "doors",
    "examples",
    "exporting",
    "families",
    "gpu",
    "interop",
    "layers/native/test_library.py",
    "layers/test_in_torch.py",
    "layers/triton",
    "operators",
    "publishing",
    "surgery/inherit/test_fit.py",
    "test_comparison.py",
    "test_dataset.py",
    "training/test_command_line.py",
    "training/test_compile.py",
    "training/test_distributed.py",
    "training/test_finetune.py",
    "training/test_float16.py",
    "training/test_memory.py",
    "training/test_resume.py",
    "training/test_timm_script.py",
    "training/test_transfer.py",
)
NATIVE = ("layers/native",)

os.environ["AUGMENT_CACHE"] = "off"  # a test that keeps analyses names a folder of its own

# The workers of a parallel run share the cores: one thread each.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, names in ((pytest.mark.slow, SLOW), (pytest.mark.native, NATIVE)):
        paths = [TESTS / name for name in names]
        if missing := [str(path) for path in paths if not path.exists()]:
            raise pytest.UsageError(f"tests/conftest.py marks what is not there: {', '.join(missing)}")
        for item in items:
            if any(item.path.is_relative_to(path) for path in paths):
                item.add_marker(mark)


@functools.cache
def graph_of(name: str, image_size: tuple[int, int] | None = None) -> ModelGraph:
    described, model = source.describe(name, image_size=image_size)
    return analyze(model, described.input_size)


@functools.cache
def plan_of(name: str, recipe: str, *overrides: str) -> Plan:
    return make_plan(name, graph_of(name), load_recipe(recipe, overrides))[0]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
