"""Shell completion of models, recipes and recipe keys.

It runs at every press of Tab, so it imports neither torch nor timm.
"""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from augment_cli.errors import AugmentError

Completion = tuple[str, str]
"""A value and its explanation."""


def models(incomplete: str) -> list[str]:
    """Names of timm's models."""
    from augment_cli.analysis.support import model_names

    return [name for name in model_names() if name.startswith(incomplete)]


def builtin_recipes(incomplete: str) -> list[Completion]:
    """Names of built-in recipes with their descriptions."""
    from augment_cli.planning.recipe import builtin_recipes, load_recipe

    names = (name for name in builtin_recipes() if name.startswith(incomplete))
    return [(name, load_recipe(name).description) for name in names]


def overrides(context: typer.Context, incomplete: str) -> list[Completion]:
    """KEY=VALUE for every key of the recipe that --recipe names: its value there, or each value that it can have."""
    from augment_cli.planning.recipe import load_recipe, recipe_type

    try:
        recipe = load_recipe(context.params.get("recipe") or "aa")
    except AugmentError:
        return []
    found = _keys(recipe_type(recipe.operator), recipe)
    return [(key, text) for key, text in found if key.startswith(incomplete)]


def _keys(model: Any, values: Any, prefix: str = "") -> Iterator[Completion]:
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        value, annotation = getattr(values, name), field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _keys(annotation, value, f"{name}.")
        elif prefix:  # keys outside of tables name and describe the recipe
            for text in _choices(annotation) or [_written(value)]:
                yield f"{prefix}{name}={text}", field.description or ""


def _choices(annotation: Any) -> list[str]:
    """The words that a key can be set to; none where it takes numbers or free text alone."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return [str(word) for word in arguments]
    if origin in (Union, UnionType, Annotated, tuple):
        return [word for argument in arguments for word in _choices(argument)]
    if annotation is bool:
        return ["true", "false"]
    return []


def _written(value: Any) -> str:
    """A value as --set takes it; empty where the recipe has none."""
    if value in (None, ()):
        return ""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else str(list(value)).replace(" ", "")
    return str(value)
