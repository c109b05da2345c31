"""The closed forms against counting, for every recipe and a dozen architectures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze, count_parameters, meta_copy
from augment_cli.analysis.site import ConvSite, filter_macs
from augment_cli.operators import get_operator
from augment_cli.planning.plan import Plan
from augment_cli.planning.recipe import builtin_recipes
from augment_cli.surgery import replace
from tests.conftest import plan_of

MODELS = [
    "resnet18",
    "resnet50",
    "resnet101",
    "vgg11",
    "vgg16_bn",
    "densenet121",
    "cspdarknet53",
    "hrnet_w18_small",
    "tf_efficientnetv2_b0",
    "nf_resnet50",
    "resnetv2_50x1_bit",
    "inception_v3",
    "repvgg_a0",
]


@pytest.mark.parametrize("recipe", [name for name in builtin_recipes() if "net" not in name or "resnet" in name])
@pytest.mark.parametrize("model", MODELS)
def test_planned_counts_are_the_built_models(model, recipe):
    overrides = [] if recipe in ("aa", "aw", "aa-aw") else ["select.stages=[]", "select.block_indices=[]"]
    if model == "densenet121" and overrides and recipe not in ("aw-resnet", "aw-faster-rcnn"):
        overrides.append("aa.heads=2")  # 32 channels are too few for eight heads
    assert_counted(plan_of(model, recipe, *overrides))


GROUPED = [
    ("resnext50_32x4d", "aw", ()),
    ("resnext50_32x4d", "aa", ("select.kinds=grouped", "aa.value_ratio=0.25", "budget.params=free")),
    ("regnetx_008", "aa-aw", ("select.kinds=grouped", "aa.value_ratio=0.3", "budget.params=free")),
    ("mobilenetv3_small_100", "aw-mobilenet", ()),
    ("convnext_atto", "aw", ("select.kernel=7", "select.kinds=depthwise")),
    ("mnasnet_100", "aa-mnasnet", ()),
    ("semnasnet_100", "aa-mnasnet", ()),
]


@pytest.mark.parametrize(("model", "recipe", "overrides"), GROUPED)
def test_planned_counts_of_other_kernels_are_the_built_models(model, recipe, overrides):
    assert_counted(plan_of(model, recipe, *overrides))


def assert_counted(plan: Plan) -> None:
    _, built = source.describe(plan.model)
    replace.apply_plan(built, plan)
    counted = analyze(built, plan.input_size)
    assert plan.params_after == counted.params
    assert plan.macs_after == counted.macs
    for site in plan.sites:
        assert count_parameters(built.get_submodule(site.name)) == site.params_after


ON_A_PROCESSOR = [
    ("resnet18", "aa", ()),
    ("resnet18", "aw", ()),
    ("resnet18", "aa-aw", ()),
    ("resnet50", "aa-resnet", ()),
    ("resnet50", "aa-ratio", ("aa.key_ratio=1.0", "aa.value_ratio=1.0")),
    ("resnext50_32x4d", "aw", ()),
]


@pytest.mark.parametrize(("model", "recipe", "overrides"), ON_A_PROCESSOR)
def test_a_count_on_a_processor_is_the_plans(model, recipe, overrides):
    """With compiled kernels, or without."""
    plan = plan_of(model, recipe, *overrides)
    _, built = source.describe(plan.model)
    replace.apply_plan(built, plan)
    built = built.to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in built.state_dict().values():
            tensor.zero_()
        with FlopCounterMode(display=False) as flops:
            built(torch.zeros(1, *plan.input_size))
    assert flops.get_total_flops() == 2 * plan.macs_after


PUBLISHED = [
    ("resnet50", "aa-resnet", (), 25_809_392),
    ("resnet101", "aa-resnet", (), 45_386_728),
    ("resnet50", "aa-ratio", (), 24_303_728),
    ("resnet50", "aa-ratio", ("aa.key_ratio=1.0", "aa.value_ratio=1.0"), 19_383_560),
    ("resnet50", "aw-resnet", (), 25_719_128),
]


@pytest.mark.parametrize(("model", "recipe", "overrides", "params"), PUBLISHED)
def test_published_parameter_counts_are_reproduced(model, recipe, overrides, params):
    assert plan_of(model, recipe, *overrides).params_after == params


def test_multiply_adds_of_aa_resnet50_and_its_published_neighbours():
    gflops = {
        name: round(2 * plan_of("resnet50", *args).macs_after / 1e9, 2)
        for name, args in {
            "paper": ("aa-resnet",),
            "quarter": ("aa-ratio",),
            "all": ("aa-ratio", "aa.key_ratio=1.0", "aa.value_ratio=1.0"),
        }.items()
    }
    assert gflops == {"paper": 8.41, "quarter": 8.0, "all": 6.58}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_single_site_costs_what_the_module_counts(data):
    draw = data.draw
    heads = draw(st.sampled_from([1, 2, 4]))
    aa = draw(st.booleans())
    aw = draw(st.booleans()) or not aa
    out_channels = 4 * draw(st.integers(2, 6))
    conv = nn.Conv2d(
        draw(st.integers(1, 24)),
        out_channels,
        draw(st.sampled_from([1, 3, 5])),
        draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        device="meta",
    )
    conv.padding = tuple((k - 1) // 2 for k in conv.kernel_size)
    size = (draw(st.integers(5, 12)), draw(st.integers(5, 12)))
    before = analyze(nn.Sequential(nn.Identity(), conv), (conv.in_channels, *size))
    site = before.sites[0]
    keys, values = heads * draw(st.integers(1, 4)), heads * draw(st.integers(1, (out_channels - 1) // heads))
    attention = (heads, keys, values, draw(st.integers(1, 3))) if aa else ()
    reduction = (draw(st.sampled_from([r for r in range(1, 25) if conv.in_channels % r == 0])),) if aw else ()
    operator = get_operator("+".join(name for name, there in (("aa", aa), ("aw", aw)) if there))
    split = operator.split_type(*attention, *reduction)
    module = replace.replacement(meta_copy(conv), _as_plan(site, operator.name, split))
    assert count_parameters(module) == operator.params(site, split)
    with FlopCounterMode(display=False) as flops:
        module(torch.empty(1, conv.in_channels, *size, device="meta"))
    assert flops.get_total_flops() == 2 * operator.macs(site, split)


def _as_plan(site: ConvSite, operator: str, split):
    from augment_cli.planning.plan import SitePlan

    fields = {key: getattr(site, key) for key in ("in_channels", "out_channels", "kernel_size", "stride", "resolution")}
    counts = {"params_before": site.params, "macs_before": filter_macs(site, site.out_channels)}
    return SitePlan(name=site.name, operator=operator, split=split, **fields, **counts)
