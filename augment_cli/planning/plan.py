"""The plan: each convolution of a model with its replacement. Frozen, hashable, JSON in and out."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from augment_cli.analysis.arguments import Arguments, freeze_arguments
from augment_cli.analysis.facts import Analysis
from augment_cli.analysis.site import ConvSite, filter_macs
from augment_cli.bounds import (
    MOST_CONVOLUTIONS,
    Channels,
    CountOfChannels,
    KernelSide,
    Name,
    Sha256,
    Side,
    Total,
)
from augment_cli.errors import AugmentError, InputError, boundary
from augment_cli.operators import Split, get_operator
from augment_cli.planning.budget import Counts, Solution, solve
from augment_cli.planning.latency import PlanLatency, Times, predict, splits_digest
from augment_cli.planning.recipe import Budget, Recipe, describe_errors
from augment_cli.planning.selection import select

SCHEMA = 1

SIDES = ("before", "after")


def natural(name: str) -> list:
    """A sort key under which layer2.9 comes before layer2.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Sensitivity(_Frozen):
    """Change of the model's output when one site alone is replaced, on images that its fit has not seen.

    agreement: share of images with the source's top-1; divergence: mean KL(source, converted) of the predictions, nats;
    given_up: output channels that the source's filters no longer computed when that was measured.
    """

    agreement: Annotated[float, Field(ge=0, le=1)]
    divergence: Annotated[float, Field(ge=0)]
    given_up: CountOfChannels

    def predict(self, given_up: int) -> float:
        """The divergence under another split: it grows with the square of the given-up channels (budget.py)."""
        return self.divergence * (given_up / self.given_up) ** 2 if self.given_up else self.divergence


class SitePlan(_Frozen):
    """A convolution and its replacement. Sizes are (height, width); resolution is the size of the output map.

    `split` belongs to the operator. `params_after` and `macs_after` are always counted from the split: a number given
    for them is not believed.
    """

    name: Name
    operator: Name
    in_channels: Channels
    out_channels: Channels
    kernel_size: tuple[KernelSide, KernelSide]
    stride: tuple[KernelSide, KernelSide]
    groups: Channels = 1
    resolution: tuple[Side, Side]
    split: SerializeAsAny[Split]
    params_before: Total
    params_after: Total = 0
    macs_before: Total
    macs_after: Total = 0
    sensitivity: Sensitivity | None = None

    @property
    def params(self) -> int:
        """Parameters of the source's convolution."""
        return self.params_before

    @property
    def positions(self) -> int:
        """Positions of the output map."""
        return math.prod(self.resolution)

    @property
    def calls(self) -> int:
        """Calls of the convolution in a forward pass."""
        return self.macs_before // (self.positions * self._weights)

    @property
    def given_up(self) -> int:
        """Output channels that the source's filters no longer compute."""
        return get_operator(self.operator).given_up(self.split)

    @property
    def _weights(self) -> int:
        return math.prod(self.kernel_size) * (self.in_channels // self.groups) * self.out_channels

    @field_validator("operator")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            get_operator(name)
        except AugmentError as error:
            raise ValueError(str(error)) from error
        return name

    @field_validator("split", mode="before")
    @classmethod
    def _parse_split(cls, split: Any, info: ValidationInfo) -> Any:
        if "operator" not in info.data:  # its own error is told
            raise ValueError("the operator of this split is not known")
        return get_operator(info.data["operator"]).parse(split)

    @model_validator(mode="after")
    def _fits(self) -> "SitePlan":
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"{self.name}: {self.groups} groups do not divide {self.in_channels} in_channels and "
                f"{self.out_channels} out_channels"
            )
        try:
            get_operator(self.operator).check(self, self.split)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return self

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
        operator = get_operator(self.operator)
        object.__setattr__(self, "params_after", operator.params(self, self.split))
        object.__setattr__(self, "macs_after", operator.macs(self, self.split))
        return self


class Skipped(_Frozen):
    """A convolution that stays as it is, and why. Its shape is for pictures: None where it is not known.

    resolution: (height, width) of the output map; None too where the convolution is never called.
    """

    name: Name
    reason: Name
    out_channels: Channels | None = None
    kernel_size: tuple[KernelSide, KernelSide] | None = None
    resolution: tuple[Side, Side] | None = None

    @classmethod
    def of(cls, site: ConvSite, reason: str) -> "Skipped":
        called = site.resolution if site.calls else None
        return cls(
            name=site.name,
            reason=reason,
            out_channels=site.out_channels,
            kernel_size=site.kernel_size,
            resolution=called,
        )


class Plan(_Frozen):
    """A model and the replacements of its convolutions.

    `macs` are multiply-adds of one image of `input_size`; FLOPs are twice as many.

    `base` says who makes the model: timm, by its name and arguments, or the user, for whom `model` is a description.

    `params_after` and `macs_after` are always summed from the sites: a number given for them is not believed. `latency`
    holds for the sites that it was measured for; where they were edited since, it is dropped.
    """

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    base: Literal["timm", "other"] = "timm"
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
    latency: PlanLatency | None = None

    @field_validator("model")
    @classmethod
    def _is_no_address(cls, value: str, info: ValidationInfo) -> str:
        if (
            info.data.get("base") == "timm" and ":" in value
        ):  # hf-hub:... and local-dir:... make timm read other files, or the network
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

    @model_validator(mode="after")
    def _latency_is_of_these_sites(self) -> "Plan":
        if self.latency is not None and self.latency.splits != splits_digest(self.sites):
            object.__setattr__(self, "latency", None)
        return self

    @property
    def predicted_divergence(self) -> float | None:
        """The sum of the sites' predicted divergences, nats; None unless every site was measured alone."""
        measured = [site.sensitivity.predict(site.given_up) for site in self.sites if site.sensitivity]
        return sum(measured) if len(measured) == len(self.sites) else None

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=indent)

    def digest(self) -> str:
        """SHA-256 of the plan's JSON."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()


@contextmanager
def validating(origin: str) -> Iterator[None]:
    """Say of a plan that is not valid what is wrong with it."""
    with boundary(f"{origin} is not valid"):
        try:
            yield
        except ValidationError as error:
            raise InputError(f"{origin} is not valid: {describe_errors(error, Plan)}") from error


@validating("the plan of this model")
def make_plan(
    model: str,
    graph: Analysis,
    recipe: Recipe,
    model_args: dict[str, Any] | None = None,
    sensitivity: dict[str, Sensitivity] | None = None,
    base: Literal["timm", "other"] = "timm",
    times: Times | None = None,
) -> tuple[Plan, Solution]:
    """The plan of a recipe for a model: sites selected, budget solved.

    Args:
        model: its name in timm's registry, or a description where `base` is "other".
        graph: the analysed model.
        model_args: what the model is created with besides its name; JSON values.
        sensitivity: of every chosen site, by name; the budget's program then puts attention where it changes the
            model's output least.
        times: of the model and its sites, which a budget of latency needs.

    Raises:
        AugmentError: no site, or a budget that cannot be met.
    """
    selection, found = select(graph.sites, recipe), sensitivity or {}
    by_name = {site.name: site for site in graph.sites}
    losses = {name: measured.divergence for name, measured in found.items()}
    solution = solve(selection.chosen, recipe, Counts(graph.params, graph.macs), losses, times)
    sites = tuple(site_plan(site, split, recipe.operator, found.get(site.name)) for site, split in solution.splits)
    skipped = (
        *selection.skipped,
        *((name, f"left as it is by budget.latency={recipe.budget.latency}") for name in solution.left),
    )
    plan = Plan(
        base=base,
        model=model,
        model_args=freeze_arguments(model_args or {}),
        input_size=graph.input_size,
        recipe=recipe.name,
        recipe_sha256=recipe.digest(),
        budget=recipe.budget,
        params_before=graph.params,
        macs_before=graph.macs,
        sites=sites,
        skipped=tuple(Skipped.of(by_name[name], reason) for name, reason in skipped),
    )
    return (with_latency(plan, graph, times) if times else plan), solution


def with_latency(plan: Plan, graph: Analysis, times: Times) -> Plan:
    """A plan with the latency that the times of its sites predict."""
    by_name = {site.name: site for site in graph.sites}
    operators = {site.operator: get_operator(site.operator) for site in plan.sites}
    predicted = predict([(by_name[site.name], site) for site in plan.sites], times, operators)
    return plan.model_copy(update={"latency": predicted})


def site_plan(site: ConvSite, split: Split, operator: str, sensitivity: Sensitivity | None = None) -> SitePlan:
    """The entry of a plan for a convolution and its split, its counts made."""
    return SitePlan(
        name=site.name,
        operator=operator,
        in_channels=site.in_channels,
        out_channels=site.out_channels,
        kernel_size=site.kernel_size,
        stride=site.stride,
        groups=site.groups,
        resolution=site.resolution,
        split=split,
        params_before=site.params,
        macs_before=filter_macs(site, site.out_channels),
        sensitivity=sensitivity,
    )
