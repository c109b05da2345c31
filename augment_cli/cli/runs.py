"""Habits of the commands that train: which options were given, going on with a run, and how Ctrl-C ends one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import typer

from augment_cli import signals
from augment_cli.cli import common
from augment_cli.errors import InputError
from augment_cli.training.settings import RunSettings, option, read_settings

SettingsT = TypeVar("SettingsT", bound=RunSettings)


def given_options(context: typer.Context) -> set[str]:
    """The parameters that the user gave."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}


def name_of(parameter: str) -> str:
    """A setting as the command line names it."""
    return "MODEL" if parameter == "model" else option(parameter).replace("model-args", "model-arg")


def resumed(folder: Path, changed: dict[str, Any], kind: type[SettingsT], last: str) -> SettingsT:
    """The settings of the run in a folder, with those changed that the user gave.

    Args:
        last: the file or folder in which the run keeps its last model.

    Raises:
        AugmentError: no run there, or a setting that a run keeps.
    """
    from augment_cli.training.folder import SETTINGS

    if fixed := sorted(changed.keys() & {*kind.fixed, "output", "overwrite"}):
        raise InputError(
            f"{name_of(fixed[0])} cannot be another for a run that has begun: leave it out, or start a new run from "
            f"{folder / last}"
        )
    if not (folder / SETTINGS).is_file():
        raise InputError(f"--resume {folder}: no run here that could be resumed")
    return replace(read_settings(folder / SETTINGS, kind), **changed, output=str(folder))


@contextmanager
def interruptible(output: str) -> Iterator[None]:
    """End an interrupted run with its signal's exit code, and say how to go on with it."""
    from augment_cli.training.folder import STATE

    try:
        yield
    except (KeyboardInterrupt, signals.Stopped) as error:
        begun = (Path(output) / STATE).exists()
        common.say("interrupted" + (f"; --resume {output} goes on" if begun else ""))
        raise typer.Exit(getattr(error, "exit_code", 130)) from error
