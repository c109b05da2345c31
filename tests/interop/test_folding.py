"""Folding branches and normalisations into plain convolutions loses no attention: replaced ones stay, and say so."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from timm.models import reparameterize_model
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from augment_cli.layers import AAConv2d
from tests.interop.models import RECIPES, assert_near, converted, images, replaced

DEPTHWISE = "select.kinds=depthwise"
FOLDABLE = [
    *[("repvgg_a0", recipe) for recipe in RECIPES],
    *[("iformer_t", recipe) for recipe in RECIPES],
    *[(name, "aw") for name in ("repvit_m1", "levit_128s", "efficientvim_m1", "shvit_s1", "tiny_vit_5m_224")],
    *[
        (name, "aw", DEPTHWISE)
        for name in ("mobileone_s0", "repvit_m1", "fastvit_t8", "lcnetv2_base", "repghostnet_050")
    ],
]


def folded(model: nn.Module, **kwargs) -> nn.Module:
    with pytest.warns(UserWarning, match="stays as it is: no plain convolution computes its attention"):
        return reparameterize_model(model, **kwargs)


@pytest.mark.parametrize("given", FOLDABLE, ids="-".join)
def test_timm_folds_around_replaced_convolutions(given):
    model = converted(*given)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert_near(folded(model)(x), expected, 1e-3)
        sites = len(replaced(model))
        assert_near(folded(model, inplace=True)(x), expected, 1e-3)
    assert len(replaced(model)) == sites


def test_a_block_asked_directly_stays_too_and_so_do_its_copies():
    model = converted("repvgg_a0", "aw", "select.stages=1")
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            plain, attended = same.stages[1][0], same.stages[0][0]
            with pytest.warns(UserWarning, match="RepVggBlock stays as it is"):
                attended.reparameterize()
            plain.reparameterize()
            assert plain.reparam_conv is not None
            assert attended.reparam_conv is None
            assert_near(same(x), expected)


def test_a_feature_extractor_of_a_converted_model_keeps_its_attention():
    model = converted("repvgg_a0", "aw")
    extractor = timm.create_model("augmented", plan=model._model_args["plan"], features_only=True).eval()
    for site in replaced(extractor).values():
        nn.init.normal_(site.expand.weight)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(folded(extractor)(x), extractor(x), strict=True):
            assert_near(a, b)


def test_the_models_own_fuse_folds_what_it_can():
    model = converted("repvit_m1", "aw")
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        with pytest.warns(UserWarning, match="ConvNorm stays as it is"):
            model.fuse()
        assert_near(model(x), expected)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 1 < norms


def test_a_model_of_which_nothing_is_replaced_folds_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reparameterize_model(timm.create_model("repvgg_a0"))


def test_torch_folds_a_norm_into_aw_exactly_and_refuses_aa():
    site = next(iter(replaced(converted("test_byobnet", "aw")).values()))
    norm = nn.BatchNorm2d(site.out_channels).eval()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    x = images(2, site.in_channels, 8, 8)
    with torch.no_grad():
        assert_near(fuse_conv_bn_eval(site, norm)(x), norm(site(x)))
    site = next(iter(replaced(converted("test_byobnet", "aa")).values()))
    assert isinstance(site, AAConv2d)
    with pytest.raises((AttributeError, RuntimeError)):
        fuse_conv_bn_eval(site, nn.BatchNorm2d(site.out_channels).eval())
