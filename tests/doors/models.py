"""A converted model of two convolutions, for doors that take seconds a layer."""

from torch import nn

import augment_cli
from tests.interop.models import images

SIDE = 24


def small(recipe: str) -> nn.Module:
    """In eval mode; every parameter away from its start, so that attention that is lost shows."""
    source = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
    )
    model = augment_cli.convert(source, recipe, "budget.params=free", input_size=SIDE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model(images(32, 3, SIDE, SIDE))
    return model.eval()
