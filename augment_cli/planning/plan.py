"""The plan: what every convolution of a model becomes. Frozen, hashable, JSON in and out."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from augment_cli.analysis.arguments import Arguments
from augment_cli.analysis.site import ConvSite, reduction_fits
from augment_cli.bounds import (
    MOST_CHANNELS,
    MOST_CONVOLUTIONS,
    MOST_KEYS,
    Channels,
    CountOfChannels,
    KernelSide,
    Name,
    Sha256,
    Side,
    Total,
)
from augment_cli.errors import AugmentError, boundary, nearest
from augment_cli.files import read_text
from augment_cli.planning import cost
from augment_cli.planning.budget import Counts, Solution, solve
from augment_cli.planning.cost import Choice, Variant
from augment_cli.planning.recipe import UNITS, Budget, Recipe, describe_errors, resolve_amount
from augment_cli.planning.selection import one_position, select, structural_obstacle

if TYPE_CHECKING:
    from augment_cli.analysis.graph import ModelGraph

SCHEMA = 1

# A plan with its reasons, for the timm model of most convolutions, takes less than a megabyte.
_LARGEST_FILE = 32 * 2**20

SIDES = ("before", "after")


def natural(name: str) -> list:
    """A sort key under which layer2.9 comes before layer2.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Sensitivity(_Frozen):
    """What replacing one site alone does to the model's output, on images that its fit has not seen.

    agreement: share of images with the source's top-1; divergence: mean KL(source, converted) of the predictions, nats.
    """

    agreement: Annotated[float, Field(ge=0, le=1)]
    divergence: Annotated[float, Field(ge=0)]


class SitePlan(_Frozen):
    """What one convolution becomes. Sizes are (height, width); resolution is that of the output map.

    An AW site has no heads, key or value channels (0); an AA site without AW has no reduction (0). `params_after` and
    `macs_after` are always counted from the split: a number given for them is not believed.
    """

    name: Name
    variant: Variant
    in_channels: Channels
    out_channels: Channels
    kernel_size: tuple[KernelSide, KernelSide]
    stride: tuple[KernelSide, KernelSide]
    groups: Channels = 1
    resolution: tuple[Side, Side]
    heads: CountOfChannels = 0
    key_channels: Annotated[int, Field(ge=0, le=MOST_CHANNELS * MOST_KEYS)] = 0
    value_channels: CountOfChannels = 0
    attention_pool: Side = 1
    reduction: CountOfChannels = 0
    params_before: Total
    params_after: Total = 0
    macs_before: Total
    macs_after: Total = 0
    sensitivity: Sensitivity | None = None

    @property
    def choice(self) -> Choice:
        return Choice(self.heads, self.key_channels, self.value_channels, self.attention_pool, self.reduction)

    @property
    def params(self) -> int:
        """Parameters of the convolution, as cost.py knows them."""
        return self.params_before

    @property
    def positions(self) -> int:
        return math.prod(self.resolution)

    @property
    def calls(self) -> int:
        """How often a forward pass calls the convolution."""
        return self.macs_before // (self.positions * self._weights)

    @property
    def _weights(self) -> int:
        return math.prod(self.kernel_size) * (self.in_channels // self.groups) * self.out_channels

    @model_validator(mode="after")
    def _fits(self) -> "SitePlan":
        if ("aa" in self.variant) != (self.value_channels > 0) or ("aw" in self.variant) != (self.reduction > 0):
            raise ValueError(
                f"{self.name}: variant {self.variant} does not go with value_channels={self.value_channels} and "
                f"reduction={self.reduction}"
            )
        if "aa" in self.variant:
            self._check_attention()
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{self.name}: {self.groups} groups do not divide {self.in_channels} in_channels and "
                f"{self.out_channels} out_channels"
            )
        if self.reduction and not reduction_fits(self.reduction, self.in_channels, self.groups):
            among = f" in {self.groups} groups" if self.groups > 1 else ""
            raise ValueError(
                f"{self.name}: reduction={self.reduction} does not divide in_channels={self.in_channels}{among}"
            )
        return self

    def _check_attention(self) -> None:
        for key in ("key_channels", "value_channels"):
            channels = getattr(self, key)
            if not self.heads or not channels or channels % self.heads:
                raise ValueError(f"{self.name}: {key}={channels} is not a positive multiple of heads={self.heads}")
        most = self.out_channels - 1 if self.reduction else self.out_channels
        if self.value_channels > most:
            raise ValueError(f"{self.name}: value_channels={self.value_channels} is more than {most}")
        most = 2 * MOST_KEYS * self.out_channels
        if self.key_channels > most:
            raise ValueError(f"{self.name}: key_channels={self.key_channels} is more than {most}")
        if self.value_channels % self.groups:
            raise ValueError(
                f"{self.name}: value_channels={self.value_channels} does not leave {self.groups} groups whole"
            )

    @model_validator(mode="after")
    def _count(self) -> "SitePlan":
        """Hold the source's counts against the shape, and count the split."""
        possible = [self._weights + extra * self.out_channels for extra in range(3)]  # without and with bias and gain
        if not self._weights or self.params_before not in possible:
            known = " or ".join(f"{count:,}" for count in possible)
            raise ValueError(
                f"{self.name}: params_before={self.params_before:,}, and a convolution of this shape has {known}"
            )
        once = self.positions * self._weights
        if not once or not self.macs_before or self.macs_before % once:
            raise ValueError(f"{self.name}: macs_before={self.macs_before:,} is not a multiple of one call's {once:,}")
        object.__setattr__(self, "params_after", cost.params(self, self.choice))
        object.__setattr__(self, "macs_after", cost.macs(self, self.choice))
        return self


class Skipped(_Frozen):
    """A convolution that stays as it is, and why."""

    name: Name
    reason: Name


class Plan(_Frozen):
    """What a model becomes. `macs` are multiply-adds of one image of `input_size`; FLOPs are twice as many.

    `params_after` and `macs_after` are always summed from the sites: a number given for them is not believed.
    """

    schema_number: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    model: Name
    model_args: Arguments = ()
    input_size: tuple[Channels, Side, Side]
    recipe: Name
    recipe_sha256: Sha256 = ""
    budget: Budget = Budget()
    params_before: Total
    params_after: Total = 0
    macs_before: Total
    macs_after: Total = 0
    sites: Annotated[tuple[SitePlan, ...], Field(min_length=1, max_length=MOST_CONVOLUTIONS)]
    skipped: Annotated[tuple[Skipped, ...], Field(max_length=MOST_CONVOLUTIONS)] = ()

    @field_validator("model")
    @classmethod
    def _is_no_address(cls, value: str) -> str:
        if ":" in value:  # hf-hub:... and local-dir:... make timm read other files, or the network
            raise ValueError(f"{value!r} is not in timm's registry")
        return value

    @model_validator(mode="after")
    def _names_are_unique_and_sorted(self) -> "Plan":
        names = [site.name for site in self.sites] + [site.name for site in self.skipped]
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
            raise ValueError(f"named more than once: {', '.join(twice[:3])}{more}")
        for key in ("sites", "skipped"):
            object.__setattr__(self, key, tuple(sorted(getattr(self, key), key=lambda site: natural(site.name))))
        return self

    @model_validator(mode="after")
    def _sum(self) -> "Plan":
        for count in ("params", "macs"):
            before = getattr(self, f"{count}_before")
            replaced, added = (sum(getattr(site, f"{count}_{side}") for site in self.sites) for side in SIDES)
            if replaced > before:
                raise ValueError(f"{count}_before={before:,} is less than the {replaced:,} of its sites")
            object.__setattr__(self, f"{count}_after", before - replaced + added)
        return self

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=indent)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()


@contextmanager
def _validating(origin: str) -> Iterator[None]:
    """Say of a plan that is not valid what is wrong with it."""
    with boundary(f"{origin} is not valid"):
        try:
            yield
        except ValidationError as error:
            raise AugmentError(f"{origin} is not valid: {describe_errors(error, Plan)}") from error


@_validating("the plan of this model")
def make_plan(
    model: str,
    graph: "ModelGraph",
    recipe: Recipe,
    model_args: dict[str, Any] | None = None,
    sensitivity: dict[str, Sensitivity] | None = None,
) -> tuple[Plan, Solution]:
    """The plan of a recipe for a model: sites selected, budget solved.

    Args:
        model: its name in timm's registry.
        graph: the analysed model.
        model_args: what the model is created with besides its name; JSON values.
        sensitivity: of every chosen site, by name; the budget's program then puts attention where it changes the
            model's output least.

    Raises:
        AugmentError: no site, or a budget that cannot be met.
    """
    selection = select(graph.sites, recipe.sites)
    losses = {name: found.divergence for name, found in (sensitivity or {}).items()}
    solution = solve(selection.chosen, recipe.sites, recipe.budget, Counts(graph.params, graph.macs), losses)
    found = sensitivity or {}
    sites = tuple(
        _site_plan(site, choice, recipe.sites.variant, found.get(site.name)) for site, choice in solution.choices
    )
    plan = Plan(
        model=model,
        model_args=model_args or {},
        input_size=graph.input_size,
        recipe=recipe.name,
        recipe_sha256=recipe.digest(),
        budget=recipe.budget,
        params_before=graph.params,
        macs_before=graph.macs,
        sites=sites,
        skipped=tuple(Skipped(name=name, reason=reason) for name, reason in selection.skipped),
    )
    return plan, solution


def _site_plan(site: ConvSite, choice: Choice, variant: Variant, sensitivity: Sensitivity | None = None) -> SitePlan:
    return SitePlan(
        name=site.name,
        variant=variant,
        in_channels=site.in_channels,
        out_channels=site.out_channels,
        kernel_size=site.kernel_size,
        stride=site.stride,
        groups=site.groups,
        resolution=site.resolution,
        heads=choice.heads,
        key_channels=choice.key_channels,
        value_channels=choice.value_channels,
        attention_pool=choice.attention_pool,
        reduction=choice.reduction,
        params_before=cost.params(site, cost.PLAIN),
        macs_before=cost.macs(site, cost.PLAIN),
        sensitivity=sensitivity,
    )


def read_plan(path: Path) -> Plan:
    """A plan from its JSON file, as `augment plan --json` prints it.

    Raises:
        AugmentError: no such file, no JSON, or no plan.
    """
    return parse_plan(read_text(path, "plan", _LARGEST_FILE), f"plan {path}")


def parse_plan(text: str, origin: str) -> Plan:
    """A plan from JSON; `origin` names it in messages."""
    with boundary(f"{origin} is not JSON"):
        data = json.loads(text)
    check_schema(data, origin)
    return validate_plan(data, origin)


def validate_plan(data: Any, origin: str) -> Plan:
    """A plan from its JSON object; `origin` names it in messages.

    Raises:
        AugmentError: it is not valid.
    """
    with _validating(origin):
        return Plan.model_validate(data)


def check_schema(data: Any, origin: str) -> None:
    """Refuse data of a newer schema than this version reads, before anything else of it is looked at."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise AugmentError(
            f"{origin} has schema {schema}, and this version reads {SCHEMA}: install a newer augment-cli"
        )


@_validating("the plan")
def fit_plan(plan: Plan, graph: "ModelGraph", origin: str) -> Plan:
    """A plan that was edited or read, held against the model: its counts made anew, what it leaves out skipped.

    Raises:
        AugmentError: a site that the model does not have, or has in another shape.
    """
    sites_of = {site.name: site for site in graph.sites}
    fitted = tuple(_fit_site(entry, sites_of, origin) for entry in plan.sites)
    taken = {entry.name for entry in fitted}
    reasons = {entry.name: entry.reason for entry in plan.skipped}
    skipped = tuple(
        Skipped(name=name, reason=reasons.get(name, "not in the plan")) for name in sites_of if name not in taken
    )
    found = {"input_size": graph.input_size, "params_before": graph.params, "macs_before": graph.macs}
    return Plan(**dict(plan) | found | {"sites": fitted, "skipped": skipped})


def check_budget(plan: Plan, origin: str) -> None:
    """Refuse a plan that is over its own budget.

    Raises:
        AugmentError: says by how much.
    """
    for name, unit in UNITS.items():
        asked, after = getattr(plan.budget, name), getattr(plan, f"{name}_after")
        most = resolve_amount(asked, getattr(plan, f"{name}_before"))
        if most is not None and after > most:
            raise AugmentError(
                f"{origin} has {after:,} {unit}, {after - most:,} more than its budget.{name}={asked} allows. Edit its "
                f"sites or its budget, or set another one, such as --set budget.{name}=free"
            )


def _fit_site(entry: SitePlan, sites_of: dict[str, ConvSite], origin: str) -> SitePlan:
    site = sites_of.get(entry.name)
    if site is None:
        raise AugmentError(f"{origin}: the model has no convolution {entry.name}{nearest(entry.name, sites_of)}")
    for key in ("in_channels", "out_channels", "kernel_size", "stride", "groups", "resolution"):
        planned, actual = getattr(entry, key), getattr(site, key)
        if planned != actual:
            raise AugmentError(f"{origin}: {entry.name} has {key} {actual} in the model, and {planned} in the plan")
    if reason := structural_obstacle(site, entry.variant) or one_position(site, entry.choice):
        raise AugmentError(f"{origin}: {entry.name} cannot be replaced: {reason}")
    return _site_plan(site, entry.choice, entry.variant, entry.sensitivity)
