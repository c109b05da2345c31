"""augment models: what of timm can be converted."""

import json
from fnmatch import fnmatchcase
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from augment_cli.cli import common
from augment_cli.errors import InputError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from augment_cli.analysis.support import Support


def models(
    pattern: Annotated[str, typer.Argument(metavar="[FILTER]", help="A glob on model names.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List timm's models that match FILTER, how many convolutions the recipes aa, aw and aa-aw replace in each, and the
    parameter counts that a budget can ask for under aa.

    The answer is a table that comes with the program: every model was tried once.

    augment models 'resnet*'
    """
    from augment_cli.analysis.support import read_table

    table = read_table()
    names = [model.model for model in table.models]
    found = [model for model in table.models if fnmatchcase(model.model, pattern)]
    if not found:
        raise InputError(
            f"timm has no model like {pattern}{nearest(pattern.strip('*'), names)}; the table is of timm "
            f"{table.versions['timm']}, and `augment plan MODEL` looks into any"
        )
    if version("timm") != table.versions["timm"]:
        common.say(f"note: the table was made with timm {table.versions['timm']}, here is {version('timm')}")
    if as_json:
        common.echo(json.dumps([model.model_dump(mode="json") for model in found], indent=2))
    else:
        common.show(_rows(found))


def _rows(found: list["Support"]) -> "Table":
    from rich.table import Table

    from augment_cli.analysis.support import RECIPES

    rows = Table(box=None, header_style="bold")
    for column in ("model", "image", "parameters", *RECIPES, "aa can have", "why not"):
        justify: Literal["left", "right"] = "left" if column in ("model", "why not") else "right"
        rows.add_column(column, justify=justify, no_wrap=column != "why not", overflow="fold")
    for model in found:
        outcomes = model.outcomes
        rows.add_row(
            model.model,
            "x".join(map(str, model.input_size[1:])) if model.input_size else "-",
            f"{model.params:,}" if model.params else "-",
            *(str(outcomes[recipe].sites) if outcomes else "-" for recipe in RECIPES),
            _attainable(model),
            _why_not(model),
        )
    return rows


def _attainable(model: "Support") -> str:
    aa = model.outcomes.get("aa")
    if not aa or not model.params or aa.least_params is None or aa.most_params is None:
        return ""
    return f"{aa.least_params / model.params - 1:+.1%} to {aa.most_params / model.params - 1:+.1%}"


def _why_not(model: "Support") -> str:
    """The reason under the recipe that takes most, where it takes none; the others' otherwise."""
    if model.reason:
        return model.reason
    reasons = (model.outcomes[recipe].reason for recipe in ("aw", "aa"))
    reason = next((reason for reason in reasons if reason), "").removeprefix("no convolution to replace: ")
    found, _, way_out = reason.partition(". ")
    return way_out if "--set" in way_out else found
