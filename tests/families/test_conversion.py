"""Every family of timm that has something to replace, from its registry name to the logits of the reloaded file.

One model a model file of timm that has a dense 3x3 convolution besides the one that reads the image, the smallest of
each by parameters, and then those whose convolutions are out of the ordinary. Real tensors, small images.
"""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import augment_cli
from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.reporting.output import write_model


@dataclass(frozen=True)
class Case:
    """A model, arguments that make it smaller, the side of its image, and the recipes that it is converted by."""

    name: str
    recipes: tuple[str, ...] = ("aw", "aa")
    side: int = 64
    args: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()


BOTH = ("aw", "aa-aw")
STEM = ("aw",)  # nothing behind the stem, or nothing wide enough for heads
SHALLOW = {"depths": [1, 1, 1, 1]}

# By model file: byobnet, convnext, crossvit, ...
FAMILIES = [
    Case("test_byobnet", BOTH),
    Case("convnext_zepto_rms_ols", STEM),
    Case("crossvit_9_dagger_240", STEM, 240, {"depth": [[1, 1, 0], [1, 1, 0], [1, 1, 0]]}),
    Case("csatv2", STEM),
    Case("cs3darknet_focus_s", BOTH, 32),
    Case("cspnext_tiny"),
    Case("davit_base_fl", BOTH, 64, SHALLOW | {"embed_dims": [32, 64, 96, 128], "num_heads": [2, 2, 3, 4]}),
    Case("densenet121", args={"block_config": [1, 2, 2, 1]}),
    Case("dla46x_c", BOTH),
    Case("efficientformer_l1", side=224),
    Case("efficientformerv2_s0", BOTH),
    Case("test_efficientnet"),
    Case("efficientvim_m1", STEM, 32),
    Case("efficientvit_l1", side=32),
    Case("efficientvit_m0", STEM),
    Case("fasternet_t0", BOTH),
    # Overlapping windows as in the large ones, which have 239M parameters.
    Case("focalnet_tiny_srf", side=32, args={"use_overlap_down": True}),
    Case("gcvit_xxtiny", side=32),
    Case("hgnetv2_b0", BOTH, 32),
    Case("hrnet_w18_small"),
    Case("iformer_t", BOTH),
    Case("inception_resnet_v2", side=96),
    Case("inception_v3", side=96),
    Case("inception_v4", side=96),
    Case("levit_128s", STEM, 32),
    Case("lowformer_b0", BOTH, 32),
    Case("test_mambaout"),
    Case("test_coatnet", STEM),
    Case("poolformerv2_s12", BOTH, 32),
    Case("mobilenetv4_conv_small_035"),
    Case("mobilenetv5_base", BOTH, 32, args={"channel_multiplier": 0.25}),
    Case("nest_tiny"),
    Case("nextvit_small", STEM),
    Case("test_nfnet", BOTH),
    Case("pvt_v2_b0"),
    Case("regnetx_080", side=32),
    Case("repvit_m1", STEM),
    Case("test_resnet", BOTH),
    Case("resnetv2_18", side=32),
    Case("selecsls42", side=32),
    Case("legacy_seresnet18", BOTH, 32),
    Case("shvit_s1", STEM, 32),
    Case("starnet_s050"),
    Case("swiftformer_xs", BOTH, 32),
    Case("tiny_vit_5m_224", STEM, 32),
    Case("tresnet_m", side=32),
    Case("vgg11", BOTH, 32, args={"mlp_ratio": 0.05}),
    Case("vitamin_small_224", STEM, 32),
    Case("samvit_base_patch16", args={"depth": 1, "embed_dim": 64, "num_heads": 2, "global_attn_indexes": [0]}),
    Case("volo_d1_224", STEM, 32),
    Case("ese_vovnet19b_slim", BOTH),
    Case("legacy_xception", STEM, 32),
    Case("xception41p", STEM, 32),
    Case("xcit_nano_12_p8_224", STEM, 32, args={"depth": 1}),
]

AWKWARD = [
    Case("nf_resnet26", BOTH, 32),  # its blocks are leaves to a tracer, its convolutions standardise their weights
    Case("mobilevit_xxs"),  # leaves, too
    Case("tf_efficientnetv2_b0", BOTH),  # Conv2dSame
    Case("resnetv2_50x1_bit", side=32),  # StdConv2d
    Case("repvgg_a0", BOTH, 32),
    Case("mobileone_s0", ("aw",), 32, overrides=("select.kinds=depthwise",)),
    Case("resnext26ts", BOTH, 32, overrides=("select.kinds=grouped", "aa.value_ratio=0.25", "budget.params=free")),
    Case("regnetx_002", ("aw",)),
    Case("mobilenetv3_small_050", ("aw-mobilenet",)),
    Case("mnasnet_small", ("aa-mnasnet",)),
]


@pytest.mark.parametrize(
    ("case", "recipe"),
    [pytest.param(case, recipe, id=f"{case.name}-{recipe}") for case in FAMILIES + AWKWARD for recipe in case.recipes],
)
def test_from_the_name_to_the_reloaded_logits(case, recipe, tmp_path):
    described, graph, original = prepared(case.name)
    plan, _ = make_plan(
        case.name,
        graph,
        load_recipe(recipe, tuple(o for o in case.overrides if recipe != "aw" or not o.startswith("aa."))),
        described.args,
    )
    model = copy.deepcopy(original)
    images = torch.randn(2, *described.input_size)

    before = run(model, images)
    metadata = conversion.operate(model, plan, graph, "random, seed 0")
    after = run(model, images)
    check_shapes(plan, before, after)
    if all(site.operator == "aw" for site in plan.sites):
        check_equal(plan, before, after)
    check_gradients(model, plan, images)

    write_model(model, metadata, tmp_path / "model.safetensors")
    again = augment_cli.load(tmp_path / "model.safetensors")
    assert torch.equal(run(again, images)[""], run(model, images)[""])


@functools.lru_cache(maxsize=1)  # for the next recipe
def prepared(name: str) -> tuple[source.Source, ModelGraph, nn.Module]:
    case = next(case for case in FAMILIES + AWKWARD if case.name == name)
    described, meta = source.describe(case.name, case.args, (case.side, case.side))
    return described, analyze(meta, described.input_size), awake(source.create(described))


def awake(model: nn.Module) -> nn.Module:
    """Scales, gains and biases away from the zeros of a fresh model, which hide whole branches."""
    for parameter in model.parameters():
        if parameter.numel() == max(parameter.shape, default=1):
            nn.init.uniform_(parameter, 0.5, 1)
    return model


def run(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Outputs of every module by its name, of the last call; "" is the model."""
    outputs: dict[str, Tensor] = {}

    def record(name: str):
        return lambda module, args, out: outputs.update({name: out}) if isinstance(out, Tensor) else None

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return outputs


def check_shapes(plan: Plan, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert {site.name for site in plan.sites} <= before.keys() <= after.keys()
    assert {name: out.shape for name, out in before.items()} == {name: after[name].shape for name in before}
    assert all(out.isfinite().all() for out in after.values())


def check_equal(plan: Plan, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name in ("", *(site.name for site in plan.sites)):
        assert (after[name] - before[name]).abs().max() <= 1e-4 * before[name].abs().max(), name


def check_gradients(model: nn.Module, plan: Plan, images: Tensor) -> None:
    """In training: of every parameter of a replaced convolution, and not all zero."""
    model.train()(images).square().mean().backward()
    for site in plan.sites:
        gradients = {name: p.grad for name, p in model.get_submodule(site.name).named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values()), site.name
        assert any(g.any() for g in gradients.values()), site.name
