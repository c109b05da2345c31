"""Converted models under timm: features, heads, other images, other strides."""

import pytest
import timm
import torch

import augment_cli
from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.analysis.graph import analyze
from augment_cli.planning.plan import make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.reporting.output import write_model
from tests.interop.models import RECIPES, converted, images, replaced


def folder(path, name: str, recipe: str, side: int, **args) -> torch.nn.Module:
    """A converted model, and its folder."""
    described, meta = source.describe(name, args, (side, side))
    graph = analyze(meta, described.input_size)
    plan, _ = make_plan(described.name, graph, load_recipe(recipe), described.args)
    model = source.create(described)
    write_model(model, conversion.operate(model, plan, graph, "random, seed 0"), path)
    return model.eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_mambaout"])
@pytest.mark.parametrize("recipe", ["aa", "aw"])
def test_every_feature_level_is_the_converted_models(tmp_path, name, recipe):
    model = folder(tmp_path / "m", name, recipe, 64)
    x = images(1, 3, 64, 96)
    levels = len(timm.create_model(name, features_only=True).feature_info.channels())
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=levels, intermediates_only=True)
        for level in range(levels):
            extractor = timm.create_model(
                f"local-dir:{tmp_path / 'm'}", pretrained=True, features_only=True, out_indices=(level,)
            )
            (found,) = extractor.eval()(x)
            if name == "test_mambaout":  # timm's extractor leaves its maps channels last
                found = found.permute(0, 3, 1, 2)
            assert torch.equal(found, expected[level])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_new_head(recipe):
    model = converted("test_resnet", recipe)
    features = model.forward_features(images(1, 3, 64, 64))
    model.reset_classifier(5)
    assert model(images(1, 3, 64, 64)).shape == (1, 5)
    assert torch.equal(model.forward_features(images(1, 3, 64, 64)), features)
    model.reset_classifier(0)
    assert model(images(1, 3, 64, 64)).ndim == 2


def drop_paths(model: torch.nn.Module) -> list[float]:
    return [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("args", [{"in_chans": 1}, {"output_stride": 16}, {"drop_path_rate": 0.3}], ids=str)
def test_arguments_are_kept_in_the_file(tmp_path, recipe, args):
    model = folder(tmp_path / "m", "test_resnet", recipe, 64, **args)
    x = images(2, args.get("in_chans", 3), 64, 64)
    again = augment_cli.load(tmp_path / "m").eval()
    assert torch.equal(again(x), model(x))
    assert again.forward_features(x).shape[2] == (4 if "output_stride" in args else 2)
    assert drop_paths(again) == drop_paths(timm.create_model("test_resnet", **args))
    again.train()(x).sum().backward()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stride_may_be_taken_back_for_dilation_after_conversion(tmp_path, recipe):
    model = folder(tmp_path / "m", "test_resnet", recipe, 64)
    dense = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, output_stride=16).eval()
    x = images(1, 3, 64, 64)
    assert dense.forward_features(x).shape == (1, 96, 4, 4)
    assert replaced(dense).keys() == replaced(model).keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in dense.state_dict().items())
    levels = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, output_stride=8, features_only=True)
    assert [level.shape[-1] for level in levels(x)] == [32, 16, 8, 8, 8]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 48), (33, 71), (160, 160)])
def test_images_of_other_sizes(recipe, size):
    model = converted("test_resnet", recipe)
    out = model(images(2, 3, *size))
    assert out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_tables_are_those_of_the_size_of_conversion_and_another_size_still_sees_positions():
    model = converted("test_resnet", "aa", side=288)
    site = next(site for site in replaced(model).values() if site.resolution == (18, 18))
    assert site.rel_height.shape[0] == 2 * -(-18 // site.attention_pool) - 1
    x = images(1, 3, 224, 224)
    before = model(x)
    with torch.no_grad():
        site.rel_height.mul_(-2)
    assert before.isfinite().all()
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize(("name", "side", "other"), [("efficientformerv2_s0", 64, 96), ("levit_128s", 64, 128)])
def test_another_image_size_when_a_model_with_a_fixed_one_is_created(tmp_path, name, side, other):
    model = folder(tmp_path / "m", name, "aw", side)
    assert model(images(1, 3, side, side)).isfinite().all()
    larger = timm.create_model("augmented", plan=model._model_args["plan"], img_size=other).eval()
    assert larger(images(1, 3, other, other)).isfinite().all()
    assert replaced(larger).keys() == replaced(model).keys()


def test_set_input_size():
    model = converted("efficientvit_m0", "aw")
    model.set_input_size((128, 128))
    assert model(images(1, 3, 128, 128)).isfinite().all()
    assert replaced(model)
