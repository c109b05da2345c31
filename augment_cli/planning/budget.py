"""Which split for which site: an integer program over the sites' admissible choices (solver.py).

Equal sites form a group, and the unknowns are how many sites of a group take each choice:

    minimise    sum of count x distance from the written split
    subject to  the counts of a group add up to its sites, parameters and multiply-adds within their budgets

The distance is squared, so convex in each site: many sites bend a little rather than one a lot. A budget is a ceiling
and the optimum is proved, so that a looser budget never gives a split that is farther from the written one.

`keep`, where it is the only budget, also fills: what the nearest split leaves is spent, and where the written split
fits, no site loses value channels to that.

Where each site's loss is known (sensitivity.py), it takes the distance's place: it is taken to grow with the square of
the value channels, since the filters that cost least are given up first, and the mean value ratio is at least the
recipe's, so that attention moves to where it costs least and does not go away.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from augment_cli.analysis.site import ConvSite
from augment_cli.errors import AugmentError
from augment_cli.planning import cost
from augment_cli.planning.choices import distance, options
from augment_cli.planning.cost import Choice
from augment_cli.planning.recipe import UNITS, Budget, Sites, resolve_amount
from augment_cli.planning.solver import Minimum, Row, minimise

# How much `keep` may leave unused, as shares of the source's count, tried in turn.
_LEFTOVERS = (2e-4, 2e-3, 2e-2)

# Losses are measured on some hundred images: a share of them that no measurement resolves.
_LOSS_GAP = 5e-3

# Among equal losses the written splits are preferred: what a distance counts beside a loss.
_NEARNESS = 1e-2

Chosen = tuple[tuple[ConvSite, Choice], ...]


@dataclass(frozen=True)
class Counts:
    """Parameters and multiply-adds of a whole model."""

    params: int
    macs: int


@dataclass(frozen=True)
class Solution:
    """A choice for every site, and how the solver came to it.

    gap: the relative optimality gap that was proved. binding: for each budget that is not free, whether it keeps the
    splits from being nearer to the recipe's.
    """

    choices: Chosen
    solved: bool
    seconds: float = 0.0
    gap: float = 0.0
    binding: tuple[tuple[str, bool], ...] = ()

    def describe(self) -> str:
        if not self.solved:
            return "budget free: the recipe's settings as written"
        verdicts = (f"budget.{name} {'binds' if binds else 'does not bind'}" for name, binds in self.binding)
        return ", ".join((f"budget solved in {self.seconds:.2f} s", f"gap {self.gap:.2%}", *verdicts))


@dataclass(frozen=True)
class _Group:
    sites: tuple[ConvSite, ...]
    options: tuple[Choice, ...]
    distances: np.ndarray
    params: np.ndarray  # change against the source's site, per option
    macs: np.ndarray
    losses: np.ndarray
    ratios: np.ndarray  # change of the value ratio against the written split

    def subset(self, indices: np.ndarray) -> "_Group":
        """The same sites with some of the options."""
        arrays = (self.distances, self.params, self.macs, self.losses, self.ratios)
        return _Group(self.sites, tuple(self.options[i] for i in indices), *(array[indices] for array in arrays))


def solve(
    chosen: Chosen, settings: Sites, budget: Budget, source: Counts, losses: Mapping[str, float] | None = None
) -> Solution:
    """The choices nearest to the written ones, or of the least loss, that keep the model within its budget.

    Args:
        chosen: sites and the splits that the recipe's ratios ask for.
        source: counts of the model before.
        losses: of each site under its written split, by name; any unit.

    Raises:
        AugmentError: no admissible choices meet the budget; says what is attainable.
    """
    limits = {name: resolve_amount(getattr(budget, name), getattr(source, name)) for name in UNITS}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits and not losses:
        return Solution(chosen, solved=False)
    start = time.perf_counter()
    groups = _groups(chosen, settings, _with_floor(losses or {}))
    _check_attainable(groups, limits, budget, source, settings)
    ceilings = {name: limit - getattr(source, name) for name, limit in limits.items()}
    nearest = _Program(groups).nearest(ceilings)
    if nearest is None:
        raise AugmentError(_not_together(groups, ceilings, budget, source, settings))
    binding = tuple(zip(limits, nearest.binding, strict=False))
    if [getattr(budget, name) for name in limits] == ["keep"]:
        groups, nearest = _filled(groups, nearest, *ceilings.items(), *limits.values())
    return Solution(_assign(groups, nearest.counts, chosen), True, time.perf_counter() - start, nearest.gap, binding)


def _with_floor(losses: Mapping[str, float]) -> dict[str, float]:
    """A tenth of the mean loss on top of each: one measured as nothing on some hundred images is not for free."""
    floor = sum(losses.values()) / max(len(losses), 1) / 10
    return {name: loss + floor for name, loss in losses.items()}


def _groups(chosen: Chosen, settings: Sites, losses: Mapping[str, float] | None = None) -> list[_Group]:
    losses = losses or {}
    alike = defaultdict(list)
    for site, target in chosen:
        shape = site.in_channels, site.out_channels, site.groups, site.kernel_size, site.resolution
        alike[*shape, site.params, site.calls, losses.get(site.name), target].append(site)
    return [_group(tuple(sites), *key[-2:], settings) for key, sites in alike.items()]


def _group(sites: tuple[ConvSite, ...], loss: float | None, target: Choice, settings: Sites) -> _Group:
    site = sites[0]
    choices = options(site, settings, target)
    before, macs_before = cost.params(site, cost.PLAIN), cost.macs(site, cost.PLAIN)
    return _Group(
        sites,
        choices,
        np.array([distance(site, c, target) for c in choices]),
        np.array([cost.params(site, c) - before for c in choices]),
        np.array([cost.macs(site, c) - macs_before for c in choices]),
        np.array([(loss or 0) * (c.value_channels / max(target.value_channels, 1)) ** 2 for c in choices]),
        np.array([(c.value_channels - target.value_channels) / site.out_channels for c in choices]),
    )


class _Program:
    """The integer program of some groups; ceilings and floors are changes against the source."""

    def __init__(self, groups: list[_Group]) -> None:
        self.group_of = np.repeat(np.arange(len(groups)), [len(group.options) for group in groups])
        self.sizes = np.array([len(group.sites) for group in groups])
        self.changes = {name: np.concatenate([getattr(g, name) for g in groups]) for name in UNITS}
        self.objective, self.rows, self.gap = np.concatenate([g.distances for g in groups]), [], 0.0
        losses = np.concatenate([g.losses for g in groups])
        if losses.any():
            self.objective = losses / losses.max() + _NEARNESS * self.objective
            self.rows, self.gap = [Row(np.concatenate([g.ratios for g in groups]), least=-1e-9)], _LOSS_GAP

    def nearest(self, ceilings: Mapping[str, int], floors: Mapping[str, float] | None = None) -> Minimum | None:
        """The counts of least distance or loss within the ceilings; its `binding` begins with theirs."""
        floors = floors or {}
        rows = [Row(self.changes[name], floors.get(name, -np.inf), most) for name, most in ceilings.items()]
        return minimise(self.objective, self.group_of, self.sizes, [*rows, *self.rows], self.gap)

    def least(self, name: str, ceilings: Mapping[str, int]) -> int:
        """The least change of a count within the ceilings, each of which can be met alone."""
        rows = [Row(self.changes[other], most=most) for other, most in ceilings.items()]
        change = self.changes[name]
        found = minimise(change / np.abs(change).max(), self.group_of, self.sizes, [*rows, *self.rows])
        return int(change @ found.counts)


def _filled(
    groups: list[_Group], nearest: Minimum, ceiling: tuple[str, int], limit: int
) -> tuple[list[_Group], Minimum]:
    """What is left under the one ceiling spent, as far as can be; of the groups some options may be left out."""
    name, most = ceiling
    left = most - int(_Program(groups).changes[name] @ nearest.counts)
    fuller = _without_fewer_values(groups, nearest.counts)
    for leftover in _LEFTOVERS:
        if left <= leftover * limit:
            break
        found = _Program(fuller).nearest({name: most}, {name: most - leftover * limit})
        if found is not None:
            return fuller, found
    return groups, nearest


def _without_fewer_values(groups: list[_Group], counts: np.ndarray) -> list[_Group]:
    """Without the options that have fewer value channels than the written one, and than any that is taken."""
    kept, offset = [], 0
    for group in groups:
        values = np.array([option.value_channels for option in group.options])
        taken = counts[offset : offset + len(values)] > 0
        offset += len(values)
        kept.append(group.subset(np.flatnonzero(values >= values[taken | (group.distances == 0)].min())))
    return kept


def _assign(groups: list[_Group], counts: np.ndarray, chosen: Chosen) -> Chosen:
    """Choices to the sites of each group: the most attention to the last ones, whose maps mean most."""
    by_name: dict[str, Choice] = {}
    offset = 0
    for group in groups:
        taken = counts[offset : offset + len(group.options)]
        offset += len(group.options)
        choices = [choice for choice, count in zip(group.options, taken, strict=True) for _ in range(count)]
        choices.sort(key=lambda c: (c.value_channels, c.key_channels, -c.reduction))
        by_name |= {site.name: choice for site, choice in zip(group.sites, choices, strict=True)}
    return tuple((site, by_name[site.name]) for site, _ in chosen)


def attainable(chosen: Chosen, settings: Sites, source: Counts) -> dict[str, tuple[int, int]]:
    """The least and the most that the whole model can have of "params" and of "macs", each on its own."""
    return _attainable(_groups(chosen, settings), source)


def _attainable(groups: list[_Group], source: Counts) -> dict[str, tuple[int, int]]:
    def total(name: str, extreme: Callable[[np.ndarray], int]) -> int:
        return getattr(source, name) + sum(int(extreme(getattr(g, name))) * len(g.sites) for g in groups)

    return {name: (total(name, np.min), total(name, np.max)) for name in UNITS}


def _check_attainable(groups, limits: dict[str, int], budget: Budget, source: Counts, settings: Sites) -> None:
    ranges = _attainable(groups, source)
    for name, limit in limits.items():
        least, most = ranges[name]
        if least > limit:
            raise AugmentError(
                f"budget.{name}={getattr(budget, name)} asks for at most {limit:,} {UNITS[name]}, and the chosen sites "
                f"can have {least:,} to {most:,} ({_percent(least, source, name)} to {_percent(most, source, name)} of "
                f"the source's {getattr(source, name):,}). {_help(settings)}"
            )


def _percent(count: int, source: Counts, name: str) -> str:
    return f"{count / getattr(source, name) - 1:+.2%}"


def _not_together(groups, ceilings: dict[str, int], budget: Budget, source: Counts, settings: Sites) -> str:
    """Why two budgets that can be met alone cannot be met together: with each one, the least that the other can be."""
    asked, attained, program = [], [], _Program(groups)
    for name, other in (("params", "macs"), ("macs", "params")):
        most = getattr(source, name) + ceilings[name]
        least = getattr(source, other) + program.least(other, {name: ceilings[name]})
        asked.append(f"budget.{name}={getattr(budget, name)} (at most {most:,} {UNITS[name]})")
        attained.append(
            f"within budget.{name} the least is {least:,} {UNITS[other]} ({_percent(least, source, other)})"
        )
    return f"{' and '.join(asked)} cannot be met together: {', '.join(attained)}. {_help(settings)}"


def _help(settings: Sites) -> str:
    if settings.variant == "aw":
        return (
            "AW only adds parameters; a larger sites.reduction adds fewer, and variant aa+aw (recipe aa-aw) saves what "
            "AW adds"
        )
    return "A larger sites.value_ratio, a smaller sites.key_ratio or sites.min_key_channels, or more sites would help"
