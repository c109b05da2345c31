import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn

from augment_cli.layers import AAConv2d
from augment_cli.layers.aa.conv import _Reorder
from tests.layers import oracles
from tests.layers.helpers import assert_equal, assert_gradients, normal, pairs, randomised, seeds

SPLIT = {"heads": 2, "key_channels": 4, "value_channels": 6}


def layer_of(*args, seed: int = 0, **options) -> AAConv2d:
    return randomised(AAConv2d(*args, dtype=torch.float64, **options), seed)


def assert_as_oracle(layer: AAConv2d, x: torch.Tensor) -> None:
    names = ("heads", "stride", "padding", "dilation", "groups", "attention_pool")
    options = {name: getattr(layer, name) for name in names}
    assert_equal(layer(x), oracles.aa_conv(x, layer.state_dict(), kernel=layer.kernel_size, **options))


@st.composite
def cases(draw) -> tuple[dict, tuple[int, ...]]:
    """Arguments of a layer whose tables fit, and the shape of its input."""
    heads, kernel = draw(st.integers(1, 3)), draw(pairs(1, 3, 5))
    dilation, stride = draw(pairs(1, 2)), draw(pairs(1, 2, 3))
    full = [d * (k - 1) // 2 for k, d in zip(oracles.pair(kernel), oracles.pair(dilation), strict=True)]
    padding = tuple(draw(st.sampled_from(sorted({p, p // 2, 0}, reverse=True))) for p in full)
    size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    strides = oracles.pair(stride)
    shape = [
        (n - 1) * s + 1 + draw(st.integers(0, s - 1)) + 2 * (f - p)
        for n, s, f, p in zip(size, strides, full, padding, strict=True)
    ]
    groups = draw(st.integers(1, 2))
    in_channels, values = groups * draw(st.integers(1, 4 // groups)), heads * draw(st.integers(1, 2))
    arguments = {
        "in_channels": in_channels,
        "out_channels": values + groups * draw(st.integers(0, 3)),
        "groups": groups,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "heads": heads,
        "key_channels": heads * draw(st.integers(1, 3)),
        "value_channels": values,
        "resolution": size,
        "attention_pool": draw(st.integers(1, 4)),
        **{name: draw(st.booleans()) for name in ("bias", "qkv_bias", "proj_bias", "reorder")},
    }
    return arguments, (draw(st.integers(1, 2)), in_channels, *shape)


@given(cases(), seeds)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_forward_equals_the_formula(case, seed):
    arguments, shape = case
    layer = layer_of(**arguments, seed=seed)
    assert_as_oracle(layer, normal(*shape, seed=seed))


@given(cases(), st.tuples(st.integers(1, 8), st.integers(1, 8)), seeds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_other_resolution_equals_the_formula_with_resized_tables(case, resolution, seed):
    arguments, shape = case
    layer = layer_of(**{**arguments, "resolution": resolution}, seed=seed)
    assert_as_oracle(layer, normal(*shape, seed=seed))


@pytest.mark.parametrize("size", [(3, 4), (9, 7), (1, 12)])
def test_other_map_size_gives_the_size_of_the_convolution(size):
    layer = layer_of(2, 8, 3, stride=2, padding=1, **SPLIT, resolution=(5, 5), attention_pool=2)
    x = normal(2, 2, *size, seed=1)
    assert layer(x).shape == (2, 8, *layer.conv(x).shape[-2:]) == (2, 8, *(math.ceil(n / 2) for n in size))
    assert layer(x).isfinite().all()
    assert_as_oracle(layer, x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), ((1, 5), 1), (3, (2, 3)), ((2, 4), 1)])
def test_same_padding_keeps_the_whole_map(kernel, dilation):
    layer = layer_of(3, 8, kernel, padding="same", dilation=dilation, **SPLIT, resolution=(4, 5))
    assert_as_oracle(layer, normal(2, 3, 4, 5, seed=1))


@pytest.mark.parametrize("size", [(5, 6), (6, 5), (7, 1)])
@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_same_padding_of_a_strided_branch(size, stride):
    options = {"stride": stride, "padding": "same", "conv_layer": Conv2dSame}
    layer = layer_of(3, 8, 3, **options, **SPLIT, resolution=(3, 3))
    assert_as_oracle(layer, normal(1, 3, *size, seed=1))


def test_valid_padding_is_padding_zero():
    options = {"dilation": (1, 2), **SPLIT, "resolution": (3, 4)}
    layer, zero = layer_of(3, 8, 3, padding="valid", **options), layer_of(3, 8, 3, padding=0, **options)
    x = normal(2, 3, 5, 8, seed=1)
    assert layer(x).shape == (2, 8, 3, 4)
    assert torch.equal(layer(x), zero(x))
    assert_as_oracle(zero, x)


def test_convolution_branch_comes_first_and_is_a_plain_convolution():
    layer = layer_of(3, 8, 3, padding=1, **SPLIT, resolution=(4, 5))
    x = normal(2, 3, 4, 5, seed=1)
    expected = nn.functional.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
    assert_equal(layer(x)[:, :2], expected, 1e-12)


def test_conv_layer_makes_the_branch():
    def narrow(*args, **options):
        return nn.Sequential(nn.Conv2d(*args, **options), nn.ReLU())

    layer = layer_of(3, 8, 3, stride=2, padding=1, **SPLIT, resolution=(2, 3), conv_layer=narrow)
    x = normal(2, 3, 4, 5, seed=1)
    assert layer.conv[0].out_channels == 2
    assert torch.equal(layer(x)[:, :2], layer.conv(x))


def test_reorder_starts_as_the_concatenation_and_moves_channels():
    layer = AAConv2d(3, 8, 3, padding=1, **SPLIT, resolution=(4, 5), reorder=True, dtype=torch.float64)
    x = normal(1, 3, 4, 5, seed=1)
    before = layer(x)
    assert layer.channel_order.tolist() == list(range(8))
    layer.channel_order.copy_(torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
    assert torch.equal(layer(x), before.flip(1))


def test_channel_order_travels_in_the_state_dict():
    options = {"padding": 1, **SPLIT, "resolution": (4, 5), "reorder": True, "dtype": torch.float64}
    layer, other = (AAConv2d(3, 8, 3, **options) for _ in range(2))
    layer.channel_order.copy_(torch.tensor([3, 0, 1, 2, 7, 6, 5, 4]))
    other.load_state_dict(layer.state_dict(), strict=True)
    x = normal(1, 3, 4, 5, seed=1)
    assert other.channel_order.tolist() == [3, 0, 1, 2, 7, 6, 5, 4]
    assert torch.equal(other(x), layer(x))


GRADIENT_CASES = {
    "plain": {"padding": 1, "resolution": (2, 3)},
    "strided": {"padding": 1, "stride": 2, "resolution": (2, 2), "qkv_bias": True, "proj_bias": True},
    "pooled": {"padding": 1, "attention_pool": 2, "resolution": (3, 3), "bias": False},
    "cropped": {"dilation": (1, 2), "resolution": (1, 2)},
    "resized": {"padding": 1, "resolution": (4, 2)},
    "reordered": {"padding": 1, "resolution": (3, 3), "reorder": True},
    "attention alone": {"padding": 1, "resolution": (3, 3), "value_channels": 4},
}


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_of_input_and_parameters(name):
    options = {"heads": 2, "key_channels": 4, "value_channels": 2, **GRADIENT_CASES[name]}
    layer = layer_of(2, 4, 3, **options)
    size = {"plain": (2, 3), "strided": (3, 4), "cropped": (3, 6)}.get(name, (3, 3))
    assert_gradients(layer, normal(1, 2, *size, seed=2))


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("resolution", [(2, 3), (7, 6), (1, 1), (4, 5)])
def test_state_dict_of_another_resolution_loads_resized(resolution, pool):
    source = layer_of(3, 8, 3, padding=1, **SPLIT, resolution=resolution, attention_pool=pool)
    target = layer_of(3, 8, 3, padding=1, **SPLIT, resolution=(4, 5), attention_pool=pool, seed=1)
    state = source.state_dict()
    before = {name: (tensor, tensor.clone()) for name, tensor in state.items()}
    target.load_state_dict(state, strict=True)
    for name, size in (("rel_height", math.ceil(4 / pool)), ("rel_width", math.ceil(5 / pool))):
        assert_equal(getattr(target, name).detach(), oracles.resized(state[name], size))
    assert all(state[name] is tensor and torch.equal(tensor, copy) for name, (tensor, copy) in before.items())


def test_state_dict_loads_resized_inside_a_model_without_changing_the_callers():
    options = {"padding": 1, **SPLIT}
    source = nn.Sequential(nn.ReLU(), layer_of(3, 8, 3, **options, resolution=(2, 3)))
    target = nn.Sequential(nn.ReLU(), layer_of(3, 8, 3, **options, resolution=(4, 5), seed=1))
    state = source.state_dict()
    target.load_state_dict(state, strict=True)
    assert target[1].rel_height.shape == (7, 2)
    assert state["1.rel_height"].shape == (3, 2)
    assert_equal(target[1].rel_width.detach(), oracles.resized(state["1.rel_width"], 5))


def test_resized_tables_are_contiguous_when_assigned():
    """safetensors saves no others."""
    source, target = (layer_of(3, 8, 3, padding=1, **SPLIT, resolution=n) for n in (3, 5))
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.rel_height.shape == (9, 2)
    assert all(parameter.is_contiguous() for parameter in target.parameters())


@pytest.mark.parametrize("name", ["rel_height", "rel_width"])
def test_tables_of_another_head_width_are_refused(name):
    layer = layer_of(3, 8, 3, padding=1, **SPLIT, resolution=(4, 5))
    for shape in ((5, 3), (getattr(layer, name).shape[0], 3), (6, 2), (5,)):
        with pytest.raises(RuntimeError, match=name):
            layer.load_state_dict(layer.state_dict() | {name: torch.zeros(shape, dtype=torch.float64)})


def test_missing_tables_are_refused():
    layer = layer_of(3, 8, 3, padding=1, **SPLIT, resolution=(4, 5))
    state = layer.state_dict()
    del state["rel_width"]
    with pytest.raises(RuntimeError, match="rel_width"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_channels": 5}, "key_channels=5"),
        ({"key_channels": 0}, "key_channels=0"),
        ({"value_channels": 3}, "value_channels=3"),
        ({"value_channels": 0}, "value_channels=0"),
        ({"value_channels": 10}, "value_channels=10"),
        ({"heads": 0}, "heads=0"),
        ({"kernel_size": 4}, "kernel"),
        ({"kernel_size": (3, 2)}, "kernel"),
        ({"kernel_size": 2, "padding": "valid"}, "kernel"),
        ({"padding": 2}, "padding"),
        ({"padding": (1, 2)}, "padding"),
        ({"attention_pool": 0}, "attention_pool=0"),
        ({"resolution": 0}, "resolution"),
        ({"resolution": (4, -1)}, "resolution"),
    ],
)
def test_arguments_out_of_range_are_named(change, message):
    arguments = {"kernel_size": 3, "padding": 1, **SPLIT, "resolution": 4, **change}
    with pytest.raises(ValueError, match=message):
        AAConv2d(3, 8, **arguments)


@given(
    kernel=pairs(1, 3, 5),
    in_channels=st.integers(1, 64),
    heads=st.integers(1, 8),
    key_factor=st.integers(1, 20),
    value_factor=st.integers(1, 8),
    conv_channels=st.integers(0, 64),
    resolution=st.tuples(st.integers(1, 56), st.integers(1, 56)),
    biases=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_parameters_are_those_of_the_paper_and_the_biases_asked_for(
    kernel, in_channels, heads, key_factor, value_factor, conv_channels, resolution, biases
):
    d_k, d_v = heads * key_factor, heads * value_factor
    options = {"heads": heads, "key_channels": d_k, "value_channels": d_v, "resolution": resolution, "device": "meta"}
    options |= dict(zip(("bias", "qkv_bias", "proj_bias"), biases, strict=True))
    layer = AAConv2d(in_channels, d_v + conv_channels, kernel, **options)
    taps, (height, width) = math.prod(oracles.pair(kernel)), resolution
    convolution = taps * in_channels * conv_channels
    attention = in_channels * (2 * d_k + d_v) + d_v**2 + (2 * (height + width) - 2) * d_k // heads
    bias = biases[0] * conv_channels + biases[1] * (2 * d_k + d_v) + biases[2] * d_v
    assert sum(p.numel() for p in layer.parameters()) == convolution + attention + bias


def test_fresh_tables_and_projections_have_their_standard_deviation():
    torch.manual_seed(0)
    layer = AAConv2d(64, 128, 3, heads=2, key_channels=128, value_channels=128, resolution=(40, 60), qkv_bias=True)
    for weight, expected in (
        (layer.rel_height, 64**-0.5),
        (layer.rel_width, 64**-0.5),
        (layer.qkv.weight, 64**-0.5),
        (layer.proj.weight, 128**-0.5),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not layer.qkv.bias.any()


def test_reset_parameters_draws_all_of_them_again():
    layer = layer_of(3, 8, 3, **SPLIT, resolution=4)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    assert all(not torch.equal(p, before[name]) for name, p in layer.named_parameters())


def test_reordering_has_the_derivatives_of_an_index_of_every_kind():
    order = torch.tensor([2, 0, 3, 1])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(_Reorder.apply(x, order), x[:, order])
    assert torch.autograd.gradcheck(lambda x: _Reorder.apply(x, order), x)
    assert torch.autograd.gradgradcheck(lambda x: _Reorder.apply(x, order) ** 2, x)
    value, tangent = torch.func.jvp(lambda x: _Reorder.apply(x, order), (x,), (2 * x,))
    assert torch.equal(tangent, 2 * value)
    mapped = torch.func.vmap(torch.func.grad(lambda x: _Reorder.apply(x[None], order).cumsum(1).sum()))(x)
    assert torch.equal(mapped, (4 - order.argsort()).double()[None, :, None].expand(2, 4, 3))


def test_the_weight_is_the_branchs_and_absent_without_one():
    branch, alone = (
        AAConv2d(4, 8, 3, padding=1, heads=2, key_channels=4, value_channels=n, resolution=5) for n in (4, 8)
    )
    assert branch.weight is branch.conv.weight
    assert not hasattr(alone, "weight")
