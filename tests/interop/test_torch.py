"""Converted models under torch: tracing, copies, other types, other memory formats."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.interop.models import RECIPES, assert_near, converted, images

MODELS = ["test_resnet", "test_efficientnet", "test_nfnet"]  # plain, Conv2dSame, ScaledStdConv2d with its gains
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.mark.parametrize("name", MODELS)
@every_recipe
def test_copies(name, recipe):
    model, x = converted(name, recipe), images(1, 3, 64, 64)
    expected = model(x)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same(x), expected)


@pytest.mark.parametrize("name", MODELS)
@every_recipe
def test_traced_by_jit(name, recipe):
    model, x = converted(name, recipe), images(2, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        assert_near(torch.jit.load(file)(x), model(x))


@pytest.mark.parametrize("name", MODELS)
@every_recipe
def test_channels_last(name, recipe):
    model, x = converted(name, recipe), images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)
        assert_near(last(x.to(memory_format=torch.channels_last)), expected, 1e-3)


@pytest.mark.parametrize("name", MODELS)
@every_recipe
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, recipe, dtype):
    model, x = converted(name, recipe), images(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(images(32, 3, 64, 64))  # statistics of four images magnify every rounding
        expected = model.eval()(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert nn.functional.cosine_similarity(found.float(), expected).min() > 0.9
