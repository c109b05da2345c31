"""Model surgery: attention-augmented (AA) and attention-weights (AW) convolutions within a parameter budget.

    import augment_cli as augment

    model = augment.convert("resnet50", "aa", pretrained=True)      # or convert(my_model, "aa", input_size=224)
    print(augment.report(model))
    augment.save(model, "resnet50-aa")
    model = augment.load("resnet50-aa")

Importing this package is cheap. As soon as timm is imported, before or after, timm.create_model knows converted models:
timm.create_model("local-dir:DIR", pretrained=True), or "hf-hub:NAME".
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from augment_cli.errors import AugmentError, BudgetError, FileError, InputError, OutOfMemory

if TYPE_CHECKING:
    from augment_cli import detection
    from augment_cli.api import check, convert, export, load, plan, push, report, save
    from augment_cli.attention.looking import attention_maps
    from augment_cli.comparison import compare, frontier
    from augment_cli.difference import diff
    from augment_cli.layers import AAConv2d, AWConv2d
    from augment_cli.planning.plan import Plan
    from augment_cli.planning.recipe import load_recipe
    from augment_cli.training.groups import param_groups

__version__ = version("augment-cli")

_HOMES = {
    "AAConv2d": "layers",
    "AWConv2d": "layers",
    "Plan": "planning.plan",
    "attention_maps": "attention.looking",
    "check": "api",
    "compare": "comparison",
    "convert": "api",
    "diff": "difference",
    "export": "api",
    "frontier": "comparison",
    "load": "api",
    "load_recipe": "planning.recipe",
    "param_groups": "training.groups",
    "plan": "api",
    "push": "api",
    "report": "api",
    "save": "api",
}

__all__ = [
    "AAConv2d",
    "AWConv2d",
    "AugmentError",
    "BudgetError",
    "FileError",
    "InputError",
    "OutOfMemory",
    "Plan",
    "attention_maps",
    "check",
    "compare",
    "convert",
    "detection",
    "diff",
    "export",
    "frontier",
    "load",
    "load_recipe",
    "param_groups",
    "plan",
    "push",
    "report",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "detection":
        return importlib.import_module(f"{__name__}.detection")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_post_import_hook(lambda _: importlib.import_module(f"{__name__}.checkpoint.timm_plugin"), "timm.models")
