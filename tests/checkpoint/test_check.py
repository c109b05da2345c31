import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.checkpoint.check import verify_file
from augment_cli.errors import AugmentError
from augment_cli.formats import METADATA_KEY
from augment_cli.operators.aa import AA
from augment_cli.reporting.output import write_model
from tests.conftest import graph_of, plan_of


@pytest.fixture
def saved(tmp_path):
    described, _ = source.describe("test_resnet")
    model = source.create(described)
    metadata = conversion.operate(model, plan_of("test_resnet", "aa"), graph_of("test_resnet"), "random, seed 0")
    write_model(model, metadata, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def rewrite(path, change_plan=lambda plan: None, change_tensors=lambda tensors: None):
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    data, tensors = json.loads(metadata[METADATA_KEY]), load_file(path)
    change_plan(data["plan"])
    change_tensors(tensors)
    save_file(tensors, path, metadata | {METADATA_KEY: json.dumps(data)})


def failed(path) -> list[str]:
    return [finding.what for finding in verify_file(path) if not finding.passed]


def test_a_whole_file_passes_every_check(saved):
    findings = verify_file(saved)
    assert all(finding.passed for finding in findings)
    assert [finding.what for finding in findings] == ["parameters", "multiply-adds", "forward pass"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_found(saved, value):
    rewrite(saved, change_tensors=lambda tensors: tensors["fc.bias"].fill_(value))
    assert failed(saved) == ["forward pass"]


def miscount(monkeypatch, count: str, errors: dict[str, int]) -> None:
    """Have plans count some sites wrong. A plan recounts whatever is written in it: only its formulas can be off."""
    right = getattr(AA, count)
    monkeypatch.setattr(AA, count, lambda self, site, split: right(self, site, split) + errors.get(site.name, 0))


def test_the_wrong_count_of_one_site_is_found_though_the_totals_are_right(saved, monkeypatch):
    names = [site.name for site in plan_of("test_resnet", "aa").sites]
    miscount(monkeypatch, "params", {names[0]: 1, names[1]: -1})
    assert failed(saved) == [f"parameters of {names[0]}", f"parameters of {names[1]}"]


def test_wrong_totals_are_found(saved, monkeypatch):
    names = [site.name for site in plan_of("test_resnet", "aa").sites]
    miscount(monkeypatch, "macs", {names[0]: 1})
    assert failed(saved) == ["multiply-adds"]
    miscount(monkeypatch, "params", {names[0]: 1})
    assert failed(saved) == ["parameters", "multiply-adds", f"parameters of {names[0]}"]


def test_images_of_another_size_than_the_counts_are_of_are_not_tried(saved):
    """A forward pass of 8192 x 8192 would take all memory."""
    rewrite(saved, lambda plan: plan.update(input_size=[3, 8192, 8192]))
    assert failed(saved) == ["multiply-adds"]


def test_images_that_the_model_cannot_take_are_an_error(saved):
    rewrite(saved, lambda plan: plan.update(input_size=[4, 64, 64]))
    with pytest.raises(AugmentError, match="does not run on an image of 4x64x64"):
        verify_file(saved)


def test_outputs_are_checked_on_an_image_that_is_the_same_each_time(saved):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    verify_file(saved)
    assert torch.equal(torch.get_rng_state(), state)
