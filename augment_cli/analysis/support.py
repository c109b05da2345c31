"""The table of timm's models and how far they can be converted. docs/sweep.py makes it; reading needs no torch."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from augment_cli.errors import FileError
from augment_cli.resources import resource

RECIPES = ("aa", "aw", "aa-aw")
"""The recipes in the table: those that suit any model."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Outcome(_Frozen):
    """The result of a recipe on a model: sites and counts, or the reason why there are none.

    `failure` is the error of a trial conversion. A budget can ask for `least_params` to `most_params` parameters.
    """

    sites: int = 0
    params: int | None = None
    macs: int | None = None
    least_params: int | None = None
    most_params: int | None = None
    reason: str | None = None
    failure: str | None = None


class Support(_Frozen):
    """A model under the built-in recipes.

    `dense` counts the dense 3x3 convolutions without the one that reads the image, `behind_stem` those of them behind
    timm's stem. `reason` says why a model could not be analysed.
    """

    model: str
    family: str = ""
    input_size: tuple[int, int, int] | None = None
    params: int | None = None
    macs: int | None = None
    dense: int = 0
    behind_stem: int = 0
    outcomes: dict[str, Outcome] = {}
    reason: str | None = None


class SupportTable(_Frozen):
    """All models, and the versions of the packages that they were tried with."""

    versions: dict[str, str]
    models: tuple[Support, ...]


def table_file() -> Path:
    """Path of the table that comes with the package."""
    return resource("support.json", "docs/support.json")


@cache
def read_table() -> SupportTable:
    """Read and validate the table that comes with the package.

    Raises:
        AugmentError: the file cannot be read.
    """
    return SupportTable.model_validate(_read())


@cache
def model_names() -> tuple[str, ...]:
    """The names of all models in the table. Skips validation, which takes longer than reading.

    Raises:
        AugmentError: the file cannot be read.
    """
    return tuple(model["model"] for model in _read()["models"])


def _read() -> Any:
    try:
        return json.loads(table_file().read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{table_file()} cannot be read ({error.strerror}): `make sweep` makes it") from error
