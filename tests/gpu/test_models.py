"""Whole converted models compute on a GPU what they compute in float64 on the CPU."""

import pytest
import timm
import torch
from torch import nn

import augment_cli as augment
from tests.gpu.helpers import COMPILER, CUDA, DEVICE, PRECISIONS, assert_near, exact, run

SIDE, BATCH = (96, 8) if CUDA else (32, 2)
MODELS = {
    "aa": ("test_resnet", "aa"),
    "aw": ("test_resnet", "aw"),
    "aa of resnet18": ("resnet18", "aa"),
    "aw of resnet18": ("resnet18", "aw"),
}
each_model = pytest.mark.parametrize("name", MODELS if CUDA else ["aa", "aw"])

# A model amplifies what its layers round.
TOLERANCES = {"float32": 1e-4, "tf32": 0.1, "amp-bfloat16": 0.3, "amp-float16": 0.15}


def model_of(name: str) -> nn.Module:
    """A converted model with every normalisation away from its start, so that every channel counts."""
    source, recipe = MODELS[name]
    torch.manual_seed(0)
    model = augment.convert(timm.create_model(source, num_classes=10), recipe, input_size=SIDE)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name_, parameter in model.named_parameters():
        if name_.endswith("expand.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def images() -> torch.Tensor:
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@each_model
@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_model_in_every_precision(name, precision):
    """The logits, and the gradients of the image and of every parameter, taken together."""
    model = model_of(name).eval()
    expected = exact(model, images())
    found = run(model.to(DEVICE), images().to(DEVICE), PRECISIONS[precision])
    assert_near(together(found), together(expected), TOLERANCES[precision])


def together(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All gradients of parameters as one vector: some of them alone are next to nothing."""
    parts = [t.detach().cpu().double().flatten() for key, t in results.items() if key not in ("out", "x")]
    return {"out": results["out"], "x": results["x"], "parameters": torch.cat(parts)}


@pytest.mark.parametrize("name", MODELS if CUDA else ["aa"])
def test_channels_last_and_compiled(name):
    model = model_of(name).eval()
    expected = exact(model, images())
    model, x = (t.to(DEVICE).to(memory_format=torch.channels_last) for t in (model, images()))
    torch.compiler.reset()
    found = run(model, x, runner=torch.compile(model, backend=COMPILER))
    assert_near(together(found), together(expected), TOLERANCES["float32"])


@pytest.mark.parametrize("name", ["aa", "aw"])
def test_training_repeats_bit_for_bit_in_deterministic_mode(name):
    torch.use_deterministic_algorithms(True)
    try:
        losses = [trained(name) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def trained(name: str) -> list[float]:
    """Losses of a few steps on one batch, with autocast and channels last."""
    model = model_of(name).to(DEVICE, memory_format=torch.channels_last).train()
    x = images().to(DEVICE).to(memory_format=torch.channels_last)
    target = torch.arange(BATCH, device=DEVICE) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
