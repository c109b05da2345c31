"""Model surgery for timm: attention-augmented (AA) and attention-weights (AW) convolutions within a parameter budget.

    import augment_cli

    model = augment_cli.load("resnet50-aa.safetensors")

Importing this package is cheap. As soon as timm is imported, before or after, timm.create_model knows converted models:
timm.create_model("local-dir:DIR", pretrained=True).
"""

import importlib
from typing import Any

from wrapt import register_post_import_hook

from augment_cli.errors import AugmentError

_HOMES = {
    "load": "checkpoint.files",
    "convert": "conversion",
    "param_groups": "training.groups",
    "AAConv2d": "layers",
    "AWConv2d": "layers",
}

__all__ = ["AAConv2d", "AWConv2d", "AugmentError", "convert", "load", "param_groups"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


register_post_import_hook(lambda _: importlib.import_module(f"{__name__}.checkpoint.timm_plugin"), "timm.models")
