import functools
from pathlib import Path

import pytest
import torch

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.recipe import load_recipe

# The workers of a parallel run share the cores: one thread each.
torch.set_num_threads(1)


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
