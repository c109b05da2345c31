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
from typing import Any

import numpy as np

from augment_cli.analysis.site import ConvSite, filter_macs
from augment_cli.errors import BudgetError
from augment_cli.operators import Operator, Split, get_operator
from augment_cli.planning.recipe import UNITS, Recipe, resolve_amount
from augment_cli.planning.solver import Minimum, Row, minimise

# How much `keep` may leave unused, as shares of the source's count, tried in turn.
_LEFTOVERS = (2e-4, 2e-3, 2e-2)

# Losses are measured on some hundred images: a share of them that no measurement resolves.
_LOSS_GAP = 5e-3

# Among equal losses the written splits are preferred: what a distance counts beside a loss.
_NEARNESS = 1e-2

Chosen = tuple[tuple[ConvSite, Split], ...]


@dataclass(frozen=True)
class Counts:
    """Parameters and multiply-adds of a whole model."""

    params: int
    macs: int


@dataclass(frozen=True)
class Solution:
    """A split for every site, and how the solver came to it.

    gap: the relative optimality gap that was proved. binding: for each budget that is not free, whether it keeps the
    splits from being nearer to the recipe's.
    """

    splits: Chosen
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
    splits: tuple[Split, ...]
    distances: np.ndarray
    params: np.ndarray  # change against the source's site, per split
    macs: np.ndarray
    losses: np.ndarray
    given_up: np.ndarray  # output channels
    ratios: np.ndarray  # change of the share of given-up channels against the written split

    def subset(self, indices: np.ndarray) -> "_Group":
        """The same sites with some of the splits."""
        arrays = (self.distances, self.params, self.macs, self.losses, self.given_up, self.ratios)
        return _Group(self.sites, tuple(self.splits[i] for i in indices), *(array[indices] for array in arrays))


def solve(chosen: Chosen, recipe: Recipe, source: Counts, losses: Mapping[str, float] | None = None) -> Solution:
    """The splits nearest to the written ones, or of the least loss, that keep the model within the recipe's budget.

    Args:
        chosen: sites and the splits that the recipe asks for.
        source: counts of the model before.
        losses: of each site under its written split, by name; any unit.

    Raises:
        AugmentError: no admissible splits meet the budget; says what is attainable.
    """
    budget = recipe.budget
    asked = {name: resolve_amount(getattr(budget, name), getattr(source, name)) for name in UNITS}
    limits = {name: limit for name, limit in asked.items() if limit is not None}
    if not limits and not losses:
        return Solution(chosen, solved=False)
    start = time.perf_counter()
    groups = _groups(chosen, recipe, _with_floor(losses or {}))
    _check_attainable(groups, limits, source, recipe)
    ceilings = {name: limit - getattr(source, name) for name, limit in limits.items()}
    nearest = _Program(groups).nearest(ceilings)
    if nearest is None:
        raise BudgetError(_not_together(groups, ceilings, source, recipe))
    binding = tuple(zip(limits, nearest.binding, strict=False))
    if [getattr(budget, name) for name in limits] == ["keep"]:
        ((name, limit),) = limits.items()
        groups, nearest = _filled(groups, nearest, (name, ceilings[name]), limit)
    splits = _assign(groups, nearest.counts, chosen, get_operator(recipe.operator))
    return Solution(splits, True, time.perf_counter() - start, nearest.gap, binding)


def _with_floor(losses: Mapping[str, float]) -> dict[str, float]:
    """Add a tenth of the mean loss to every site: a measured loss of zero on a few hundred images is noise."""
    floor = sum(losses.values()) / max(len(losses), 1) / 10
    return {name: loss + floor for name, loss in losses.items()}


def _groups(chosen: Chosen, recipe: Recipe, losses: Mapping[str, float] | None = None) -> list[_Group]:
    losses = losses or {}
    alike: dict[Any, list[ConvSite]] = defaultdict(list)
    for site, written in chosen:
        shape = site.in_channels, site.out_channels, site.groups, site.kernel_size, site.resolution
        alike[shape, site.params, site.calls, losses.get(site.name), written].append(site)
    return [_group(tuple(sites), loss, written, recipe) for (*_, loss, written), sites in alike.items()]


def _group(sites: tuple[ConvSite, ...], loss: float | None, written: Split, recipe: Recipe) -> _Group:
    site, operator = sites[0], get_operator(recipe.operator)
    splits = operator.splits(site, recipe, written)
    macs_before = filter_macs(site, site.out_channels)
    given_up, given_up_as_written = np.array([operator.given_up(s) for s in splits]), operator.given_up(written)
    return _Group(
        sites,
        splits,
        np.array([operator.distance(site, s, written) for s in splits]),
        np.array([operator.params(site, s) - site.params for s in splits]),
        np.array([operator.macs(site, s) - macs_before for s in splits]),
        (loss or 0) * (given_up / max(given_up_as_written, 1)) ** 2,
        given_up,
        (given_up - given_up_as_written) / site.out_channels,
    )


class _Program:
    """The integer program of some groups; ceilings and floors are changes against the source."""

    def __init__(self, groups: list[_Group]) -> None:
        self.group_of = np.repeat(np.arange(len(groups)), [len(group.splits) for group in groups])
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
        if found is None:
            raise RuntimeError(f"no plan meets {dict(ceilings)}, which can be met alone")
        return int(change @ found.counts)


def _filled(
    groups: list[_Group], nearest: Minimum, ceiling: tuple[str, int], limit: int
) -> tuple[list[_Group], Minimum]:
    """Spend what is left under the one ceiling, as far as the splits allow.

    Returns the groups, without the splits that were ruled out, and the counts.
    """
    name, most = ceiling
    left = most - int(_Program(groups).changes[name] @ nearest.counts)
    fuller = _without_fewer_given_up(groups, nearest.counts)
    for leftover in _LEFTOVERS:
        if left <= leftover * limit:
            break
        found = _Program(fuller).nearest({name: most}, {name: most - leftover * limit})
        if found is not None:
            return fuller, found
    return groups, nearest


def _without_fewer_given_up(groups: list[_Group], counts: np.ndarray) -> list[_Group]:
    """Without the splits that give up fewer channels than the written one, and than any that is taken."""
    kept, offset = [], 0
    for group in groups:
        taken = counts[offset : offset + len(group.splits)] > 0
        offset += len(group.splits)
        least = group.given_up[taken | (group.distances == 0)].min()
        kept.append(group.subset(np.flatnonzero(group.given_up >= least)))
    return kept


def _assign(groups: list[_Group], counts: np.ndarray, chosen: Chosen, operator: Operator) -> Chosen:
    """Splits to the sites of each group: the largest change to the last ones, whose maps mean most."""
    by_name: dict[str, Split] = {}
    offset = 0
    for group in groups:
        taken = counts[offset : offset + len(group.splits)]
        offset += len(group.splits)
        splits = [split for split, count in zip(group.splits, taken, strict=True) for _ in range(count)]
        splits.sort(key=operator.rank)
        by_name |= {site.name: split for site, split in zip(group.sites, splits, strict=True)}
    return tuple((site, by_name[site.name]) for site, _ in chosen)


def attainable(chosen: Chosen, recipe: Recipe, source: Counts) -> dict[str, tuple[int, int]]:
    """The least and the most that the whole model can have of "params" and of "macs", each on its own."""
    return _attainable(_groups(chosen, recipe), source)


def _attainable(groups: list[_Group], source: Counts) -> dict[str, tuple[int, int]]:
    def total(name: str, extreme: Callable[[np.ndarray], int]) -> int:
        return getattr(source, name) + sum(int(extreme(getattr(g, name))) * len(g.sites) for g in groups)

    return {name: (total(name, np.min), total(name, np.max)) for name in UNITS}


def _check_attainable(groups: list[_Group], limits: dict[str, int], source: Counts, recipe: Recipe) -> None:
    ranges, advice = _attainable(groups, source), get_operator(recipe.operator).advice
    for name, limit in limits.items():
        least, most = ranges[name]
        if least > limit:
            asked, before = getattr(recipe.budget, name), getattr(source, name)
            raise BudgetError(
                f"budget.{name}={asked} asks for at most {limit:,} {UNITS[name]}, and the chosen sites can have "
                f"{least:,} to {most:,} ({_percent(least, source, name)} to {_percent(most, source, name)} of the "
                f"source's {before:,}). {advice}"
            )


def _percent(count: int, source: Counts, name: str) -> str:
    return f"{count / getattr(source, name) - 1:+.2%}"


def _not_together(groups: list[_Group], ceilings: dict[str, int], source: Counts, recipe: Recipe) -> str:
    """Why two budgets that can be met alone cannot be met together: with each one, the least that the other can be."""
    asked, attained, program = [], [], _Program(groups)
    for name, other in (("params", "macs"), ("macs", "params")):
        most = getattr(source, name) + ceilings[name]
        least = getattr(source, other) + program.least(other, {name: ceilings[name]})
        asked.append(f"budget.{name}={getattr(recipe.budget, name)} (at most {most:,} {UNITS[name]})")
        attained.append(
            f"within budget.{name} the least is {least:,} {UNITS[other]} ({_percent(least, source, other)})"
        )
    advice = get_operator(recipe.operator).advice
    return f"{' and '.join(asked)} cannot be met together: {', '.join(attained)}. {advice}"
