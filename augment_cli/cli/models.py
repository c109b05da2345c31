"""augment models: what of timm can be converted."""

import json
from typing import Annotated

import typer

from augment_cli.cli import common
from augment_cli.errors import AugmentError, nearest


def models(
    pattern: Annotated[str, typer.Argument(metavar="[FILTER]", help="A glob on model names.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List timm's models that match FILTER, and how many convolutions the recipes aa and aw would replace in each.

    Every model is traced, at about three a second: give a filter.

    augment models 'resnet*'
    """
    with common.working("importing torch and timm"):
        import timm

        from augment_cli.survey import survey

    names = [name for name in timm.list_models(pattern) if name != "augmented"]
    if not names:
        raise AugmentError(f"timm has no model like {pattern}{nearest(pattern.strip('*'), timm.list_models())}")
    found = list(_tracked(names, survey))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.table import Table

    rows = Table(box=None, header_style="bold")
    for column in ("model", "parameters", "aa", "aw", "why not"):
        rows.add_column(column, justify="left" if column in ("model", "why not") else "right")
    for entry in found:
        rows.add_row(
            entry["model"],
            f"{entry['params']:,}" if entry["params"] else "-",
            str(entry["sites"]["aa"]),
            str(entry["sites"]["aw"]),
            entry["reason"] or "",
        )
    common.show(rows)


def _tracked(names: list[str], survey):
    from rich.console import Console
    from rich.progress import track

    for name in track(names, "tracing", console=Console(stderr=True), transient=True, disable=len(names) < 3):
        yield survey(name)
