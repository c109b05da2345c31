"""torch.fx's own tracer takes the layers for leaves, in every place where plain convolutions are leaves."""

import pytest
import torch
import torchvision
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models.feature_extraction import create_feature_extractor

import augment_cli
from tests.doors.test_script import LAYERS
from tests.interop.models import RECIPES, assert_near, converted, images, replaced


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_nfnet"])
def test_a_traced_model_calls_each_site_once_by_its_name(name, recipe):
    model = converted(name, recipe)
    traced = fx.symbolic_trace(model)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    assert replaced(model).keys() <= called
    x = images(2, 3, 64, 64)
    assert torch.equal(traced(x), model(x))
    traced.train()(x).sum().backward()
    assert all(p.grad is not None for site in replaced(model).values() for p in site.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_alone_is_traced_in_a_sequence(name):
    layer, x = LAYERS[name](), images(1, 8, 6, 6)
    assert torch.equal(fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))
    with pytest.raises(fx.proxy.TraceError, match=r"nn\.Sequential"):
        fx.symbolic_trace(layer)


@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_fx_folds_normalisations_into_plain_convolutions_only(recipe):
    model, x = converted("test_resnet", recipe), images(2, 3, 64, 64)
    fused = fuse(model)
    assert replaced(fused).keys() == replaced(model).keys()
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in each.modules()) for each in (fused, model)]
    assert len(replaced(model)) <= norms[0] < norms[1]
    with torch.no_grad():
        assert_near(fused(x), model(x))


def test_torchvision_extracts_features_at_a_site():
    model = augment_cli.convert(torchvision.models.resnet18(num_classes=3), "aa", input_size=64).eval()
    x, seen = images(1, 3, 64, 64), []
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append(out))
    model(x)
    extractor = create_feature_extractor(model, {"layer2.0.conv1": "site"}).eval()
    assert torch.equal(extractor(x)["site"], seen[0])
