"""The numbers of a report, computed once from a plan and metadata. The other modules here only show them."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from augment_cli.analysis.site import Size
from augment_cli.checkpoint.metadata import Metadata
from augment_cli.operators import Operator, Split, get_operator
from augment_cli.planning.latency import PlanLatency, SiteLatency
from augment_cli.planning.plan import Plan, Sensitivity, SitePlan
from augment_cli.planning.recipe import resolve_amount
from augment_cli.reporting.network import Mark, marks
from augment_cli.reporting.provenance import RecipeOrigin
from augment_cli.surgery.records import Fidelity, Inheritance


@dataclass(frozen=True, slots=True)
class Change:
    """A count before and after."""

    before: int
    after: int

    @property
    def delta(self) -> int:
        return self.after - self.before

    @property
    def ratio(self) -> float | None:
        """After, as a share of before; None where there was nothing before."""
        return self.after / self.before if self.before else None

    @property
    def percent(self) -> float | None:
        return 100 * self.delta / self.before if self.before else None

    @property
    def direction(self) -> str:
        """The style of a change in a page: more, less or same."""
        return "more" if self.delta > 0 else "less" if self.delta else "same"

    @classmethod
    def total(cls, changes: Iterable["Change"]) -> "Change":
        changes = tuple(changes)
        return cls(sum(c.before for c in changes), sum(c.after for c in changes))


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget as the user wrote it, the most that it allows and the rest; both are None where it is free."""

    asked: str
    most: int | None
    left: int | None

    @classmethod
    def of(cls, asked: str, change: Change) -> "Limit":
        most = resolve_amount(asked, change.before)
        return cls(asked, most, None if most is None else most - change.after)

    @property
    def share_left(self) -> float:
        """The rest as a share of the most; negative where the limit is exceeded, infinite where it is free."""
        return math.inf if self.most is None or self.left is None else self.left / max(self.most, 1)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio to the output channels: over all sites, and of the sites with the least and the most."""

    overall: float
    least: float
    most: float

    @classmethod
    def of(cls, parts: Iterable[tuple[float, int]]) -> "Ratio":
        """From (ratio, output channels) of one site or more."""
        ratios, widths = zip(*parts, strict=True)
        overall = sum(ratio * width for ratio, width in zip(ratios, widths, strict=True)) / sum(widths)
        return cls(overall, min(ratios), max(ratios))


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One replaced convolution. Sizes are (height, width); resolution is the size of the output map."""

    name: str
    operator: str
    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size
    groups: int
    resolution: Size
    split: Split
    params: Change
    macs: Change
    ratios: tuple[tuple[str, float], ...] = ()
    given_up: int = 0
    inheritance: Inheritance | None = None
    sensitivity: Sensitivity | None = None
    latency: Change | None = None  # nanoseconds, as predicted

    @property
    def error(self) -> float | None:
        """Normalised mean squared error of the fit to the source; None where nothing was fitted."""
        return self.inheritance.error if self.inheritance else None

    @property
    def columns(self) -> dict[str, str]:
        """The split's cells in a table, by column title."""
        return get_operator(self.operator).columns(self.split)

    @classmethod
    def of(
        cls, site: SitePlan, inheritance: Inheritance | None = None, latency: SiteLatency | None = None
    ) -> "SiteRow":
        shape = ("name", "operator", "in_channels", "out_channels", "kernel_size", "stride", "groups", "resolution")
        ratios = get_operator(site.operator).ratios(site, site.split)
        return cls(
            **{key: getattr(site, key) for key in shape},
            split=site.split,
            ratios=tuple(ratios.items()),
            given_up=site.given_up,
            params=Change(site.params_before, site.params_after),
            macs=Change(site.macs_before, site.macs_after),
            inheritance=inheritance,
            sensitivity=site.sensitivity,
            latency=Change(latency.before, latency.after) if latency else None,
        )


@dataclass(frozen=True, slots=True)
class SkippedGroup:
    """Convolutions that stay as they are for the same reason."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A plan's numbers and, with metadata, a converted model's. Without metadata the latter are None.

    file: name of the file or folder that the report is of, without those that hold it.
    """

    base: str
    model: str
    model_args: dict[str, Any]
    input_size: tuple[int, int, int]
    recipe: RecipeOrigin
    plan_sha256: str
    params: Change
    macs: Change
    params_limit: Limit
    macs_limit: Limit
    latency_limit: Limit
    sites: tuple[SiteRow, ...]
    skipped: tuple[SkippedGroup, ...]
    weights: str | None
    source_sha256: str | None
    versions: dict[str, str]
    fidelity: Fidelity | None = None
    marks: tuple[Mark, ...] = ()
    timed: PlanLatency | None = None
    file: str | None = None

    @classmethod
    def of(cls, plan: Plan, metadata: Metadata | None = None, path: Path | None = None) -> Self:
        """The report of a plan or, with metadata, of a converted model, which `path` holds."""
        inherited = {record.name: record for record in metadata.inheritance} if metadata else {}
        params = Change(plan.params_before, plan.params_after)
        macs = Change(plan.macs_before, plan.macs_after)
        timed = plan.latency
        times = {site.name: site for site in timed.sites} if timed else {}
        return cls(
            base=plan.base,
            model=plan.model,
            model_args=dict(plan.model_args),
            input_size=plan.input_size,
            recipe=RecipeOrigin.of(plan),
            plan_sha256=plan.digest(),
            params=params,
            macs=macs,
            params_limit=Limit.of(plan.budget.params, params),
            macs_limit=Limit.of(plan.budget.macs, macs),
            latency_limit=Limit.of(plan.budget.latency, _predicted(timed)) if timed else Limit("free", None, None),
            sites=tuple(SiteRow.of(site, inherited.get(site.name), times.get(site.name)) for site in plan.sites),
            skipped=_by_reason(plan),
            weights=metadata.weights if metadata else None,
            source_sha256=metadata.source_sha256 if metadata else None,
            versions=dict(metadata.versions) if metadata else {},
            fidelity=metadata.fidelity if metadata else None,
            marks=marks(plan),
            file=path.resolve().name if path else None,
            timed=timed,
        )

    @property
    def latency(self) -> Change | None:
        """Nanoseconds of a pass, as predicted; None where it was not measured."""
        return _predicted(self.timed) if self.timed else None

    @property
    def measured_latency(self) -> Change | None:
        """Nanoseconds of a pass of the source, run as a whole, and of the model by the median of their ratios."""
        whole = self.timed.measured if self.timed else None
        if whole is None:
            return None
        return Change(round(whole.before.median), round(whole.before.median * whole.ratio.median))

    @cached_property
    def sites_latency(self) -> Change | None:
        """Nanoseconds of the replaced convolutions alone."""
        changes = [site.latency for site in self.sites if site.latency]
        return Change.total(changes) if changes else None

    @property
    def flops(self) -> Change:
        """FLOPs = 2 x multiply-adds."""
        return Change(2 * self.macs.before, 2 * self.macs.after)

    @property
    def convolutions(self) -> int:
        """Number of convolutions in the model, replaced or not."""
        return len(self.sites) + sum(len(group.names) for group in self.skipped)

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The operators of the sites, by name."""
        return tuple(get_operator(name) for name in sorted({site.operator for site in self.sites}))

    @property
    def becomes(self) -> str:
        """The operators' titles, as words in a sentence."""
        return " or ".join(operator.title for operator in self.operators)

    @property
    def columns(self) -> tuple[str, ...]:
        """Titles of the columns that show the sites' splits."""
        return tuple(dict.fromkeys(title for site in self.sites for title in site.columns))

    @property
    def legend(self) -> tuple[str, ...]:
        """Sentences that explain those columns."""
        return tuple(dict.fromkeys(sentence for operator in self.operators for sentence in operator.legend))

    @cached_property
    def sites_params(self) -> Change:
        """Parameters of the replaced convolutions alone."""
        return Change.total(site.params for site in self.sites)

    @cached_property
    def sites_macs(self) -> Change:
        """Multiply-adds of the replaced convolutions alone."""
        return Change.total(site.macs for site in self.sites)

    @cached_property
    def ratios(self) -> dict[str, Ratio]:
        """The ratios to the output channels that operators report, such as keys and values, by name."""
        parts: dict[str, list[tuple[float, int]]] = defaultdict(list)
        for site in self.sites:
            for name, ratio in site.ratios:
                parts[name].append((ratio, site.out_channels))
        return {name: Ratio.of(own) for name, own in parts.items()}

    @cached_property
    def inheritance(self) -> dict[str, int] | None:
        """Number of sites by kind of inheritance: exact, carried, fitted, new; None without metadata."""
        kinds = Counter(site.inheritance.kind for site in self.sites if site.inheritance)
        return {kind: kinds[kind] for kind in ("exact", "carried", "fitted", "new")} if kinds else None

    @cached_property
    def error(self) -> float | None:
        """Mean over the fitted sites of the normalised mean squared error; None where no site was fitted."""
        errors = [e for site in self.sites if (e := site.error) is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def exact(self) -> bool:
        """Whether the converted model computes what its source computes: no site gives up a filter."""
        return not any(site.given_up for site in self.sites)


def _predicted(timed: PlanLatency) -> Change:
    return Change(timed.source, timed.predicted)


def _by_reason(plan: Plan) -> tuple[SkippedGroup, ...]:
    names = defaultdict(list)
    for entry in plan.skipped:
        names[entry.reason].append(entry.name)
    return tuple(
        SkippedGroup(reason, tuple(group))
        for reason, group in sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    )
