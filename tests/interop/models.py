"""Small converted models, with attention that is not at its start, so that losing it shows."""

import torch
from torch import nn

import augment_cli
from augment_cli.layers import AAConv2d, AWConv2d

RECIPES = ("aa", "aw", "aa-aw")


def converted(name: str, recipe: str, *overrides: str, side: int = 64, **args) -> nn.Module:
    """In eval mode; attention and normalisations away from their start, running statistics those of some images."""
    model = augment_cli.convert(name, recipe, *overrides, input_size=(side, side), **args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            module.momentum = 1.0
        if isinstance(module, AWConv2d):
            nn.init.normal_(module.expand.weight, std=0.5)
    with torch.no_grad():
        model.train()(images(4, args.get("in_chans", 3), side, side))
    return model.eval()


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost replaced convolutions, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (AAConv2d, AWConv2d)) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-4) -> None:
    """No further off than a share of the largest value, which is not zero."""
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= share * expected.abs().max()


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the mean square of the logits, in training."""
    model.zero_grad()
    model.train()(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To a thousandth of each, or to rounding of the largest: some, such as those before a normalisation, are zero."""
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-5 * largest, name
