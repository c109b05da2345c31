"""Latency as planning knows it: how it is measured, the times that were found, and what a plan says of its own.

Times are whole nanoseconds of one pass of a model over a batch: forward alone, or forward and backward in training. How
they are measured is the room `latency`'s; here they are numbers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from augment_cli.analysis.site import ConvSite
from augment_cli.bounds import MOST_CONVOLUTIONS, Name, Sha256, Total
from augment_cli.operators import Operator, Split, Table

if TYPE_CHECKING:
    from augment_cli.planning.plan import SitePlan

# Added to the diagonal of the normal equations, as a share of the points: splits are few, and their axes may be alike.
_RIDGE = 1e-3


class LatencySettings(Table):
    """[latency]: how latency is measured."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d{1,3})?)$", description="cpu, cuda or cuda:1")] = "cpu"
    batch: Annotated[int, Field(ge=1, le=4096, description="images in a batch")] = 1
    threads: Annotated[int | None, Field(ge=1, le=1024, description="of the CPU; torch's own number by default")] = None
    precision: Annotated[Literal["fp32", "bf16", "fp16"], Field(description="the last two by torch.autocast")] = "fp32"
    mode: Annotated[
        Literal["inference", "training"], Field(description="a forward pass, or a forward and a backward pass")
    ] = "inference"
    seconds: Annotated[float, Field(ge=1, le=86_400, description="how long measuring may take, about")] = 60.0

    def describe(self) -> str:
        """The settings in words; `seconds` is not among them, as no time depends on it."""
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else ""
        return f"{self.mode} on {self.device}, batch {self.batch}{threads}, {self.precision}"


@dataclass(frozen=True)
class Time:
    """Nanoseconds, and their standard error."""

    value: float
    error: float = 0.0


@dataclass(frozen=True, eq=False)
class SiteTimes:
    """Times of a convolution and of the splits that were measured in its place; equal sites share one."""

    before: Time
    splits: Mapping[str, Mapping[Split, Time]]  # by operator

    def estimate(self, site: ConvSite, operator: Operator, splits: Sequence[Split]) -> list[Time]:
        """The time of each split: as measured, or interpolated between those that were.

        Interpolation is linear in the split's numbers and its multiply-adds, and keeps the measured points: what the
        line misses at these is spread by the inverse square of the distance. Its error is what the line misses, as a
        root mean square.
        """
        found = dict(self.splits.get(operator.name, {}))
        known, wanted = list(found), [split for split in splits if split not in found]
        if wanted:
            values = np.array([found[split].value for split in known])
            axes = _axes(site, operator, [*known, *wanted])
            line, missed = _line(axes, values)
            far = ((axes[len(known) :, None] - axes[None, : len(known)]) ** 2).sum(2)
            weights = 1 / np.maximum(far, 1e-9)
            estimates = line[len(known) :] + weights @ missed / weights.sum(1)
            error = float(np.sqrt((missed**2).mean()))
            floor = values.min() / 4  # a line may lead below nothing
            found |= {split: Time(max(float(e), floor), error) for split, e in zip(wanted, estimates, strict=True)}
        return [found[split] for split in splits]


def _axes(site: ConvSite, operator: Operator, splits: Sequence[Split]) -> np.ndarray:
    """(splits, axes): the numbers of each split and its multiply-adds, from 0 to 1; constant axes are left out."""
    table = np.array([[*asdict(split).values(), operator.macs(site, split)] for split in splits], float)
    low, width = table.min(0), np.ptp(table, 0)
    return ((table - low) / np.where(width, width, 1))[:, width > 0]


def spread(site: ConvSite, operator: Operator, splits: Sequence[Split], written: Split, count: int) -> list[Split]:
    """Splits to measure, so that others can be interpolated: the written one, then each as far as can be from those.

    They are of the nearer half of the splits, by distance from the written one: budgets choose few of the others.
    """
    nearer = sorted(splits, key=lambda split: operator.distance(site, split, written))[: max(count, len(splits) // 2)]
    axes = _axes(site, operator, nearer)
    chosen = [nearer.index(written)]
    far = ((axes - axes[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(count, len(nearer)):
        chosen.append(int(far.argmax()))
        far = np.minimum(far, ((axes - axes[chosen[-1]]) ** 2).sum(1))
    return [nearer[i] for i in chosen]


def _line(axes: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A plane through the first rows' values by least squares: its height at all rows, and what it misses at those."""
    known = len(values)
    rows = np.column_stack([np.ones(len(axes)), axes])
    inner = rows[:known].T @ rows[:known] + _RIDGE * known * np.diag([0.0] + [1.0] * axes.shape[1])
    heights = rows @ np.linalg.solve(inner, rows[:known].T @ values)
    return heights, values - heights[:known]


@dataclass(frozen=True)
class Times:
    """What was measured for a model: of its whole pass, and of its sites by name.

    settings: with the number of threads that it was. machine: processor and versions, in words. only_measured: budgets
    choose among the splits that were measured.
    """

    settings: LatencySettings
    machine: str
    source: int
    sites: Mapping[str, SiteTimes]
    only_measured: bool = False

    def admitted(self, site: ConvSite, operator: Operator, splits: Sequence[Split]) -> tuple[Split, ...]:
        """The splits that a budget may choose."""
        measured = self.sites[site.name].splits.get(operator.name, {})
        return tuple(split for split in splits if split in measured or not self.only_measured)

    def before(self, site: ConvSite) -> Time:
        return self.sites[site.name].before

    def after(self, site: ConvSite, operator: Operator, splits: Sequence[Split]) -> list[Time]:
        return self.sites[site.name].estimate(site, operator, splits)


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spread(_Frozen):
    """The quartiles of what was measured in several rounds."""

    low: Annotated[float, Field(ge=0)]
    median: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(ge=0)]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.quantile(np.array(values, float), (0.25, 0.5, 0.75)).tolist()
        return cls(low=low, median=median, high=high)


class Measured(_Frozen):
    """The whole model beside its source, in alternation: nanoseconds of both, and their ratio round by round."""

    before: Spread
    after: Spread
    ratio: Spread
    rounds: Annotated[int, Field(ge=1, le=10**6)]


class SiteLatency(_Frozen):
    """Nanoseconds of a site in one pass, before and as predicted."""

    name: Name
    before: Total
    after: Total


class PlanLatency(_Frozen):
    """What a plan's model takes for a batch: predicted from its sites and, where it was run, measured.

    Attributes:
        splits: digest of the sites' splits that this is about; of any others it says nothing.
        source: nanoseconds of the source. `predicted` is that and the sites' changes; `error` its standard error.
    """

    settings: LatencySettings
    machine: Name
    splits: Sha256
    source: Total
    predicted: Total
    error: Total
    sites: Annotated[tuple[SiteLatency, ...], Field(max_length=MOST_CONVOLUTIONS)]
    measured: Measured | None = None

    @property
    def predicted_ratio(self) -> float:
        """The model's time as a share of its source's, as predicted."""
        return self.predicted / self.source if self.source else 1.0


def splits_digest(sites: Sequence["SitePlan"]) -> str:
    """SHA-256 of which sites become what."""
    named = sorted((site.name, site.operator, asdict(site.split)) for site in sites)
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def predict(
    sites: Sequence[tuple[ConvSite, "SitePlan"]], times: Times, operators: Mapping[str, Operator]
) -> PlanLatency:
    """The latency of a plan from its sites' times.

    Args:
        sites: each convolution with its replacement.
        operators: of the replacements, by name.
    """
    found, variance = [], 0.0
    for site, planned in sites:
        before, (after,) = times.before(site), times.after(site, operators[planned.operator], (planned.split,))
        found.append(SiteLatency(name=site.name, before=round(before.value), after=round(after.value)))
        variance += before.error**2 + after.error**2
    change = sum(site.after - site.before for site in found)
    return PlanLatency(
        settings=times.settings,
        machine=times.machine,
        splits=splits_digest([planned for _, planned in sites]),
        source=times.source,
        predicted=max(times.source + change, 0),
        error=round(variance**0.5),
        sites=tuple(found),
    )
