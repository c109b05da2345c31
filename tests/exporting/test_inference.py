"""The graph made for inference computes what the model computes."""

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import augment_cli
from augment_cli.exporting.inference import InferenceAA, InferenceAW, for_inference
from augment_cli.layers import AAConv2d, AWConv2d


def randomized(model: nn.Module) -> nn.Module:
    """No statistic, gain or attention weight is zero or one, as it is in a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, AWConv2d):
            nn.init.normal_(module.expand.weight, std=0.05)
    return model.eval().double()


def assert_same(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    made = for_inference(model, size)
    for batch in (1, 3):
        images = torch.randn(batch, *size, dtype=torch.float64)
        with torch.no_grad():
            wanted = model(images)
            torch.testing.assert_close(made(images), wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
    return made


def converted(name: str, recipe: str, size: tuple[int, int], **options: str) -> nn.Module:
    return randomized(augment_cli.convert(name, recipe, input_size=(3, *size), **options))


def test_aa_with_pooled_attention_on_a_map_that_is_not_square():
    model = converted("resnet18", "aa", (96, 128))
    assert {layer.attention_pool for layer in model.modules() if isinstance(layer, AAConv2d)} != {1}
    assert_same(model, (3, 96, 128))


def test_aa_whose_order_of_channels_is_read_by_a_sum():
    """In ResNet-18 the second convolution of a block is followed by a normalisation and the residual's sum."""
    made = assert_same(converted("resnet18", "aa", (64, 64)), (3, 64, 64))
    left = [node for node in made.graph.nodes if node.target is torch.index_select]
    layers = [module for module in made.modules() if isinstance(module, InferenceAA)]
    assert 0 < len(left) < len(layers)


def test_aa_in_bottlenecks_leaves_no_normalisation_behind_it_and_no_order():
    made = assert_same(converted("resnet26", "aa-resnet", (64, 64)), (3, 64, 64))
    assert any(isinstance(module, InferenceAA) for module in made.modules())
    assert not [node for node in made.graph.nodes if node.target is torch.index_select]


def test_aw_dense_grouped_and_depthwise():
    for name, recipe in (("resnet18", "aw"), ("resnext26ts", "aw"), ("mobilenetv2_035", "aw-mobilenet")):
        made = assert_same(converted(name, recipe, (64, 96)), (3, 64, 96))
        assert any(isinstance(module, InferenceAW) for module in made.modules())


def test_aw_with_tensorflows_padding():
    assert_same(converted("tf_efficientnet_b0", "aw-mobilenet", (65, 64)), (3, 65, 64))


def test_aa_and_aw_in_one_layer():
    assert_same(converted("test_resnet", "aa-aw", (48, 64)), (3, 48, 64))


def test_a_normalisation_with_an_activation_keeps_the_activation():
    model = timm.create_model("test_efficientnet", num_classes=5)
    assert any(isinstance(module, BatchNormAct2d) for module in model.modules())
    assert_same(randomized(augment_cli.convert(model, "aa", input_size=(3, 64, 64))), (3, 64, 64))


def test_the_model_stays_as_it_is():
    model = converted("test_resnet", "aa", (48, 48)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for_inference(model, (3, 48, 48))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
