"""Recipes: which convolutions become what, within which budget. TOML files, checked by pydantic."""

import hashlib
import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic_core import ErrorDetails

from augment_cli.analysis.site import Kind
from augment_cli.bounds import (
    MOST_CHANNELS,
    MOST_KERNEL,
    MOST_LISTED,
    MOST_SIDE,
    KernelSide,
    Name,
    Text,
)
from augment_cli.errors import InputError, boundary, nearest
from augment_cli.files import read_text
from augment_cli.operators import Settings, Table, get_operator, operator_names
from augment_cli.planning.latency import LatencySettings
from augment_cli.resources import resource

TableT = TypeVar("TableT", bound=Table)


def _as_tuple(value: Any) -> Any:
    """A single value stands for a list of one, so that the override select.names=layer3.* needs no brackets."""
    return value if isinstance(value, (list, tuple)) else (value,)


Several = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple), Field(max_length=MOST_LISTED)]
Places = Annotated[
    tuple[Annotated[int, Field(ge=-MOST_LISTED, le=MOST_LISTED)], ...],
    BeforeValidator(_as_tuple),
    Field(max_length=MOST_LISTED),
]


# An escape, a class of characters, the start of a group; then what repeats a group, and what repeats at all.
_REPEATS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|(?P<group>\)[*+{])|(?P<open>[*+{])|(?P<maybe>\?)", re.S)
_MOST_REPEATS, _MOST_OPTIONAL = 5, 10


def _check_quick(pattern: str) -> None:
    """Refuse regular expressions that may try more ways than there is time for: matching cannot be interrupted."""
    kinds = Counter(match.lastgroup for match in _REPEATS.finditer(pattern))
    if kinds["group"]:
        raise ValueError("a group is repeated: write it without *, + or { after a parenthesis")
    if kinds["open"] > _MOST_REPEATS or kinds["maybe"] > _MOST_OPTIONAL:
        raise ValueError(f"more than {_MOST_REPEATS} of *, + and {{, or more than {_MOST_OPTIONAL} of ?")


class Select(Table):
    """[select]: which convolutions are replaced."""

    kernel: Annotated[
        tuple[KernelSide, ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1, max_length=MOST_KERNEL, description="kernel sizes (square) of the convolutions to replace"),
    ] = (3,)
    kinds: Annotated[
        tuple[Kind, ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1, max_length=3, description="dense, grouped, depthwise"),
    ] = ("dense",)
    names: Annotated[Several, Field(description="name globs; empty takes every name")] = ()
    regex: Annotated[Name, Field(description="regular expression, found anywhere in the name")] = ""
    stages: Annotated[Places, Field(description="timm's feature levels, as out_indices count them")] = ()
    block_indices: Annotated[
        Places, Field(description="place in the residual block among convolutions of this kernel; 0 first, -1 last")
    ] = ()
    exclude: Annotated[Several, Field(description="name globs that are left alone")] = ()
    include_stem: Annotated[bool, Field(description="also the stem, except what reads the image itself")] = False
    include_pyramid: Annotated[bool, Field(description="also a detector's feature pyramid")] = False
    include_strided: Annotated[bool, Field(description="also convolutions with a stride of 2 or more")] = True
    largest_map: Annotated[
        int | None, Field(ge=1, le=MOST_SIDE**2, description="most output positions (height x width)")
    ] = None
    smallest_width: Annotated[int, Field(ge=1, le=MOST_CHANNELS, description="fewest output channels")] = 1

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        _check_quick(value)
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_AMOUNT = re.compile(rf"(?P<number>{_NUMBER}) ?(?P<unit>[kKMGT]?)")
_PERCENT = re.compile(rf"(?P<number>[+-]{_NUMBER}) ?%")
_DURATION = re.compile(rf"(?P<number>{_NUMBER}) ?(?P<unit>ns|us|ms|s)")
_NANOSECONDS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}
_FACTORS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def _check_amount(value: Any) -> Any:
    text = str(value).strip()
    if text in ("free", "keep") or _AMOUNT.fullmatch(text) or _PERCENT.fullmatch(text):
        return text
    raise ValueError(
        f"{text[:50]!r} is no budget: write free, keep, an amount like 25.6M, or a change like +1% or -10%"
    )


def _check_duration(value: Any) -> Any:
    text = str(value).strip()
    if text in ("free", "keep") or _DURATION.fullmatch(text) or _PERCENT.fullmatch(text):
        return text
    raise ValueError(f"{text[:50]!r} is no budget: write free, keep, a change like +5% or -10%, or a time like 12ms")


Amount = Annotated[str, BeforeValidator(_check_amount)]
Duration = Annotated[str, BeforeValidator(_check_duration)]


class Budget(Table):
    """[budget]: the most parameters, multiply-adds and time of the converted model."""

    params: Annotated[Amount, Field(description="free, keep, 25.6M, +1%, -10%")] = "free"
    macs: Annotated[Amount, Field(description="the same, for multiply-adds")] = "free"
    latency: Annotated[Duration, Field(description="free, keep, +5%, 12ms; measured as [latency] says")] = "free"


UNITS = {"params": "parameters", "macs": "multiply-adds", "latency": "nanoseconds"}
"""Units of the budgets."""


def resolve_amount(amount: str, source: int) -> int | None:
    """The number that a budget stands for, given the source model's count or nanoseconds; None where it is free."""
    if amount == "free":
        return None
    if amount == "keep":
        return source
    if match := _PERCENT.fullmatch(amount):
        return int(source * (1 + float(match["number"]) / 100) + 1e-6)
    if match := _AMOUNT.fullmatch(amount):
        return round(float(match["number"]) * _FACTORS[match["unit"]])
    if match := _DURATION.fullmatch(amount):
        return round(float(match["number"]) * _NANOSECONDS[match["unit"]])
    raise ValueError(f"{amount!r} is no budget")


class Paper(Table):
    """[paper]: where a recipe's settings come from, and how far that can be trusted."""

    title: Text
    table: Text
    trust: Text


class Recipe(Settings):
    """Which convolutions become what, within which budget. Of each operator there is a class with its tables."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    description: Text
    operator: Name
    paper: Paper | None = None
    select: Select = Select()
    budget: Budget = Budget()
    latency: LatencySettings = LatencySettings()

    def digest(self) -> str:
        """SHA-256 of the resolved recipe, overrides included; how latency is measured is no part of it."""
        return hashlib.sha256(self.model_dump_json(exclude={"latency"}).encode()).hexdigest()


@cache
def recipe_type(operator: str) -> type[Recipe]:
    """The class of recipes for an operator: `Recipe` with the operator's tables.

    Raises:
        AugmentError: no such operator.
    """
    bases: Any = (Recipe, get_operator(operator).settings_type)
    return create_model("Recipe", __base__=bases, __module__=__name__)


def make_recipe(data: dict[str, Any], origin: str) -> Recipe:
    """A validated recipe out of a TOML file's data; `origin` names it in messages.

    Raises:
        AugmentError: no such operator, an unknown key, a value that does not fit.
    """
    operator = data.get("operator")
    if not isinstance(operator, str):
        raise InputError(f"{origin}: operator: a recipe names one of {', '.join(operator_names())}")
    with boundary(origin):
        wanted = recipe_type(operator)
    for name in operator_names():
        foreign = data.keys() & get_operator(name).settings_type.model_fields.keys() - wanted.model_fields.keys()
        if foreign:
            own = ", ".join(f"[{table}]" for table in get_operator(operator).settings_type.model_fields)
            raise InputError(f"{origin}: [{min(foreign)}] is not a table of operator {operator}, which reads {own}")
    try:
        return wanted.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{origin}: {describe_errors(error, wanted)}") from error


def recipes_dir() -> Path:
    """The folder of the built-in recipes."""
    return resource("recipes")


def builtin_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(recipes_dir().glob("*.toml"))}


def as_recipe(recipe: str | Path | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe as it is, or by name or path with overrides.

    Raises:
        AugmentError: as `load_recipe`, or overrides beside a recipe that was loaded.
    """
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise InputError("overrides are for a recipe's name or file: a recipe object is taken as it is")
    return recipe


def load_recipe(name: str | Path, overrides: str | Sequence[str] = ()) -> Recipe:
    """A built-in recipe by name, or a TOML file by path, with one or several `table.key=value` overrides.

    Raises:
        AugmentError: no such recipe, no TOML, an unknown key, a value that does not fit.
    """
    path = _find(str(name))
    text = read_text(path, "recipe")
    with boundary(f"{path} is not a TOML file"):
        data = tomllib.loads(text)
    data.setdefault("name", path.stem)
    for override in (overrides,) if isinstance(overrides, str) else overrides:
        if not isinstance(override, str):
            raise InputError(f"{override!r:.100}: write an override as a string, such as 'budget.params=keep'")
        _override(data, override)
    return make_recipe(data, f"recipe {name}")


def override_budget(budget: Budget, overrides: tuple[str, ...]) -> Budget:
    """A budget with `budget.key=value` overrides.

    Raises:
        AugmentError: an override of something else, or a value that is no budget.
    """
    return _overridden("budget", budget, overrides, "only the budget of a plan can be set; edit its sites instead")


def override_latency(settings: LatencySettings, overrides: tuple[str, ...]) -> LatencySettings:
    """Settings of a measurement with `latency.key=value` overrides.

    Raises:
        AugmentError: an override of something else, or a value that does not fit.
    """
    return _overridden(
        "latency", settings, overrides, "only how latency is measured can be set here, as latency.key=value"
    )


def _overridden(name: str, table: TableT, overrides: tuple[str, ...], refusal: str) -> TableT:
    data = {name: table.model_dump()}
    for override in overrides:
        _override(data, override)
        if len(data) > 1:
            raise InputError(f"{override[:100]}: {refusal}")
    return _validated(name, type(table), data[name])


def latency_settings(**values: Any) -> LatencySettings:
    """Settings of a measurement.

    Raises:
        AugmentError: an unknown key, or a value that does not fit.
    """
    return _validated("latency", LatencySettings, values)


def _validated(name: str, table: type[TableT], values: dict[str, Any]) -> TableT:
    try:
        return table.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{name}: {describe_errors(error, table)}") from error


def _find(name: str) -> Path:
    known = builtin_recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix == ".toml" or path.exists():
        if not path.is_file():
            raise InputError(f"recipe {name}: no such file")
        return path
    raise InputError(f"no TOML file and no built-in recipe named {name}{nearest(name, known)}")


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    table, _, name = key.strip().partition(".")
    if key.strip() == "operator" and separator:
        data["operator"] = text.strip()
        return
    if not separator or not name:
        raise InputError(f"{override[:100]}: write it as table.key=value, such as budget.params=keep")
    if not isinstance(data.setdefault(table, {}), dict):
        raise InputError(f"{override[:100]}: {table[:100]} is not a table of a recipe")
    with boundary(override[:100]):
        data[table][name] = _parse(text.strip())


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:  # a bare word is a string
        return text


# An incomplete plan can have a problem for every key of every site.
_TOLD = 3


def describe_errors(error: ValidationError, model: type[BaseModel]) -> str:
    """The first errors of a validation and how many more there are: where, what, for unknown keys the nearest names."""
    items = error.errors()
    more = [f"and {len(items) - _TOLD} more"] if len(items) > _TOLD else []
    return "; ".join([_describe(item, model) for item in items[:_TOLD]] + more)


def _describe(item: ErrorDetails, model: type[BaseModel]) -> str:
    where = ".".join(str(part)[:100] for part in item["loc"])
    if item["type"] != "extra_forbidden":
        message = item["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    for part in item["loc"][:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = _model_within(model.model_fields[part].annotation) or model
    known = [field.alias or name for name, field in model.model_fields.items()]
    return f"unknown key {where}{nearest(str(item['loc'][-1])[:100], known)}"


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that holds one, or several in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_within(arg))), None)
