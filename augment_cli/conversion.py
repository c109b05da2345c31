"""The whole way in one call, for the library's users; the command line walks it step by step in cli/convert.py."""

from typing import Any

from torch import nn

from augment_cli import checkpoint, rebuild, source, surgery
from augment_cli.graph import ModelGraph, analyze
from augment_cli.header import Header
from augment_cli.inherit import carry
from augment_cli.plan import Plan, make_plan
from augment_cli.recipe import load_recipe


def convert(
    name: str,
    recipe: str = "aa",
    *overrides: str,
    pretrained: bool = False,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    **args: Any,
) -> nn.Module:
    """A converted timm model.

    Args:
        name: the model's name, as for timm.create_model.
        recipe: a built-in recipe's name, or the path of a TOML file.
        overrides: recipe values, such as "budget.params=keep".
        pretrained: carry timm's pretrained weights over; otherwise weights are random from the seed.
        image_size: (height, width) to convert for; None takes the model's own.
        args: further arguments for timm.create_model.

    Example:
        >>> model = convert("resnet18", "aa", "sites.names=layer4.*")
        >>> type(model).__name__, type(model.layer4[0].conv1).__name__
        ('ResNet', 'AAConv2d')
    """
    described, meta_model = source.describe(name, args, image_size)
    graph = analyze(meta_model, described.input_size)
    plan, _ = make_plan(described.name, graph, load_recipe(recipe, overrides), described.args)
    surgery.verify(meta_model, plan, graph)
    model = source.create(described, seed, origin=name if pretrained else None)
    operate(model, plan, graph, weights="pretrained" if pretrained else f"random, seed {seed}")
    return model


def operate(model: nn.Module, plan: Plan, graph: ModelGraph, weights: str) -> Header:
    """Convert a model with weights in place, by a verified plan, and say what its file will say of it."""
    digest = source.weights_digest(model)
    inheritance = carry(model, plan, graph)
    rebuild.adopt(model, plan)
    return Header(
        plan=plan,
        weights=weights,
        source_sha256=digest,
        inheritance=inheritance,
        versions=checkpoint.versions(),
    )
