"""The two convolutions of this project, as torch modules. They know nothing of timm, graphs or recipes.

`aa` and `aw` hold one operator each, and import nothing of each other; both call the kernels in `native`, for CPUs, and
`triton`, for GPUs.
"""

from augment_cli.layers.aa.conv import AAConv2d
from augment_cli.layers.aw.conv import AWConv2d
from augment_cli.layers.aw.standardize import ScaledStandardize, Standardize

__all__ = ["AAConv2d", "AWConv2d", "ScaledStandardize", "Standardize"]
