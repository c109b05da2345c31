"""Which split for which site: an integer program over the sites' admissible choices (solver.py).

Equal sites form a group, and the unknowns are how many sites of a group take each choice:

    minimise    sum of count x distance from the written split
    subject to  the counts of a group add up to its sites; parameters, multiply-adds and time within their budgets

The distance is squared, so convex in each site: many sites bend a little rather than one a lot. A budget is a ceiling
and the optimum is proved, so that a looser budget never gives a split that is farther from the written one.

`keep`, where it is the only budget, also fills: what the nearest split leaves is spent, and where the written split
fits, no site loses value channels to that.

Where each site's loss is known (sensitivity.py), it takes the distance's place: it is taken to grow with the square of
the value channels, since the filters that cost least are given up first, and the mean value ratio is at least the
recipe's, so that attention moves to where it costs least and does not go away.

A budget for latency may also leave sites as they are, where the operator says how far that is from its split: attention
costs time on every site, however little of it there is.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from augment_cli.analysis.site import ConvSite, filter_macs
from augment_cli.errors import BudgetError
from augment_cli.operators import Operator, Split, get_operator
from augment_cli.planning.latency import Time, Times
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
    """Parameters and multiply-adds of a whole model, and nanoseconds where its latency was measured."""

    params: int
    macs: int
    latency: int = 0


@dataclass(frozen=True)
class Solution:
    """A split for every site, and how the solver came to it.

    gap: the relative optimality gap that was proved. binding: for each budget that is not free, whether it keeps the
    splits from being nearer to the recipe's. left: sites that stay as they are, for a budget of latency.
    """

    splits: Chosen
    solved: bool
    seconds: float = 0.0
    gap: float = 0.0
    binding: tuple[tuple[str, bool], ...] = ()
    left: tuple[str, ...] = ()

    def describe(self) -> str:
        if not self.solved:
            return "budget free: the recipe's settings as written"
        verdicts = [f"budget.{name} {'binds' if binds else 'does not bind'}" for name, binds in self.binding]
        verdicts += [f"sites left as they are: {len(self.left)}"] * bool(self.left)
        return ", ".join((f"budget solved in {self.seconds:.2f} s", f"gap {self.gap:.2%}", *verdicts))


@dataclass(frozen=True)
class _Group:
    sites: tuple[ConvSite, ...]
    splits: tuple[Split | None, ...]  # None: the sites stay as they are
    distances: np.ndarray
    params: np.ndarray  # change against the source's site, per split
    macs: np.ndarray
    latency: np.ndarray
    losses: np.ndarray
    given_up: np.ndarray  # output channels
    ratios: np.ndarray  # change of the share of given-up channels against the written split

    def subset(self, indices: np.ndarray) -> "_Group":
        """The same sites with some of the splits."""
        arrays = (self.distances, self.params, self.macs, self.latency, self.losses, self.given_up, self.ratios)
        return _Group(self.sites, tuple(self.splits[i] for i in indices), *(array[indices] for array in arrays))


def solve(
    chosen: Chosen,
    recipe: Recipe,
    source: Counts,
    losses: Mapping[str, float] | None = None,
    times: Times | None = None,
) -> Solution:
    """The splits nearest to the written ones, or of the least loss, that keep the model within the recipe's budget.

    Args:
        chosen: sites and the splits that the recipe asks for.
        source: counts of the model before.
        losses: of each site under its written split, by name; any unit.
        times: of the model and its sites, for a budget of latency.

    Raises:
        AugmentError: no admissible splits meet the budget; says what is attainable. Or no times for one of latency.
    """
    budget = recipe.budget
    if budget.latency != "free" and times is None:
        raise BudgetError(
            f"budget.latency={budget.latency} needs the times of the model's sites, which `augment plan` and "
            f"`augment convert` measure on the machine that they run on; `budget.latency=free` does without"
        )
    source = replace(source, latency=times.source if times else 0)
    asked = {name: resolve_amount(getattr(budget, name), getattr(source, name)) for name in UNITS}
    limits = {name: limit for name, limit in asked.items() if limit is not None}
    if not limits and not losses:
        return Solution(chosen, solved=False)
    start = time.perf_counter()
    groups = _groups(chosen, recipe, _with_floor(losses or {}), times if "latency" in limits else None)
    _check_attainable(groups, limits, source, recipe)
    ceilings = {name: limit - getattr(source, name) for name, limit in limits.items()}
    nearest = _Program(groups).nearest(ceilings)
    if nearest is None:
        raise BudgetError(_not_together(groups, ceilings, source, recipe))
    binding = tuple(zip(limits, nearest.binding, strict=False))
    if [getattr(budget, name) for name in limits] == ["keep"] and "latency" not in limits:
        ((name, limit),) = limits.items()
        groups, nearest = _filled(groups, nearest, (name, ceilings[name]), limit)
    splits = _assign(groups, nearest.counts, chosen, get_operator(recipe.operator))
    taken = {site.name for site, _ in splits}
    left = tuple(site.name for site, _ in chosen if site.name not in taken)
    return Solution(splits, True, time.perf_counter() - start, nearest.gap, binding, left)


def _with_floor(losses: Mapping[str, float]) -> dict[str, float]:
    """Add a tenth of the mean loss to every site: a measured loss of zero on a few hundred images is noise."""
    floor = sum(losses.values()) / max(len(losses), 1) / 10
    return {name: loss + floor for name, loss in losses.items()}


def _groups(
    chosen: Chosen, recipe: Recipe, losses: Mapping[str, float] | None = None, times: Times | None = None
) -> list[_Group]:
    losses = losses or {}
    alike: dict[Any, list[ConvSite]] = defaultdict(list)
    for site, written in chosen:
        shape = site.in_channels, site.out_channels, site.groups, site.kernel_size, site.resolution
        timed = times.sites[site.name] if times else None
        alike[shape, site.params, site.calls, timed, losses.get(site.name), written].append(site)
    return [_group(tuple(sites), loss, written, recipe, times) for (*_, loss, written), sites in alike.items()]


def _group(
    sites: tuple[ConvSite, ...], loss: float | None, written: Split, recipe: Recipe, times: Times | None
) -> _Group:
    site, operator = sites[0], get_operator(recipe.operator)
    splits = operator.splits(site, recipe, written)
    if times:
        splits = times.admitted(site, operator, splits)
    macs_before = filter_macs(site, site.out_channels)
    given_up, given_up_as_written = np.array([operator.given_up(s) for s in splits]), operator.given_up(written)
    group = _Group(
        sites,
        splits,
        np.array([operator.distance(site, s, written) for s in splits]),
        np.array([operator.params(site, s) - site.params for s in splits]),
        np.array([operator.macs(site, s) - macs_before for s in splits]),
        _changes(times.before(site), times.after(site, operator, splits)) if times else np.zeros(len(splits), int),
        (loss or 0) * (given_up / max(given_up_as_written, 1)) ** 2,
        given_up,
        (given_up - given_up_as_written) / site.out_channels,
    )
    far = operator.distance_left(site, written) if times else None
    return group if far is None else _or_left(group, far, -given_up_as_written / site.out_channels)


def _changes(before: Time, after: Sequence[Time]) -> np.ndarray:
    return np.array([round(time.value - before.value) for time in after])


def _or_left(group: _Group, distance: float, ratio: float) -> _Group:
    """A group whose sites may stay as they are too."""
    arrays = (
        (group.distances, distance),
        *((getattr(group, name), 0) for name in UNITS),
        *((group.losses, 0.0), (group.given_up, 0), (group.ratios, ratio)),
    )
    return _Group(group.sites, (*group.splits, None), *(np.append(array, end) for array, end in arrays))


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
        replaced = np.array([split is not None for group in groups for split in group.splits], int)
        if not replaced.all():
            self.rows.append(Row(replaced, least=1))

    def nearest(self, ceilings: Mapping[str, int], floors: Mapping[str, float] | None = None) -> Minimum | None:
        """The counts of least distance or loss within the ceilings; its `binding` begins with theirs."""
        floors = floors or {}
        rows = [Row(self.changes[name], floors.get(name, -np.inf), most) for name, most in ceilings.items()]
        return minimise(self.objective, self.group_of, self.sizes, [*rows, *self.rows], self.gap)

    def least(self, name: str, ceilings: Mapping[str, int]) -> int | None:
        """The least change of a count within the ceilings; None where nothing meets them."""
        rows = [Row(self.changes[other], most=most) for other, most in ceilings.items()]
        change = self.changes[name]
        found = minimise(change / np.abs(change).max(), self.group_of, self.sizes, [*rows, *self.rows])
        return None if found is None else int(change @ found.counts)


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
        counted = zip(group.splits, taken, strict=True)
        splits = [split for split, count in counted if split is not None for _ in range(count)]
        splits.sort(key=operator.rank)
        last = group.sites[len(group.sites) - len(splits) :]  # the first ones stay as they are
        by_name |= {site.name: split for site, split in zip(last, splits, strict=True)}
    return tuple((site, by_name[site.name]) for site, _ in chosen if site.name in by_name)


def attainable(
    chosen: Chosen, recipe: Recipe, source: Counts, times: Times | None = None
) -> dict[str, tuple[int, int]]:
    """The least and the most that the whole model can have of "params", "macs" and "latency", each on its own."""
    return _attainable(_groups(chosen, recipe, times=times), replace(source, latency=times.source if times else 0))


def _attainable(groups: list[_Group], source: Counts) -> dict[str, tuple[int, int]]:
    program = _Program([replace(group, losses=0 * group.losses) for group in groups])

    def least(name: str) -> int:
        if all(None not in group.splits for group in groups):
            return total(name, np.min)
        found = program.least(name, {})
        assert found is not None  # one site replaced, in whatever way
        return getattr(source, name) + found

    def total(name: str, extreme: Callable[[np.ndarray], int]) -> int:
        return getattr(source, name) + sum(int(extreme(getattr(g, name))) * len(g.sites) for g in groups)

    return {name: (least(name), total(name, np.max)) for name in UNITS}


def _check_attainable(groups: list[_Group], limits: dict[str, int], source: Counts, recipe: Recipe) -> None:
    ranges = _attainable(groups, source)
    for name, limit in limits.items():
        least, most = ranges[name]
        if least > limit:
            asked, before = getattr(recipe.budget, name), getattr(source, name)
            raise BudgetError(
                f"budget.{name}={asked} asks for at most {show(name, limit)}, and the chosen sites can have "
                f"{number(name, least)} to {number(name, most)} ({_percent(least, source, name)} to "
                f"{_percent(most, source, name)} of the source's {number(name, before)}). {_advice(recipe, name)}"
            )


def show(name: str, amount: int) -> str:
    """A count of a budget with its unit.

    >>> show("macs", 1234567), show("latency", 1234567)
    ('1,234,567 multiply-adds', '1.235 ms')
    """
    return number(name, amount) if name == "latency" else f"{number(name, amount)} {UNITS[name]}"


def number(name: str, amount: int) -> str:
    """A count of a budget; a time with its unit."""
    return f"{amount / 1e6:,.3f} ms" if name == "latency" else f"{amount:,}"


def _advice(recipe: Recipe, name: str) -> str:
    if name == "latency":
        return "A smaller select.largest_map, or other sites by select.stages or select.names, would help"
    return get_operator(recipe.operator).advice


def _percent(count: int, source: Counts, name: str) -> str:
    return f"{count / getattr(source, name) - 1:+.2%}"


def _not_together(groups: list[_Group], ceilings: dict[str, int], source: Counts, recipe: Recipe) -> str:
    """Why budgets that can be met alone cannot be met together: the least that each can be within the others."""
    asked = [
        f"budget.{name}={getattr(recipe.budget, name)} (at most {show(name, getattr(source, name) + most)})"
        for name, most in ceilings.items()
    ]
    attained, program = [], _Program(groups)
    for name in reversed(ceilings):
        others = {other: most for other, most in ceilings.items() if other != name}
        within = " and ".join(f"budget.{other}" for other in others) or "the recipe's mean ratio"
        change = program.least(name, others)
        if change is not None:
            least = getattr(source, name) + change
            attained.append(f"within {within} the least is {show(name, least)} ({_percent(least, source, name)})")
    advice = _advice(recipe, "latency" if "latency" in ceilings else "params")
    reasons = f": {', '.join(attained)}" if attained else ", nor all but one of them"
    return f"{' and '.join(asked)} cannot be met together{reasons}. {advice}"
