"""What a built-in recipe finds in a model of timm, without weights."""

from typing import Any

from augment_cli import source
from augment_cli.errors import AugmentError
from augment_cli.graph import analyze
from augment_cli.recipe import load_recipe
from augment_cli.selection import select

RECIPES = ("aa", "aw")


def survey(name: str) -> dict[str, Any]:
    """Sites per recipe of a model, and the reason where there is none. JSON values."""
    found: dict[str, Any] = {"model": name, "params": None, "sites": dict.fromkeys(RECIPES, 0), "reason": None}
    try:
        described, model = source.describe(name)
        graph = analyze(model, described.input_size)
    except AugmentError as error:
        return found | {"reason": str(error)}
    found["params"] = graph.params
    for recipe in RECIPES:
        try:
            found["sites"][recipe] = len(select(graph.sites, load_recipe(recipe).sites).chosen)
        except AugmentError as error:
            found["reason"] = str(error)
    return found
