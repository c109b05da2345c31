"""Two models held against each other."""

import copy
import json

import pytest
import timm
import torch

import augment_cli as augment
from augment_cli.errors import AugmentError
from tests.cli.helpers import ok, run
from tests.surgery.test_calibration import picture_folder
from tests.surgery.test_replace import randomized

RECIPES = ["aa", "aw", "aa-aw"]


def by_name(found):
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_carried_is_the_sources_and_what_is_new_is_in_one(recipe):
    source = randomized("test_resnet")
    model = augment.convert(source, recipe, "budget.params=free")
    found = augment.diff(source, model)
    assert {tensor.state for tensor in found.tensors if tensor.kind in ("carried", "buffer")} == {"equal"}
    added = [tensor for tensor in found.tensors if tensor.kind == "new"]
    assert added
    assert {tensor.state for tensor in added} == {"only there"}
    assert {t.state for t in augment.diff(model, source).tensors if t.kind == "new"} == {"only here"}
    assert len(found.tensors) == len(model.state_dict())


@pytest.mark.parametrize("recipe", RECIPES)
def test_distances_are_those_of_the_tensors(recipe):
    model = augment.convert(randomized("test_resnet"), recipe, "budget.params=free")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.fc.weight.mul_(1.25)
        tuned.conv1[0].weight.zero_()
        tuned.layer4[0].conv1.weight.add_(1)
    found = by_name(augment.diff(model, tuned))
    assert found["fc.weight"].distance == pytest.approx(0.25, rel=1e-5)
    assert found["conv1.0.weight"].distance == pytest.approx(1)
    assert sum(tensor.state == "moved" for tensor in found.values()) == 3
    assert all(tensor.distance == 0 for tensor in found.values() if tensor.state == "equal")


def test_models_of_other_plans_differ_in_shape_and_by_site():
    source = randomized("test_resnet")
    one = augment.convert(source, "aa", "aa.value_ratio=0.25", "select.names=layer4.*")
    other = augment.convert(source, "aa", "aa.value_ratio=0.5", "select.names=layer4.*")
    found = augment.diff(one, other)
    assert {t.state for t in found.tensors if t.name.endswith("qkv.weight")} == {"another shape"}
    assert found.plans.differing["test_resnet"]
    assert not augment.diff(one, one).plans.differing


def test_the_command_says_it_in_every_form(in_tmp):
    source = randomized("test_resnet", num_classes=5)
    torch.save(source.state_dict(), "source.pt")
    options = ("test_resnet", "-a", "num_classes=5", "--img-size", "32", "--checkpoint", "source.pt")
    ok("convert", *options, "-r", "aa", "-o", "aa")
    ok("convert", *options, "-r", "aw", "-o", "aw.safetensors")
    picture_folder(in_tmp / "pictures", 25)
    found = json.loads(ok("diff", "source.pt", "aw.safetensors", "--images", "pictures", "-f", "json").stdout)
    assert found["agreement"]["images"] == 25
    assert found["agreement"]["agreement"] == 1
    assert found["agreement"]["divergence"] < 1e-6
    assert (
        json.loads(ok("diff", "source.pt", "aa", "-d", "pictures", "-f", "json").stdout)["agreement"]["divergence"] > 0
    )
    for suffix in ("html", "csv", "md", "txt"):
        ok("diff", "aa", "aw.safetensors", "-o", f"d.{suffix}")
        assert "layer4.0.conv1" in (in_tmp / f"d.{suffix}").read_text()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("w.pt", "w.pt"), "neither"),
        (("m.safetensors", "none.safetensors"), "no such file"),
        (("m.safetensors", "resnet18"), "not the source"),
        (("m.safetensors", "other.pt"), "does not fit"),
        (("m.safetensors", "m.safetensors", "--images", "none"), "none"),
        (("m.safetensors", "m.safetensors", "--count", "3"), "20"),
        (("m.safetensors", "m.safetensors", "-o", "m.safetensors"), "suffix"),
    ],
)
def test_wrong_arguments_are_one_line(in_tmp, arguments, word):
    torch.save(timm.create_model("test_resnet").state_dict(), "w.pt")
    torch.save(timm.create_model("resnet10t").state_dict(), "other.pt")
    ok("convert", "test_resnet", "-r", "aw", "-o", "m.safetensors")
    result = run("diff", *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_neither_is_a_converted_model():
    with pytest.raises(AugmentError, match="neither"):
        augment.diff(timm.create_model("test_resnet"), timm.create_model("test_resnet"))


def test_one_tensor_is_one(in_tmp):
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*")
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.fc.bias.add_(1)
    text = str(augment.diff(model, tuned))
    assert "1 tensor moved" in text


def test_pretrained_weights_that_cannot_be_had_are_asked_for_as_a_file(monkeypatch):
    create = timm.create_model

    def without_hub(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no connection")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", without_hub)
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*")
    with pytest.raises(AugmentError, match="Give a file of weights in place of test_resnet"):
        augment.diff("test_resnet", model)
