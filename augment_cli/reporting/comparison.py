"""Several models or plans side by side: their counts, their splits by map size, and what differs site by site."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from augment_cli.analysis.site import Size
from augment_cli.operators import get_operator
from augment_cli.planning.plan import Plan, SitePlan, natural
from augment_cli.reporting.folding import fold_names
from augment_cli.reporting.markup import Markup, tag
from augment_cli.reporting.network import marks, network_figure
from augment_cli.reporting.numbers import Change
from augment_cli.reporting.sheet import Column, Sheet, Sheets
from augment_cli.reporting.text import cell
from augment_cli.reporting.units import UNITS, amount, counted, divergence, percent, share, size, span
from augment_cli.surgery.records import Fidelity

SCHEMA = 1
STAYS = "-"
_MOST_BESIDE = 6


@dataclass(frozen=True)
class Candidate:
    """A model as it is, or a plan for one; `fidelity` is known of a converted model whose attention was fitted."""

    label: str
    model: str
    input_size: tuple[int, int, int]
    params: Change
    macs: Change
    plan: Plan | None = None
    fidelity: Fidelity | None = None

    @classmethod
    def of(cls, label: str, plan: Plan, fidelity: Fidelity | None = None) -> "Candidate":
        params, macs = (Change(getattr(plan, f"{n}_before"), getattr(plan, f"{n}_after")) for n in ("params", "macs"))
        return cls(label, plan.model, plan.input_size, params, macs, plan, fidelity)

    @property
    def sites(self) -> tuple[SitePlan, ...]:
        return self.plan.sites if self.plan else ()

    @property
    def given_up(self) -> float | None:
        """Share of the sites' output channels that attention took; None without sites."""
        channels = sum(site.out_channels for site in self.sites)
        return sum(site.given_up for site in self.sites) / channels if channels else None

    @property
    def predicted_divergence(self) -> float | None:
        return self.plan.predicted_divergence if self.plan else None


@dataclass(frozen=True, repr=False)
class Comparison(Sheets):
    """What is compared, in the order in which it was named, and what could not be planned, with the reasons.

    `str` gives the tables that `augment compare` shows.
    """

    candidates: tuple[Candidate, ...]
    impossible: tuple[tuple[str, str], ...] = ()

    @property
    def heading(self) -> str:
        return ", ".join(dict.fromkeys(candidate.model for candidate in self.candidates))

    @cached_property
    def differing(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """By model, the sites that do not become the same in all plans for it: what they become, by candidate.

        A model with one plan has no entry. The texts are in the order of `plans_of`.
        """
        found = {}
        for model, members in self.plans_of.items():
            sites = [{site.name: short(site) for site in self.candidates[i].sites} for i in members]
            names = sorted({name for own in sites for name in own}, key=natural)
            rows = {name: tuple(own.get(name, STAYS) for own in sites) for name in names}
            found[model] = {name: row for name, row in rows.items() if len(set(row)) > 1}
        return {model: rows for model, rows in found.items() if rows}

    @cached_property
    def plans_of(self) -> dict[str, tuple[int, ...]]:
        """The places among the candidates of the plans for each model that has two or more."""
        members: dict[str, list[int]] = defaultdict(list)
        for i, candidate in enumerate(self.candidates):
            if candidate.plan:
                members[candidate.model.partition(".")[0]].append(i)
        return {model: tuple(places) for model, places in members.items() if len(places) > 1}

    def sheets(self, full: bool = False) -> Iterator[Sheet]:
        """What differs site by site is shown of a few candidates, or where `full`."""
        yield self._totals()
        if any(candidate.plan for candidate in self.candidates):
            yield self._maps()
        if full or len(self.candidates) <= _MOST_BESIDE:
            for model, rows in self.differing.items():
                yield self._sites(model, rows)
        if self.impossible:
            columns = Column("Plan", is_text=True), Column("Why not", is_text=True)
            yield Sheet("Not possible", columns, self.impossible)

    def _totals(self) -> Sheet:
        """A row of counts for each candidate; a column that nobody has a value in is left out."""
        rows = [self._total(i, candidate) for i, candidate in enumerate(self.candidates, 1)]
        used = [title for title in rows[0] if any(row[title] for row in rows)]
        columns = tuple(Column(title, is_text=title in ("Model or plan", "Images")) for title in used)
        notes = ["MACs are the multiply-adds of one image. % is the change against the source."]
        notes += ["Taken is the share of the sites' output channels that attention computes."] * ("Taken" in used)
        notes += ["Time is the change against the source, predicted from the sites and measured."] * ("Time" in used)
        notes += ["KL in nats; predicted from the sites measured alone."] * ("KL predicted" in used)
        cells = tuple(tuple(row[title] or STAYS for title in used) for row in rows)
        return Sheet(
            counted(len(self.candidates), "model or plan", "models and plans"), columns, cells, " ".join(notes)
        )

    def _total(self, number: int, candidate: Candidate) -> dict[str, str]:
        planned, known = candidate.plan is not None, candidate.fidelity
        predicted, taken = candidate.predicted_divergence, candidate.given_up
        sizes = {other.input_size for other in self.candidates}
        timed = candidate.plan.latency if candidate.plan else None
        whole = timed.measured if timed else None
        return {
            "#": str(number),
            "Model or plan": candidate.label,
            "Images": size(candidate.input_size[1:]) if len(sizes) > 1 else "",
            "Parameters": f"{candidate.params.after:,}",
            "%": percent(candidate.params.percent) if planned else "",
            "MACs": amount(candidate.macs.after),
            "% ": percent(candidate.macs.percent) if planned else "",
            "Sites": str(len(candidate.sites)) if planned else "",
            "Taken": "" if taken is None else share(taken),
            "Agrees": share(known.agreement) if known else "",
            "KL": divergence(known.divergence) if known else "",
            "Time": "" if timed is None else percent(100 * (timed.predicted_ratio - 1)),
            "Measured": "" if whole is None else percent(100 * (whole.ratio.median - 1)),
            "KL predicted": "" if predicted is None else divergence(predicted),
        }

    def _maps(self) -> Sheet:
        planned = [(i, candidate) for i, candidate in enumerate(self.candidates, 1) if candidate.plan]
        by_map = {i: _by_map(candidate.sites) for i, candidate in planned}
        maps = sorted({key for found in by_map.values() for key in found}, key=lambda key: (-key[0] * key[1], key))
        columns = Column("#"), *(Column(f"Map {size(key)}", is_text=True) for key in maps)
        rows = tuple((str(i), *(_splits(by_map[i].get(key, ())) for key in maps)) for i, _ in planned)
        return Sheet(
            "Sites by size of the output map", columns, rows, _legend(site for _, c in planned for site in c.sites)
        )

    def _sites(self, model: str, rows: dict[str, tuple[str, ...]]) -> Sheet:
        alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, row in rows.items():
            alike[row].append(name)
        lines = [(short_name, row) for row, names in alike.items() for short_name, _ in fold_names(names)]
        members = self.plans_of[model]
        columns = Column("Site", is_text=True), *(Column(f"#{i + 1}") for i in members)
        cells = tuple((name, *row) for name, row in sorted(lines, key=lambda line: natural(line[0])))
        all_sites = {site.name for i in members for site in self.candidates[i].sites}
        title = f"{model}: {len(rows)} of {counted(len(all_sites), 'site')} differ"
        return Sheet(title, columns, cells, _legend(site for i in members for site in self.candidates[i].sites))

    def data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "units": UNITS | {"divergence": "nats", "given_up": "share of the sites' output channels"},
            "candidates": [_candidate(candidate) for candidate in self.candidates],
            "differing": {
                model: {
                    name: {self.candidates[i].label: text for i, text in zip(self.plans_of[model], row, strict=True)}
                    for name, row in rows.items()
                }
                for model, rows in self.differing.items()
            },
            "impossible": [{"label": label, "reason": reason} for label, reason in self.impossible],
        }

    def pictures(self) -> Iterator[Markup]:
        """The network of each plan, where there are a few."""
        planned = [(i, candidate) for i, candidate in enumerate(self.candidates, 1) if candidate.plan]
        for i, candidate in planned if len(planned) <= _MOST_BESIDE else ():
            assert candidate.plan is not None  # planned
            picture = network_figure(marks(candidate.plan), f"The convolutions of {candidate.label}", f"network-{i}")
            yield tag("section", tag("h2", f"#{i} {candidate.label}"), picture)

    def rows(self) -> list[dict[str, Any]]:
        return [flat(candidate) for candidate in self.candidates]


def short(site: SitePlan) -> str:
    """What a site becomes, in a cell: the operator and its numbers, in the order of the operator's columns."""
    return f"{site.operator.upper()} {'/'.join(get_operator(site.operator).columns(site.split).values())}"


def _legend(sites: Iterable[SitePlan]) -> str:
    """What the numbers of `short` are, for each operator."""
    titles = {site.operator: tuple(get_operator(site.operator).columns(site.split)) for site in sites}
    meanings = (f"{name.upper()} {'/'.join(columns).lower()}" for name, columns in sorted(titles.items()))
    return f"Sites become {', or '.join(meanings)}; {STAYS} stays as it is."


def _by_map(sites: Iterable[SitePlan]) -> dict[Size, list[SitePlan]]:
    found: dict[Size, list[SitePlan]] = defaultdict(list)
    for site in sites:
        found[site.resolution].append(site)
    return found


def _splits(sites: Iterable[SitePlan]) -> str:
    """Sites of one map size in a cell: for each operator how many, and the range of each number of their splits."""
    by_operator: dict[str, list[dict[str, str]]] = defaultdict(list)
    for site in sites:
        by_operator[site.operator].append(get_operator(site.operator).columns(site.split))
    parts = []
    for name, rows in by_operator.items():
        ranges = (_range([row[title] for row in rows]) for title in rows[0])
        parts.append(f"{len(rows)} {name.upper()} {'/'.join(ranges)}")
    return "; ".join(parts) or STAYS


def _range(texts: list[str]) -> str:
    if all(text.isdecimal() for text in texts):
        return span(map(int, texts), lambda number: f"{number:g}")
    return texts[0] if len(set(texts)) == 1 else "..."


def _candidate(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON. A value that is unknown or does not apply is null."""
    plan = candidate.plan
    return {
        "label": candidate.label,
        "model": candidate.model,
        "input_size": candidate.input_size,
        "recipe": plan.recipe if plan else None,
        "budget": plan.budget.model_dump() if plan else None,
        "params": asdict(candidate.params) | {"percent": candidate.params.percent},
        "macs": asdict(candidate.macs) | {"percent": candidate.macs.percent},
        "given_up": candidate.given_up,
        "fidelity": candidate.fidelity.model_dump() if candidate.fidelity else None,
        "predicted_divergence": candidate.predicted_divergence,
        "latency": plan.latency.model_dump(exclude={"sites", "splits"}) if plan and plan.latency else None,
        "sites": [
            {
                "name": site.name,
                "operator": site.operator,
                "resolution": site.resolution,
                "split": asdict(site.split),
                "params": site.params_after,
                "macs": site.macs_after,
            }
            for site in candidate.sites
        ],
    }


def flat(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a row of a CSV file. A value that is unknown or does not apply is empty."""
    data = _candidate(candidate)
    counts = {f"{name}_{side}": data[name][side] for name in ("params", "macs") for side in ("before", "after")}
    known = candidate.fidelity
    timed = candidate.plan.latency if candidate.plan else None
    return {
        "label": cell(candidate.label),
        "model": cell(candidate.model),
        "recipe": cell(data["recipe"] or ""),
        "budget_params": (data["budget"] or {}).get("params"),
        "budget_macs": (data["budget"] or {}).get("macs"),
        "budget_latency": (data["budget"] or {}).get("latency"),
        **counts,
        "sites": len(candidate.sites),
        "given_up": candidate.given_up,
        "agreement": known.agreement if known else None,
        "divergence": known.divergence if known else None,
        "predicted_divergence": candidate.predicted_divergence,
        "predicted_time_ratio": timed.predicted_ratio if timed else None,
        "measured_time_ratio": timed.measured.ratio.median if timed and timed.measured else None,
    }
