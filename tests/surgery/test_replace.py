import pytest
import timm
import torch
from torch import nn

from augment_cli.analysis.graph import analyze
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.operators.modules import channel_order, select_filters
from augment_cli.planning.plan import Plan
from augment_cli.surgery import replace
from tests.conftest import graph_of, plan_of


def randomized(name: str, **args) -> nn.Module:
    """A model whose normalisations are not at their start, so that every channel counts and none alike."""
    model = timm.create_model(name, **args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


AW_MODELS = [
    *["resnet18", "tf_efficientnetv2_b0", "resnetv2_50x1_bit", "test_nfnet", "test_efficientnet", "test_byobnet"],
    *["resnext50_32x4d", "regnetx_002", "nf_regnet_b0"],
]


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "aw") for name in AW_MODELS), ("mobilenetv3_small_050", "aw-mobilenet")]
)
@pytest.mark.parametrize("training", [False, True])
def test_an_aw_model_is_the_sources_function(name, recipe, training):
    source = randomized(name).double()
    x = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    plan = plan_of(name, recipe)
    expected = _logits(source, x, training)
    replace.apply_plan(source, plan)
    assert sum(isinstance(m, AWConv2d) for m in source.modules()) == len(plan.sites)
    assert (_logits(source, x, training) - expected).abs().max() < 1e-10


def test_attention_takes_channels_of_every_group_and_the_others_stay_what_they_were():
    plan = plan_of("resnext50_32x4d", "aa", "select.kinds=grouped", "aa.value_ratio=0.25", "budget.params=free")
    source, converted = (randomized("resnext50_32x4d").eval() for _ in range(2))
    converted.load_state_dict(source.state_dict())
    replace.apply_plan(converted, plan)
    site = plan.sites[-1]
    conv, new = source.get_submodule(site.name), converted.get_submodule(site.name)
    assert new.conv.groups == 32
    assert new.conv.out_channels == site.out_channels - site.given_up
    x = torch.randn(2, site.in_channels, 7, 7)
    kept = new.channel_order < new.conv.out_channels
    assert set(kept.unflatten(0, (32, -1)).sum(1).tolist()) == {new.conv.out_channels // 32}
    torch.testing.assert_close(new(x)[:, kept], conv(x)[:, kept])


def _logits(model: nn.Module, x, training: bool):
    """With the running statistics as they were, so that the second model meets what the first met."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    with torch.no_grad():
        out = model.train(training)(x)
    model.load_state_dict(state)
    return out


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("resnet18", "Conv2d"),
        ("tf_efficientnetv2_b0", "Conv2dSame"),
        ("resnetv2_50x1_bit", "StdConv2d"),
        ("nf_resnet50", "ScaledStdConv2d"),
        ("dm_nfnet_f0", "ScaledStdConv2dSame"),
    ],
)
def test_the_convolution_branch_keeps_class_and_kept_filters_in_place(name, branch):
    """Kept output channels of every replaced convolution are the source's, at the source's places."""
    plan = plan_of(name, "aa")
    source, converted = (randomized(name) for _ in range(2))
    converted.load_state_dict(source.state_dict())
    replace.apply_plan(converted, plan, lambda name, conv, count: [*range(conv.out_channels)][-count:])
    classes = set()
    for site in plan.sites:
        old, new = source.get_submodule(site.name), converted.get_submodule(site.name)
        classes.add(type(new.conv).__name__)
        x = torch.randn(1, site.in_channels, 2 * site.resolution[0] - 1, 2 * site.resolution[1] + 1)
        assert new(x).shape == old(x).shape
        torch.testing.assert_close(new(x)[:, site.given_up :], old(x)[:, site.given_up :])
    assert branch in classes


def test_select_filters_cuts_every_parameter_and_leaves_the_source_alone():
    conv = timm.layers.ScaledStdConv2d(4, 6, 3)
    nn.init.uniform_(conv.gain)
    kept = select_filters(conv, [1, 4, 5])
    x = torch.randn(1, 4, 7, 9)
    assert type(kept) is type(conv)
    assert (kept.out_channels, conv.out_channels) == (3, 6)
    torch.testing.assert_close(kept(x), conv(x)[:, [1, 4, 5]])


def test_channel_order_undoes_the_concatenation():
    assert channel_order([0, 2, 5], 6) == [0, 3, 1, 4, 5, 2]


def test_the_result_is_the_timm_model_with_its_interface():
    model = timm.create_model("resnet18", num_classes=7)
    replace.apply_plan(model, plan_of("resnet18", "aa"))
    x = torch.randn(2, 3, 64, 64)
    assert type(model).__name__ == "ResNet"
    assert model.forward_features(x).shape == (2, 512, 2, 2)
    _, intermediates = model.forward_intermediates(x)
    assert len(intermediates) == 5
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.set_grad_checkpointing(True)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.layer4.parameters())
    matcher = model.group_matcher(coarse=False)
    groups = timm.models.group_parameters(model, matcher, reverse=True)
    assert groups["layer4.0.conv1.qkv.weight"] == groups["layer4.0.bn1.weight"]


@pytest.mark.parametrize("recipe", ["aa", "aw", "aa-aw"])
def test_gradients_reach_every_parameter(recipe):
    model = randomized("resnet18")
    replace.apply_plan(model, plan_of("resnet18", recipe))
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_other_image_sizes_work():
    model = timm.create_model("resnet18")
    replace.apply_plan(model, plan_of("resnet18", "aa"))
    for size in ((64, 64), (96, 160), (288, 224)):
        assert model.eval()(torch.randn(1, 3, *size)).isfinite().all()


def test_verification_passes_what_fits_and_refuses_what_changes_a_shape(monkeypatch):
    graph, plan = graph_of("resnet18"), plan_of("resnet18", "aa")
    model = timm.create_model("resnet18")
    replace.verify(model, plan, graph)
    assert not any(isinstance(m, AAConv2d) for m in model.modules())
    forward = AAConv2d.forward
    monkeypatch.setattr(AAConv2d, "forward", lambda self, x: forward(self, x).repeat(2, 1, 1, 1))
    with pytest.raises(AugmentError, match=r"changes the shape of features_4 from \(1, 128, 112, 112\) to \(2, 128"):
        replace.verify(timm.create_model("vgg11_bn"), plan_of("vgg11_bn", "aa"), graph_of("vgg11_bn"))


def test_a_plan_for_another_model_is_refused_by_name():
    with pytest.raises(AugmentError, match=r"VGG has no convolution layer1\.0\.conv1"):
        replace.apply_plan(timm.create_model("vgg11"), plan_of("resnet18", "aa"))
    wide = timm.create_model("resnet18")
    wide.layer1[0].conv1 = nn.Conv2d(32, 64, 3)
    with pytest.raises(AugmentError, match=r"layer1\.0\.conv1 has in_channels 32, and 64 in the plan"):
        replace.apply_plan(wide, plan_of("resnet18", "aa"))


def test_a_model_traced_by_timm_after_conversion_sees_the_layers_as_leaves():
    model = timm.create_model("resnet18")
    replace.apply_plan(model, plan_of("resnet18", "aa"))
    names = {s.name for s in analyze(model, (3, 64, 64)).sites}
    assert "layer1.0.conv1.conv" in names
    assert isinstance(plan_of("resnet18", "aa"), Plan)
