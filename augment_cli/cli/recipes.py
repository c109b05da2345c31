"""augment recipes: what is built in, and how to make one's own from it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from augment_cli.cli import common, completion
from augment_cli.errors import InputError, nearest

app = typer.Typer(help="List, show and copy the built-in recipes.", invoke_without_command=True)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A built-in recipe.", autocompletion=completion.builtin_recipes)
]


@app.callback()
def recipes(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """The built-in recipes, a line each."""
    from augment_cli.planning.recipe import builtin_recipes, load_recipe

    known = [load_recipe(name) for name in builtin_recipes()]
    if as_json:
        common.echo(json.dumps([recipe.model_dump(mode="json") for recipe in known], indent=2))
        return
    from rich.table import Table

    rows = Table(box=None, header_style="bold")
    for column in ("recipe", "operator", "parameters", "what for"):
        rows.add_column(column)
    for recipe in known:
        rows.add_row(recipe.name, recipe.operator, recipe.budget.params, recipe.description)
    common.show(rows)


@app.command("show")
def show(name: Name) -> None:
    """The recipe's TOML file, as it is."""
    common.echo(_text(name))


@app.command("copy")
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to; NAME.toml if not given.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
) -> None:
    """Copy a recipe to a file of your own, to edit and give to --recipe."""
    from augment_cli.files import check_output, write_file

    text, target = _text(name), target or Path(f"{name}.toml")
    if target.is_dir():
        target = target / f"{name}.toml"
    check_output(target, overwrite)
    write_file(target, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    common.say(f"wrote {target}")


def _text(name: str) -> str:
    from augment_cli.planning.recipe import builtin_recipes

    known = builtin_recipes()
    if name not in known:
        raise InputError(f"no built-in recipe named {name}{nearest(name, known)}")
    return known[name].read_text(encoding="utf-8")
