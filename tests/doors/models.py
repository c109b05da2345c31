"""A converted model of two convolutions, for doors that take seconds a layer."""

from torch import nn

import augment_cli

SIDE = 24


def small(recipe: str) -> nn.Module:
    """In eval mode; every parameter away from its start, so that attention that is lost shows.

    Without normalisations: torchao exports a hundred patterns for a model that has one.
    """
    source = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))
    model = augment_cli.convert(source, recipe, "budget.params=free", input_size=SIDE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()
