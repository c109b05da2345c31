"""The two convolutions of this project. Nothing here knows about timm, graphs or recipes."""

from augment_cli.layers.aa_conv import AAConv2d
from augment_cli.layers.aw_conv import AWConv2d
from augment_cli.layers.standardize import ScaledStandardize, Standardize

__all__ = ["AAConv2d", "AWConv2d", "ScaledStandardize", "Standardize"]
