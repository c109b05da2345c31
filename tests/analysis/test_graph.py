import pytest
import timm
import torch
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze, count_parameters, meta_copy
from augment_cli.errors import AugmentError
from tests.conftest import graph_of


def site(model: str, name: str):
    return next(s for s in graph_of(model).sites if s.name == name)


def test_every_convolution_of_the_model_is_found_once():
    names = [s.name for s in graph_of("resnet50").sites]
    convs = [n for n, m in timm.create_model("resnet50").named_modules() if isinstance(m, nn.Conv2d)]
    assert sorted(names) == sorted(convs)
    assert len(set(names)) == 53


def test_shapes_are_those_of_a_real_forward_pass():
    model = timm.create_model("resnet18").eval()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (args[0].shape[-2:], out.shape[-2:])})
            )
    model(torch.randn(1, 3, 96, 160))
    graph = analyze(model, (3, 96, 160))
    assert {s.name: (s.in_resolution, s.resolution) for s in graph.sites} == seen


def test_a_site_says_what_the_convolution_is():
    found = site("resnet50", "layer2.0.conv2")
    assert (found.in_channels, found.out_channels, found.kernel_size, found.stride) == (128, 128, (3, 3), (2, 2))
    assert (found.in_resolution, found.resolution, found.groups, found.calls) == ((56, 56), (28, 28), 1, 1)
    assert (found.stage, found.block, found.block_index, found.norm) == (2, "layer2.0", 0, "layer2.0.bn2")
    assert found.params == 128 * 128 * 9


def test_positions_count_convolutions_of_the_same_kernel_in_a_block():
    assert [site("resnet34", f"layer3.1.conv{i}").block_index for i in (1, 2)] == [0, 1]


def test_stages_are_timms_feature_levels():
    for name in ("resnet50", "densenet121", "regnety_002", "vgg16_bn"):
        model = timm.create_model(name, features_only=True)
        reductions = model.feature_info.reduction()
        graph = graph_of(name)
        for s in graph.sites:
            if s.kernel_size == (3, 3) and s.stage < len(reductions):
                assert graph.input_size[1] // s.in_resolution[0] <= reductions[s.stage], (name, s.name)


def test_what_reads_the_image_and_what_timm_calls_the_stem():
    assert [s.name for s in graph_of("resnet50d").sites if s.stem] == ["conv1.0", "conv1.3", "conv1.6"]
    assert [s.name for s in graph_of("resnet50d").sites if s.reads_image] == ["conv1.0"]
    assert [s.name for s in graph_of("hrnet_w18").sites if s.stem] == ["conv1", "conv2"]


@pytest.mark.parametrize("name", ["nf_resnet50", "mobilevitv2_050", "efficientvit_m0"])
def test_convolutions_inside_timms_leaf_modules_are_found(name):
    sites = graph_of(name).sites
    convs = [n for n, m in timm.create_model(name).named_modules() if isinstance(m, nn.Conv2d)]
    assert {s.name for s in sites} == set(convs)
    assert all(s.calls for s in sites)


def test_tensorflow_padding_is_recognised_and_static_padding_kept():
    assert site("tf_efficientnetv2_s", "blocks.1.0.conv_exp").padding == "same"
    assert site("resnet50", "layer1.0.conv2").padding == (1, 1)
    assert site("inception_v3", "Conv2d_2a_3x3.conv").padding == (0, 0)


def following(*between: nn.Module) -> str | None:
    """The normalisation that `analyze` finds behind a convolution with some modules between the two."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *between, nn.BatchNorm2d(8))
    return analyze(model, (3, 8, 8)).sites[0].norm


def test_a_normalisation_is_found_through_what_changes_nothing_and_through_nothing_else():
    """Filters are weighed by the normalisation that reads them: one behind other arithmetic reads something else."""
    assert following() == "1"
    assert following(nn.Identity(), nn.Dropout(0.1), nn.Dropout2d(0.1)) == "4"
    for module in (nn.ReLU(), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.ChannelShuffle(2)):
        assert following(module) is None
        assert following(nn.Identity(), module) is None


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


def test_a_normalisation_that_is_not_the_only_reader_is_not_taken():
    assert analyze(Forked(), (3, 8, 8)).sites[0].norm is None


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.idle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.shared(self.stem(x))
        return self.shared(nn.functional.avg_pool2d(x, 2))


def test_a_convolution_called_at_two_sizes_and_one_never_called_say_so():
    sites = {s.name: s for s in analyze(Twice(), (3, 16, 16)).sites}
    assert sites["shared"].calls == 2
    assert sites["shared"].obstacle == "called at several sizes: 8x8, 16x16"
    assert sites["idle"].obstacle == "never called in a forward pass"
    assert sites["stem"].obstacle is None


def test_parameters_and_multiply_adds_of_a_known_model():
    graph = graph_of("resnet50")
    assert graph.params == 25_557_032
    assert graph.macs == 4_089_184_256  # convolutions and the classifier, by hand: 4,087,136,256 + 2,048,000


def test_the_analysed_model_is_left_as_it_was():
    model = timm.create_model("resnet18")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    analyze(model, (3, 64, 64))
    assert model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_meta_copy_shares_no_tensor_and_has_every_parameter():
    model = timm.create_model("resnet18")
    copy = meta_copy(model)
    assert {p.device.type for p in (*copy.parameters(), *copy.buffers())} == {"meta"}
    assert count_parameters(copy) == count_parameters(model)


def test_an_image_size_that_the_model_cannot_take_is_refused_with_its_reason():
    _, model = source.describe("levit_128")
    with pytest.raises(AugmentError, match="does not run on an image of 3x224x96"):
        analyze(model, (3, 224, 96))


def test_every_convolution_of_a_large_model_is_found():
    assert len(graph_of("resnet152").sites) == 155
