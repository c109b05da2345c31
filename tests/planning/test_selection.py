import re
from dataclasses import replace

import pytest

from augment_cli.errors import AugmentError
from augment_cli.operators.aa import attention_pool
from augment_cli.planning.recipe import load_recipe
from augment_cli.planning.selection import select
from tests.conftest import graph_of, plan_of


def chosen(model: str, recipe: str, *overrides: str) -> list[str]:
    return [site.name for site, _ in select(graph_of(model).sites, load_recipe(recipe, overrides)).chosen]


def reasons(model: str, recipe: str, *overrides: str) -> dict[str, str]:
    return dict(select(graph_of(model).sites, load_recipe(recipe, overrides)).skipped)


def test_every_convolution_is_either_chosen_or_has_a_reason():
    for model in ("resnet50", "hrnet_w18", "tf_efficientnetv2_s"):
        selection = select(graph_of(model).sites, load_recipe("aa"))
        names = [site.name for site, _ in selection.chosen] + [name for name, _ in selection.skipped]
        assert sorted(names) == sorted(site.name for site in graph_of(model).sites)
        assert all(reason for _, reason in selection.skipped)


def test_selectors_narrow_the_choice():
    assert chosen("resnet34", "aw", "select.names=layer4.*") == [
        f"layer4.{i}.conv{j}" for i in range(3) for j in (1, 2)
    ]
    assert chosen("resnet34", "aw", "select.regex=4\\.\\d\\.conv2$") == [f"layer4.{i}.conv2" for i in range(3)]
    assert chosen("resnet34", "aw", "select.stages=4", "select.block_indices=-1") == [
        f"layer4.{i}.conv2" for i in range(3)
    ]
    assert chosen("resnet34", "aw", "select.stages=4", "select.exclude=*.conv1", "select.exclude=*.0.*") == [
        "layer4.1.conv1",
        "layer4.1.conv2",
        "layer4.2.conv1",
        "layer4.2.conv2",
    ]
    assert len(chosen("resnet34", "aw", "select.largest_map=49")) == 6
    assert len(chosen("resnet34", "aw", "select.smallest_width=256")) == 18


def test_the_paper_recipes_choose_what_the_papers_augment():
    assert chosen("resnet50", "aa-resnet") == [
        f"layer{stage}.{block}.conv2" for stage, blocks in ((2, 4), (3, 6), (4, 3)) for block in range(blocks)
    ]
    assert chosen("resnet34", "aa-resnet34") == [
        f"layer{stage}.{block}.conv1" for stage, blocks in ((2, 4), (3, 6), (4, 3)) for block in range(blocks)
    ]
    assert len(chosen("resnet50", "aw-resnet")) == 16


@pytest.mark.parametrize(
    ("model", "name", "overrides", "reason"),
    [
        ("resnet50", "conv1", (), "7x7 kernel, the recipe takes 3x3"),
        ("resnet50", "layer1.0.conv1", (), "1x1 kernel"),
        ("resnet50", "conv1", ("select.kernel=7", "select.include_stem=true", "select.names=*"), None),
        ("resnet50d", "conv1.0", (), "stem: reads the image"),
        ("resnet50d", "conv1.3", (), r"stem \(select.include_stem=true takes it\)"),
        ("resnet50", "layer1.0.conv2", ("select.names=layer4.*",), "not selected by select.names"),
        ("resnet50", "layer1.0.conv2", ("select.regex=layer4",), "not selected by select.regex"),
        ("resnet50", "layer1.0.conv2", ("select.stages=4",), "not selected by select.stages: in stage 1"),
        ("resnet34", "layer1.0.conv2", ("select.block_indices=0",), "not selected by select.block_indices: index 1"),
        ("resnet50", "layer1.0.conv2", ("select.exclude=layer1.*",), "excluded by select.exclude"),
        (
            "resnet50",
            "layer1.0.conv2",
            ("select.largest_map=784",),
            "map too large: 56x56",
        ),
        ("resnet50", "layer1.0.conv2", ("select.smallest_width=65",), "too few channels: 64, under"),
        ("tf_efficientnetv2_s", "blocks.3.0.conv_dw", (), r"depthwise \(select.kinds=depthwise takes it\)"),
        (
            "tf_efficientnetv2_s",
            "blocks.3.0.conv_dw",
            ('select.kinds=["dense","depthwise"]',),
            "depthwise: every channel",
        ),
    ],
)
def test_reasons_are_ones_that_a_person_understands(model, name, overrides, reason):
    if reason is None:
        with pytest.raises(AugmentError, match="no convolution to replace"):
            chosen(model, "aa", *overrides)
    else:
        assert re.match(reason, reasons(model, "aa", *overrides)[name])


def test_maps_of_one_position_are_skipped_since_attention_has_nothing_to_attend_to():
    graph = graph_of("resnet18", (32, 32))
    selection = select(graph.sites, load_recipe("aa"))
    reason = dict(selection.skipped)["layer4.1.conv1"]
    assert reason == "one position: attention on a map of 1x1 can do nothing"
    assert all(site.positions > 1 for site, _ in selection.chosen)
    pooled = select(graph.sites, load_recipe("aa", ("aa.attention_pool=2",)))
    assert (
        dict(pooled.skipped)["layer3.1.conv1"] == "one position: attention on a map of 2x2 pooled by 2 can do nothing"
    )
    assert "layer4.1.conv1" in [site.name for site, _ in select(graph.sites, load_recipe("aw")).chosen]


@pytest.mark.parametrize(
    ("size", "pool"), [((20, 20), 1), ((20, 21), 2), ((40, 40), 2), ((41, 40), 4), ((999, 999), 8)]
)
def test_maps_are_pooled_just_to_within_the_positions_of_the_recipe(size, pool):
    site = replace(graph_of("resnet18").sites[1], resolution=size)
    assert attention_pool(site, load_recipe("aa").aa) == pool  # largest_attention_map = 400


def test_kinds_of_convolutions_are_taken_on_request():
    with pytest.raises(AugmentError, match=r"16 grouped.*select\.kinds=grouped takes those"):
        chosen("resnext50_32x4d", "aa")
    assert len(chosen("resnext50_32x4d", "aw")) == 16
    with pytest.raises(AugmentError, match=r"17 depthwise.*select\.kinds=depthwise takes those"):
        chosen("mobilenetv2_100", "aw")
    assert len(chosen("mobilenetv3_large_100", "aw-mobilenet")) == 15
    assert len(chosen("mnasnet_100", "aa-mnasnet")) == 10


def test_attention_takes_as_many_channels_of_every_group():
    """ResNeXt-50: 32 groups of widths 128 to 1024; at upsilon = 0.25 every 32 channels are one of each group."""
    settings = ("select.kinds=grouped", "aa.value_ratio=0.25", "budget.params=free")
    plan = plan_of("resnext50_32x4d", "aa", *settings)
    assert {site.given_up for site in plan.sites} == {32, 64, 128, 256}
    narrow = reasons("resnext50_32x4d", "aa", "select.kinds=grouped", "budget.params=free")
    assert re.match(
        r"grouped \(32 groups\): value channels come in multiples of 32.*0.1 of 128", narrow["layer1.0.conv2"]
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("select.names=layer9.*",), "select.names: 'layer9.*' matches no convolution"),
        (("select.names=layer4",), "layer4 is a module, write layer4.* for the convolutions in it"),
        (("select.names=layer4.0.conv9",), "did you mean layer4.0.conv"),
        (("select.exclude=nothing*",), "select.exclude: 'nothing\\*' matches no convolution"),
        (("select.regex=^zz",), "select.regex: '\\^zz' matches no convolution"),
        (("select.stages=7",), "select.stages: no stage 7; the convolutions are in stages 0, 1, 2, 3, 4"),
        (("select.block_indices=5",), "select.block_indices: no block has an index 5"),
        (("select.kernel=5",), "select.kernel: no 5x5 convolution here; there are 36 of 1x1, 16 of 3x3, 1 of 7x7"),
    ],
)
def test_a_selector_that_matches_nothing_is_an_error_with_the_nearest(overrides, message):
    with pytest.raises(AugmentError, match=message):
        chosen("resnet50", "aa", *overrides)


def test_a_model_with_all_of_its_convolutions_in_the_stem_says_how_to_choose_them():
    with pytest.raises(AugmentError, match=r"4 stem.*select\.include_stem=true"):
        chosen("levit_128", "aa")
    assert len(chosen("levit_128", "aa", "select.include_stem=true")) == 3
