"""PEFT's LoRA on the parts of a converted model: trained, saved, loaded, and merged into plain weights."""

import copy

import pytest
import torch
from torch import nn

import augment_cli
from tests.interop.models import assert_near, converted, images, replaced

peft = pytest.importorskip("peft")

PARTS = {
    "aa": ["qkv", "proj", "conv", "fc"],
    "aw": ["reduce", "mix", "fc"],
    "aa-aw": ["qkv", "proj", "reduce", "fc"],
}


def adapted(model: nn.Module, targets: list[str] | str) -> nn.Module:
    """The model with adapters, trained for three steps."""
    torch.manual_seed(0)
    found = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=targets)).eval()
    assert_near(found(images(2, 3, 64, 64)), model(images(2, 3, 64, 64)))
    trained = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.2)
    for norm in found.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0  # an adapter's file has no running statistics
    found.train()
    for _ in range(3):
        optimizer.zero_grad()
        found(images(2, 3, 64, 64)).square().mean().backward()
        optimizer.step()
    assert 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters()) / 2
    return found.eval()


@pytest.mark.parametrize("recipe", PARTS)
def test_adapters_are_trained_saved_loaded_and_merged(tmp_path, recipe):
    model, x = converted("test_resnet", recipe), images(3, 3, 64, 64)
    found = adapted(model, PARTS[recipe])
    with torch.no_grad():
        expected = found(x)
        assert (expected - model(x)).abs().max() > 0.01 * expected.abs().max()
        found.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
        assert_near(again(x), expected, 1e-5)
        merged = again.merge_and_unload()
        assert_near(merged(x), expected)
        assert merged.state_dict().keys() == model.state_dict().keys()
        augment_cli.save(merged, tmp_path / "merged.safetensors")
        assert_near(augment_cli.load(tmp_path / "merged.safetensors").eval()(x), expected)


def test_an_adapter_beside_an_attended_kernel_is_saved_and_loaded_but_merges_only_nearly(tmp_path):
    model, x = converted("test_resnet", "aw"), images(3, 3, 64, 64)
    site = next(iter(replaced(model)))
    found = adapted(model, [site])
    with torch.no_grad():
        expected = found(x)
        found.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
        assert_near(again(x), expected, 1e-5)
        merged = again.merge_and_unload()(x)
    assert 1e-4 < (merged - expected).abs().max() / expected.abs().max() < 0.1
