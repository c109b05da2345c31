"""Arguments and habits that several commands share. Data go to stdout, all else to stderr."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from augment_cli.cli import completion
from augment_cli.errors import InputError, boundary
from augment_cli.terminal import echo, say

if TYPE_CHECKING:
    from torch import nn

    from augment_cli.analysis.facts import Analysis, Source
    from augment_cli.latency.timer import Timer
    from augment_cli.planning.budget import Solution
    from augment_cli.planning.latency import LatencySettings
    from augment_cli.planning.plan import Plan
    from augment_cli.planning.recipe import Recipe

ModelName = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A timm model's name.", autocompletion=completion.models),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A built-in recipe (`augment recipes`) or a TOML file. [aa]",
        autocompletion=completion.builtin_recipes,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan (`augment plan --json`), edited or not, instead of a recipe."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A recipe value, such as budget.params=keep. Repeatable.",
        autocompletion=completion.overrides,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option("--img-size", metavar="N|HxW", help="Image size to convert for, if not the model's own."),
]
ModelArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", "-a", metavar="KEY=VALUE", help="For timm.create_model: num_classes=10. Repeatable."),
]
Cached = Annotated[
    bool,
    typer.Option(
        "--cache/--no-cache", help="Keep what is found of a timm model for the next time, in the user's cache folder."
    ),
]
Ema = Annotated[
    bool | None,
    typer.Option(
        "--ema/--no-ema",
        help="Which weights of --checkpoint: their moving average, or themselves. [the average, where there is one]",
    ),
]

Base = Annotated[
    str | None,
    typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION", help="What makes the source of a converted model that timm does not know."
    ),
]

Advance = Callable[[str, int, int], None]
"""Told what is done now, how much of it is done, and how much there is."""

_SECONDS = 20
"""From one line of progress to the next, where there is no terminal."""

__all__ = ["echo", "say"]


@contextmanager
def working(what: str) -> Iterator["Advance | None"]:
    """A spinner while something takes long; nothing where stderr is not a terminal."""
    from rich.text import Text

    from augment_cli.console import Terminal

    with Terminal(stderr=True).status(Text(what)):
        yield None


@contextmanager
def bar(what: str) -> Iterator["Advance | None"]:
    """Progress of things done one after the other; yields what moves it: name, how many done, of all.

    A bar with the time that is left on a terminal, elsewhere a line every _SECONDS.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from augment_cli.console import Terminal

    console, said = Terminal(stderr=True), time.monotonic()
    name = TextColumn("{task.description}", markup=False)
    columns = (TextColumn(what, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), name)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def advance(name: str, done: int, total: int) -> None:
            nonlocal said
            progress.update(task, description=name, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - said >= _SECONDS:
                said = time.monotonic()
                say(f"{what}: {name}, {done} of {total}")

        yield advance


def show(renderable: Any) -> None:
    """A table or other rich object as data: colours only on a terminal."""
    from augment_cli.console import Terminal

    Terminal().print(renderable)


def check_ema(ema: bool | None, checkpoint: str | Path | None) -> None:
    if ema is not None and checkpoint is None:
        raise InputError(f"--{'' if ema else 'no-'}ema is for --checkpoint: add it, or leave it out")


def parse_image_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if not match or not int(match[1]):
        raise InputError(f"--img-size {text}: write it as 224, or as HEIGHTxWIDTH such as 224x288")
    return int(match[1]), int(match[2] or match[1])


def parse_arguments(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it can be, a string otherwise."""
    arguments = {}
    for pair in pairs or ():
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise InputError(f"--model-arg {pair}: write it as KEY=VALUE, such as num_classes=10")
        with boundary(f"--model-arg {key}"):
            try:
                arguments[key] = json.loads(text)
            except json.JSONDecodeError:
                arguments[key] = text
    return arguments


def announce(analysis: "Analysis", plan: "Plan", solution: "Solution | None", recipe: "Recipe | None" = None) -> None:
    """Say what was found and solved, and what a user should know before relying on it."""
    from augment_cli.planning.selection import missing_kernels
    from augment_cli.reporting.units import describe_latency

    say(f"{plan.model}: {len(analysis.sites)} convolutions, {len(plan.sites)} to replace (recipe {plan.recipe})")
    if solution is not None:
        say(solution.describe())
    if plan.latency:
        say(f"latency {describe_latency(plan.latency)}")
    for kernel in missing_kernels(analysis.sites, recipe.select) if recipe else ():
        say(f"note: select.kernel: no {kernel}x{kernel} convolution here")
    bare = [site.name for site in analysis.sites if site.norm is None and site.name in {s.name for s in plan.sites}]
    if bare and any(site.given_up for site in plan.sites):
        say(f"note: no normalisation directly follows {len(bare)} of them, such as {bare[0]}; the AA paper has one")


def read_given_plan(
    file: Path, model: str | None, recipe: str | None, overrides: list[str] | None, *others: list[str] | str | None
) -> "Plan":
    """The plan of --plan, its budget as --set has it; `others` are --img-size and --model-arg."""
    from augment_cli.planning.reading import read_plan
    from augment_cli.planning.recipe import override_budget

    plan = read_plan(file)
    if plan.base == "other" and not model:
        raise InputError(
            f"plan {file} is for {plan.model}, which is not a model of timm: give MODEL, as package.module:function"
        )
    known = (model if plan.base == "timm" else None, recipe, *others)
    for value, option in zip(known, ("MODEL", "--recipe", "--img-size", "--model-arg"), strict=True):
        if value:
            raise InputError(f"--plan says which model and what becomes of it: leave out {option}, or edit the plan")
    return plan.model_copy(update={"budget": override_budget(plan.budget, tuple(overrides or ()))})


def file_name(plan_model: str, recipe: str) -> str:
    """The name of a converted model's file where the user gives none."""
    return f"{plan_model.rpartition(':')[2]}-{recipe}.safetensors"


def fit_given_plan(plan: "Plan", analysis: "Analysis", file: Path) -> "Plan":
    """The plan of --plan held against its model and its budget."""
    from augment_cli.planning.reading import check_budget, fit_plan

    fitted = fit_plan(plan, analysis, f"plan {file}")
    check_budget(fitted, f"plan {file}")
    return fitted


@contextmanager
def timing(
    source: "Source", analysis: "Analysis", settings: "LatencySettings", cached: bool = True
) -> Iterator["Timer"]:
    """What measures a model's latency; says so when there is something to measure."""
    with working("importing torch"):
        from augment_cli.analysis.source import create
        from augment_cli.latency.timer import Timer

    def make() -> "nn.Module":
        say(f"measuring latency for about {settings.seconds:g} s: {settings.describe()}")
        return create(source)

    with bar("measuring") as progress:
        timer = Timer(source, analysis, settings, make, progress, cached)
        yield timer
    if timer.overrun:
        say(timer.overrun)


def load_named_recipe(name: str, overrides: list[str] | None) -> "Recipe":
    from augment_cli.planning.recipe import load_recipe

    return load_recipe(name, tuple(overrides or ()))
