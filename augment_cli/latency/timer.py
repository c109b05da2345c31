"""Plans within a budget of latency, and the latency of plans: measured where it is not known yet.

A few splits of each site are measured within the model, and the others interpolated. The splits that the budget then
chooses are measured too, and it chooses again, until it stays with what it has. At last the plan's model is run as a
whole beside its source: two numbers that know nothing of each other.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from augment_cli.analysis.cache import look
from augment_cli.analysis.facts import Analysis, Source
from augment_cli.analysis.site import ConvSite
from augment_cli.analysis.source import create
from augment_cli.errors import InputError
from augment_cli.latency.bench import FEWEST_ROUNDS, Bench, ModelBench, Progress
from augment_cli.latency.machine import describe_machine, resolved
from augment_cli.latency.table import read_table, table_file, write_table
from augment_cli.operators import get_operator
from augment_cli.planning.budget import Solution
from augment_cli.planning.frontier import Point, Unit, frontier
from augment_cli.planning.latency import LatencySettings, Times, splits_digest, spread
from augment_cli.planning.plan import Plan, Sensitivity, SitePlan, make_plan, site_plan, with_latency
from augment_cli.planning.reading import fit_plan
from augment_cli.planning.recipe import Recipe
from augment_cli.planning.selection import select

# Splits of a site that are measured before any is chosen, fewer of a model whose passes are slow; and how often a
# choice is measured and made again.
_PROBES, _FEWEST_PROBES = 8, 3
_TURNS = 5

# The time to measure in, by what it goes to: the first measurement of sites, each turn, and models as wholes.
_SHARES = {"first": 0.4, "turn": 0.08, "wholes": 0.2}

T = TypeVar("T")


class Timer:
    """Measures a model on this machine as far as it is asked, and remembers what it found.

    Args:
        settings: how; threads may be open.
        make: makes the source with any weights; called if there is something to measure.
        cached: keep what is found in the user's cache folder, and use what is there.
        bench: what runs the models, if not this machine's torch.

    Raises:
        AugmentError: the device is not there.
    """

    def __init__(
        self,
        source: Source,
        analysis: Analysis,
        settings: LatencySettings,
        make: Callable[[], nn.Module],
        progress: Progress | None = None,
        cached: bool = True,
        bench: Bench | None = None,
    ) -> None:
        self.settings, self.machine = resolved(settings), describe_machine(settings.device)
        self.sites: Mapping[str, ConvSite] = {site.name: site for site in analysis.sites}
        self.source, self.analysis, self._make, self._progress, self._bench = source, analysis, make, progress, bench
        self._file = table_file(source, self.settings, self.machine) if cached else None
        self.table = read_table(self._file)
        self.spent = 0.0  # seconds

    @property
    def overrun(self) -> str | None:
        """Why measuring took longer than it was asked to; None where it did not, by more than a fifth."""
        if self.spent <= 1.2 * self.settings.seconds:
            return None
        return (
            f"measuring took {self.spent:.0f} s, and latency.seconds is {self.settings.seconds:g}: every model is run "
            f"{FEWEST_ROUNDS + 1} times at least, at {(self.table.source or 0) / 1e9:.2g} s a pass; fewer images in "
            f"latency.batch take less"
        )

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = ModelBench(self._make(), self.analysis.input_size, self.settings, self._progress)
        return self._bench

    def times(self, only_measured: bool = False) -> Times:
        return self.table.times(self.settings, self.machine, self.sites.values(), only_measured)

    def probe(self, recipe: Recipe) -> None:
        """Measure a few splits of each site that a recipe chooses."""
        variants = self._probes(recipe, _PROBES)
        if not all(map(self._known, variants)):
            self._time_unknown(variants[: self._affordable()])

    def _probes(self, recipe: Recipe, number: int) -> list[tuple[SitePlan, ...]]:
        """Variants of the model that hold, one after the other, splits of each site that are far from each other."""
        operator, variants = get_operator(recipe.operator), [dict[str, SitePlan]() for _ in range(number)]
        for site, written in select(self.analysis.sites, recipe).chosen:
            splits = spread(site, operator, operator.splits(site, recipe, written), written, number)
            for i, variant in enumerate(variants):
                variant[site.name] = site_plan(site, splits[i % len(splits)], recipe.operator)
        return [tuple(variant.values()) for variant in variants]

    def _affordable(self) -> int:
        """How many variants can be run often enough beside the source in the time for the first measurement."""
        one = (FEWEST_ROUNDS + 1) * self._clocked(self.bench.pass_seconds)
        return max(_FEWEST_PROBES, min(_PROBES, int(_SHARES["first"] * self.settings.seconds / max(one, 1e-9)) - 1))

    def _clocked(self, run: Callable[[], T]) -> T:
        """Run something on the bench, whose time counts."""
        start = time.monotonic()
        try:
            return run()
        finally:
            self.spent += time.monotonic() - start

    def _time_unknown(self, variants: Iterable[tuple[SitePlan, ...]]) -> None:
        missing = [variant for variant in dict.fromkeys(variants) if not self._known(variant)]
        if missing:
            self._time(missing, "first")

    def _time(self, variants: Sequence[tuple[SitePlan, ...]], share: str) -> None:
        named = {planned.name: self.sites[planned.name] for variant in variants for planned in variant}
        seconds, bench = _SHARES[share] * self.settings.seconds, self.bench
        rounds = self._clocked(lambda: bench.time_sites(list(named), variants, seconds))
        self.table.add_sites(named, variants, rounds)
        write_table(self._file, self.table)

    def _known(self, sites: Iterable[SitePlan]) -> bool:
        return all(self.table.has(self.sites[planned.name], planned) for planned in sites)

    def measured(self, plans: Sequence[Plan]) -> list[Plan]:
        """Plans with what their sites predict and what their models were measured to take."""
        self._time_unknown(plan.sites for plan in plans)
        wholes = {splits_digest(plan.sites): plan.sites for plan in plans}
        missing = [sites for digest, sites in wholes.items() if digest not in self.table.wholes]
        if missing:
            seconds, bench = _SHARES["wholes"] * self.settings.seconds, self.bench
            rounds = self._clocked(lambda: bench.time_models(missing, seconds))
            self.table.add_wholes(missing, rounds)
            write_table(self._file, self.table)
        times = self.times()
        return [self._with_latency(plan, times) for plan in plans]

    def _with_latency(self, plan: Plan, times: Times) -> Plan:
        latency = with_latency(plan, self.analysis, times).latency
        assert latency is not None
        whole = self.table.wholes[splits_digest(plan.sites)]
        return plan.model_copy(update={"latency": latency.model_copy(update={"measured": whole})})

    def settle(
        self, question: Any, recipe: Recipe, choose: Callable[[Times], T], plans_of: Callable[[T], Sequence[Plan]]
    ) -> T:
        """Choose by the times, measure what was chosen, and choose again, until that is chosen again.

        What is chosen is measured anew even where it is known: of many times with errors, a budget chooses those that
        happened to be short.

        Args:
            question: what is asked of the recipe, besides its values: it gets the same answer again from the cache.
            choose: makes plans by the times; plans_of: says which they are.

        Raises:
            AugmentError: from `choose`, such as a budget that cannot be met.
        """
        asked = hashlib.sha256(repr((recipe.digest(), question)).encode()).hexdigest()
        if asked not in self.table.settled:
            end = time.monotonic() + (1 - _SHARES["wholes"]) * self.settings.seconds
            self.probe(recipe)
            done: set[str] = set()
            for turn in range(_TURNS):
                if turn and time.monotonic() > end:
                    break
                plans = plans_of(choose(self.times()))
                new = {splits_digest(plan.sites): plan.sites for plan in plans}
                if new.keys() <= done:
                    break
                self._time([sites for digest, sites in new.items() if digest not in done], "turn")
                done |= new.keys()
            self.table.settled.append(asked)
            write_table(self._file, self.table)
        return choose(self.times(only_measured=True))


def measure_latency(
    plan: Plan,
    settings: LatencySettings,
    base: str | None = None,
    progress: Progress | None = None,
    cached: bool = True,
) -> Plan:
    """A plan with its latency beside its source, measured on this machine.

    Args:
        base: `package.module:function`, which makes the source where timm does not know it.

    Raises:
        AugmentError: the device is not there, or the source cannot be made or is not the plan's.
    """
    if plan.base == "other" and base is None:
        raise InputError(f"{plan.model} is not a model of timm: give `base='package.module:function'`, which makes it")
    name = plan.model if plan.base == "timm" else str(base)
    source, analysis = look(name, dict(plan.model_args), plan.input_size[1:], cached)
    timer = Timer(source, analysis, settings, partial(create, source), progress, cached)
    return timer.measured([fit_plan(plan, analysis, f"the plan of {plan.model}")])[0]


def plan_within(
    source: Source,
    analysis: Analysis,
    recipe: Recipe,
    timer: Timer,
    sensitivity: dict[str, Sensitivity] | None = None,
) -> tuple[Plan, Solution]:
    """The plan of a recipe with its latency, measured on this machine.

    Raises:
        AugmentError: as `make_plan`.
    """

    def choose(times: Times | None = None) -> tuple[Plan, Solution]:
        return make_plan(source.name, analysis, recipe, source.args, sensitivity, source.base, times)

    free = recipe.budget.latency == "free"
    plan, solution = choose() if free else timer.settle(sensitivity, recipe, choose, lambda found: [found[0]])
    return timer.measured([plan])[0], solution


def frontier_within(
    source: Source,
    analysis: Analysis,
    recipe: Recipe,
    unit: Unit,
    points: int,
    timer: Timer,
    sensitivity: Mapping[str, Sensitivity] | None = None,
) -> list[Point]:
    """`planning.frontier.frontier` of plans with their latency, measured on this machine.

    Raises:
        AugmentError: as `frontier`.
    """

    def choose(times: Times) -> list[Point]:
        return frontier(source, analysis, recipe, unit, points, sensitivity, times)

    found = timer.settle((unit, points, sensitivity), recipe, choose, lambda points: [point.plan for point in points])
    plans = timer.measured([point.plan for point in found])
    return [Point(plan, point.loss) for plan, point in zip(plans, found, strict=True)]
