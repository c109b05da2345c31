"""The numbers of a report: made once from a plan and metadata, and only shown by everything else here."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from augment_cli.analysis.site import Size
from augment_cli.checkpoint.metadata import Metadata
from augment_cli.planning.plan import Plan, Sensitivity, SitePlan
from augment_cli.planning.recipe import resolve_amount
from augment_cli.report.provenance import RecipeOrigin
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

    @classmethod
    def total(cls, changes: Iterable["Change"]) -> "Change":
        changes = tuple(changes)
        return cls(sum(c.before for c in changes), sum(c.after for c in changes))


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget as it was asked for, the most that it allows, and what is left under it; None where it is free."""

    asked: str
    most: int | None
    left: int | None

    @classmethod
    def of(cls, asked: str, change: Change) -> "Limit":
        most = resolve_amount(asked, change.before)
        return cls(asked, most, None if most is None else most - change.after)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Attention's channels as a share of the output channels: of all AA sites together, and the extremes."""

    overall: float
    least: float
    most: float

    @classmethod
    def of(cls, parts: Iterable[tuple[int, int]]) -> "Ratio | None":
        parts = tuple(parts)
        if not parts:
            return None
        ratios = [channels / width for channels, width in parts]
        overall = sum(channels for channels, _ in parts) / sum(width for _, width in parts)
        return cls(overall, min(ratios), max(ratios))


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One replaced convolution. Sizes are (height, width); resolution is that of the output map."""

    name: str
    variant: str
    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size
    groups: int
    resolution: Size
    heads: int
    key_channels: int
    value_channels: int
    attention_pool: int
    reduction: int
    params: Change
    macs: Change
    inheritance: Inheritance | None = None
    sensitivity: Sensitivity | None = None

    @property
    def error(self) -> float | None:
        """Of the fit to the source; None where there was none."""
        return self.inheritance.error if self.inheritance else None

    @classmethod
    def of(cls, site: SitePlan, inheritance: Inheritance | None = None) -> "SiteRow":
        others = {"params_before", "params_after", "macs_before", "macs_after", "sensitivity"}
        return cls(
            **site.model_dump(exclude=others),
            params=Change(site.params_before, site.params_after),
            macs=Change(site.macs_before, site.macs_after),
            inheritance=inheritance,
            sensitivity=site.sensitivity,
        )


@dataclass(frozen=True, slots=True)
class SkippedGroup:
    """Convolutions that stay as they are for the same reason."""

    reason: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a plan makes of a model, in numbers. What only a converted model has is None without metadata."""

    model: str
    model_args: dict[str, Any]
    input_size: tuple[int, int, int]
    recipe: RecipeOrigin
    plan_sha256: str
    params: Change
    macs: Change
    params_limit: Limit
    macs_limit: Limit
    sites: tuple[SiteRow, ...]
    skipped: tuple[SkippedGroup, ...]
    weights: str | None
    source_sha256: str | None
    versions: dict[str, str]
    fidelity: Fidelity | None = None

    @classmethod
    def of(cls, plan: Plan, metadata: Metadata | None = None) -> "Report":
        """The report of a plan, or with its metadata that of a converted model."""
        inherited = {record.name: record for record in metadata.inheritance} if metadata else {}
        params = Change(plan.params_before, plan.params_after)
        macs = Change(plan.macs_before, plan.macs_after)
        return cls(
            model=plan.model,
            model_args=dict(plan.model_args),
            input_size=plan.input_size,
            recipe=RecipeOrigin.of(plan),
            plan_sha256=plan.digest(),
            params=params,
            macs=macs,
            params_limit=Limit.of(plan.budget.params, params),
            macs_limit=Limit.of(plan.budget.macs, macs),
            sites=tuple(SiteRow.of(site, inherited.get(site.name)) for site in plan.sites),
            skipped=_by_reason(plan),
            weights=metadata.weights if metadata else None,
            source_sha256=metadata.source_sha256 if metadata else None,
            versions=dict(metadata.versions) if metadata else {},
            fidelity=metadata.fidelity if metadata else None,
        )

    @property
    def flops(self) -> Change:
        """FLOPs = 2 x multiply-adds."""
        return Change(2 * self.macs.before, 2 * self.macs.after)

    @property
    def convolutions(self) -> int:
        """Replaced or not."""
        return len(self.sites) + sum(len(group.names) for group in self.skipped)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(sorted({site.variant for site in self.sites}))

    @cached_property
    def sites_params(self) -> Change:
        """Of the replaced convolutions alone."""
        return Change.total(site.params for site in self.sites)

    @cached_property
    def sites_macs(self) -> Change:
        """Of the replaced convolutions alone."""
        return Change.total(site.macs for site in self.sites)

    @cached_property
    def key_ratio(self) -> Ratio | None:
        """The attained kappa = d_k / F_out; None without AA."""
        return Ratio.of((site.key_channels, site.out_channels) for site in self.sites if site.value_channels)

    @cached_property
    def value_ratio(self) -> Ratio | None:
        """The attained upsilon = d_v / F_out; None without AA."""
        return Ratio.of((site.value_channels, site.out_channels) for site in self.sites if site.value_channels)

    @cached_property
    def inheritance(self) -> dict[str, int] | None:
        """Sites by what they kept: exact, carried, fitted, new; None without metadata."""
        kinds = Counter(site.inheritance.kind for site in self.sites if site.inheritance)
        return {kind: kinds[kind] for kind in ("exact", "carried", "fitted", "new")} if kinds else None

    @cached_property
    def error(self) -> float | None:
        """Normalised mean squared error of the fitted channels, on average over the sites; None where none is."""
        errors = [e for site in self.sites if (e := site.error) is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def exact(self) -> bool:
        """Whether the converted model computes what its source computes: no site gives up a filter."""
        return all(site.value_channels == 0 for site in self.sites)


def _by_reason(plan: Plan) -> tuple[SkippedGroup, ...]:
    names = defaultdict(list)
    for entry in plan.skipped:
        names[entry.reason].append(entry.name)
    return tuple(
        SkippedGroup(reason, tuple(group))
        for reason, group in sorted(names.items(), key=lambda item: (-len(item[1]), item[0]))
    )
