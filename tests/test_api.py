"""A notebook does what the command line does: models by name, by function and as objects, saved and loaded."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import augment_cli as augment
from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.planning.plan import Plan


class Small(nn.Module):
    """A hand-written network that no library knows."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(3))
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def randomized(model: nn.Module) -> nn.Module:
    """In double precision, the normalisations away from their initial values."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 1, 2)
    return model.double().eval()


def backbone() -> nn.Module:
    """A detector's feature pyramid, whose outputs are a dictionary."""
    detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    return detector.backbone


def outputs(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(x)
    return list(out.values()) if isinstance(out, dict) else [out]


@pytest.mark.parametrize("make", [lambda: torchvision.models.resnet50(num_classes=7), backbone, Small])
def test_aw_on_any_model_computes_what_the_source_does_and_comes_back_from_its_file(make, tmp_path):
    source, x = randomized(make()), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    state = copy.deepcopy(source.state_dict())
    model = augment.convert(source, "aw", input_size=(64, 96))
    assert any(isinstance(module, AWConv2d) for module in model.modules())
    for ours, theirs in zip(outputs(model, x), outputs(source, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items())
    augment.save(model, tmp_path / "folder")
    with pytest.raises(augment.AugmentError, match="base"):
        augment.load(tmp_path / "folder")
    for base in (source, lambda: make().double()):
        again = augment.load(tmp_path / "folder", base=base).eval()
        for ours, theirs in zip(outputs(again, x), outputs(model, x), strict=True):
            assert torch.equal(ours, theirs)


def test_aa_keeps_filters_of_a_torchvision_model_bit_for_bit():
    source = randomized(torchvision.models.resnet18())
    model = augment.convert(source, "aa", input_size=64)
    for site in model.augment_metadata.plan.sites:
        old, new = source.get_submodule(site.name), model.get_submodule(site.name)
        kept = new.channel_order < new.conv.out_channels
        x = torch.randn(
            1, site.in_channels, *(side * stride for side, stride in zip(site.resolution, site.stride, strict=True))
        )
        assert torch.equal(new.conv.weight, old.weight[kept])
        torch.testing.assert_close(new(x.double())[:, kept], old(x.double())[:, kept])


def test_stages_of_torchvisions_resnet_are_those_of_timms():
    ours = augment.plan("torchvision.models:resnet50", "aa-resnet", input_size=224)
    timms = augment.plan("resnet50", "aa-resnet")
    assert [(s.name, s.split) for s in ours.sites] == [(s.name, s.split) for s in timms.sites]
    assert ours.params_after == timms.params_after == 25_809_392


def test_a_timm_model_as_an_object_stays_one(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    source.reset_classifier(5)
    model = augment.convert(source, "aa", input_size=48)
    assert (model.augment_metadata.plan.base, dict(model.augment_metadata.plan.model_args)["num_classes"]) == (
        "timm",
        5,
    )
    augment.save(model, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_changed_timm_model_is_one_that_timm_cannot_make():
    source = timm.create_model("test_resnet")
    source.fc = nn.Sequential(nn.Linear(source.num_features, 8), nn.ReLU(), nn.Linear(8, 3))
    assert augment.plan(source, input_size=48).base == "other"


def test_a_plan_is_given_in_place_of_a_recipe_and_a_model_left_as_it_is():
    plan = augment.plan("test_resnet", "aa-aw", "budget.params=+5%", input_size=(48, 64))
    assert isinstance(plan, Plan)
    assert plan.input_size == (3, 48, 64)
    source = timm.create_model("test_resnet")
    model = augment.convert(source, plan)
    assert model.augment_metadata.plan.sites == plan.sites
    assert not any(isinstance(module, AAConv2d) for module in source.modules())


def test_what_the_conversion_knows_survives_copies_pickle_and_training(tmp_path):
    model = augment.convert("test_resnet", "aa", input_size=48)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    optimizer = torch.optim.SGD(augment.param_groups(other, lr=0.1), lr=0.1)
    other(torch.randn(2, 3, 48, 48)).sum().backward()
    optimizer.step()
    augment.save(other, tmp_path / "m.safetensors")
    again = augment.load(tmp_path / "m.safetensors")
    assert again.augment_metadata == model.augment_metadata
    assert torch.equal(again.fc.weight, other.fc.weight)
    assert not torch.equal(again.fc.weight, model.fc.weight)


@pytest.mark.parametrize("kind", ["bytes", "floats", "items"])
def test_calibration_images_are_a_tensor_or_any_data_set(kind):
    images = torch.randint(0, 256, (24, 3, 48, 48), dtype=torch.uint8)
    given = {"bytes": images, "floats": images.float() / 255, "items": [(image, 0) for image in images]}[kind]
    model = augment.convert("test_resnet", "aa", calibrate=given, input_size=48)
    assert model.augment_metadata.fidelity.fitted_on == 20
    assert {record.kind for record in model.augment_metadata.inheritance} == {"fitted"}


@pytest.mark.parametrize(
    ("images", "word"),
    [(torch.zeros(30, 3, 40, 48), "3x40x48"), (torch.zeros(3, 3, 48, 48), "3 images"), (7, "calibrate")],
)
def test_wrong_calibration_images_are_refused(images, word):
    with pytest.raises(augment.AugmentError, match=word):
        augment.convert("test_resnet", "aa", calibrate=images, input_size=48)


def test_check_and_report_take_models_plans_and_files(tmp_path):
    model = augment.convert(Small(), "aa", input_size=32)
    assert all(finding.passed for finding in augment.check(model))
    augment.save(model, tmp_path / "m.safetensors")
    assert all(finding.passed for finding in augment.check(tmp_path / "m.safetensors", base=Small))
    plan = model.augment_metadata.plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    reports = [augment.report(x) for x in (model, plan, tmp_path / "m.safetensors", tmp_path / "plan.json")]
    assert len({report.params.after for report in reports}) == 1
    assert "Small" in str(reports[0])
    assert "<html" in reports[0].to("html")
    with pytest.raises(augment.AugmentError, match="no report as htm"):
        reports[0].to("htm")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: augment.convert(Small(), "aa"), "input_size"),
        (lambda: augment.convert(Small(), "aa", pretrained=True), "pretrained"),
        (lambda: augment.convert(Small(), "aa", input_size=32, depth=3), "depth"),
        (lambda: augment.convert(augment.convert("test_resnet"), "aa"), "converted model already"),
        (lambda: augment.save(nn.Linear(1, 1), "x"), "Linear is not a converted model"),
        (lambda: augment.report(nn.Linear(1, 1)), "Linear is not a converted model"),
        (lambda: augment.plan("torchvision.models:resnet51", input_size=64), "no function resnet51"),
        (lambda: augment.plan("no.such.package:f", input_size=64), "cannot be imported"),
        (lambda: augment.plan("os:getcwd", input_size=64), "makes no model"),
        (lambda: augment.load("test_resnet"), "no such file"),
    ],
)
def test_bad_input_gets_one_message(call, word):
    with pytest.raises(augment.AugmentError, match=word):
        call()


def test_the_package_lists_its_names_and_is_cheap_to_import():
    code = (
        "import sys, augment_cli; assert not {'torch', 'timm'} & sys.modules.keys(); "
        "assert set(augment_cli.__all__) <= set(dir(augment_cli)); print(augment_cli.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == augment.__version__


@pytest.mark.parametrize("input_size", [48, (48, 48), (3, 48, 48)])
def test_an_image_size_is_given_in_the_same_ways_everywhere(input_size):
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*", input_size=input_size)
    assert model.augment_metadata.plan.input_size == (3, 48, 48)
    assert augment.compare("test_resnet", input_size=input_size).candidates[0].input_size == (3, 48, 48)
    point, *_ = augment.frontier("test_resnet", points=2, input_size=input_size).points
    assert point.plan.input_size == (3, 48, 48)
    found = augment.attention_maps(model, Image.new("RGB", (9, 9)), input_size=input_size)
    assert found.seen[0].pixels.shape == (48, 48, 3)


@pytest.mark.parametrize("input_size", ["64", 0, (1, 2, 3, 4), (48,), (48.0, 48), (1, 48, 48)])
def test_no_image_size_is_taken_for_another(input_size):
    for made in (augment.plan, augment.compare, augment.frontier):
        with pytest.raises(augment.InputError, match="input_size"):
            made("test_resnet", input_size=input_size)


def test_nothing_to_compare_or_to_look_at_is_said():
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*", input_size=48)
    for call in (augment.compare, lambda: augment.attention_maps(model, []), lambda: augment.attention_maps([], "p")):
        with pytest.raises(augment.InputError, match="nothing to"):
            call()


def test_one_value_is_taken_where_several_may_be_given(tmp_path):
    override = "budget.params=-2%"
    (tmp_path / "mine.toml").write_text('description = "d"\noperator = "aa"\n')
    several = augment.compare("test_resnet", recipe=["aa"], overrides=[override])
    assert augment.compare("test_resnet", recipe="aa", overrides=override) == several
    assert augment.load_recipe("aa", override) == augment.load_recipe("aa", [override])
    assert augment.compare("test_resnet", recipe=tmp_path / "mine.toml").candidates[1].plan.recipe == "mine"
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*", input_size=48)
    found = augment.attention_maps(model, Image.new("RGB", (9, 9)), layers="layer4.*conv2", heads=1)
    assert [(layer.name, layer.numbers) for layer in found.seen[0].layers] == [("layer4.0.conv2", (1,))]


def test_overrides_beside_a_recipe_that_was_loaded_are_refused_everywhere():
    recipe, override = augment.load_recipe("aa"), "budget.params=keep"
    for call in (
        lambda: augment.plan("test_resnet", recipe, override),
        lambda: augment.frontier("test_resnet", recipe, override),
        lambda: augment.compare("test_resnet", recipe=recipe, overrides=override),
    ):
        with pytest.raises(augment.InputError, match="taken as it is"):
            call()
    with pytest.raises(augment.InputError, match="as a string"):
        augment.plan("test_resnet", "aa", [override])


def test_findings_show_their_tables_and_not_their_fields():
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*", input_size=48)
    image = Image.new("RGB", (9, 9))
    found = (
        augment.report(model),
        augment.compare("test_resnet", recipe="aa"),
        augment.frontier("test_resnet", points=2),
        augment.diff(model, model),
        augment.attention_maps(model, image),
    )
    for one in found:
        assert repr(one) == str(one)
        assert "(" not in repr(one).splitlines()[0]
