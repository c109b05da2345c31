"""Which split for which site: an integer program over the sites' admissible choices, solved by scipy's HiGHS.

Equal sites form a group, and the unknowns are how many sites of a group take each choice:

    minimise    sum of count x distance from the written split, less a hair for every value channel
    subject to  the counts of a group add up to its sites, parameters and multiply-adds within their budgets

The distance is squared, so convex in each site: many sites bend a little rather than one a lot.

Where each site's loss is known (sensitivity.py), it takes the distance's place: it is taken to grow with the square of
the value channels, since the filters that cost least are given up first, and the mean value ratio is at least the
recipe's, so that attention moves to where it costs least and does not go away.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from augment_cli import cost
from augment_cli.choices import distance, options
from augment_cli.cost import Choice
from augment_cli.errors import AugmentError
from augment_cli.recipe import Budget, Sites, resolve_amount
from augment_cli.site import ConvSite

# How much of a budget may stay unused, as shares of the source's count, tried in turn: a mix of splits that leaves
# little is preferred to one that is nearer to the recipe.
_LEFTOVERS = (2e-4, 2e-3, 2e-2, np.inf)

# The solver stops within this share of the optimal distance, or after this many nodes: counted, not timed, so that the
# answer does not depend on the machine's speed.
_GAP = 1e-3
_NODES = 2_000

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
    """A choice for every site, and how the solver came to it. `gap` is the relative optimality gap it proved."""

    choices: Chosen
    solved: bool
    seconds: float = 0.0
    gap: float = 0.0

    def describe(self) -> str:
        if not self.solved:
            return "budget free: the recipe's settings as written"
        return f"budget solved in {self.seconds:.2f} s, gap {self.gap:.2%}"


@dataclass(frozen=True)
class _Group:
    sites: tuple[ConvSite, ...]
    options: tuple[Choice, ...]
    distances: np.ndarray
    params: np.ndarray  # change against the source's site, per option
    macs: np.ndarray
    losses: np.ndarray
    ratios: np.ndarray  # change of the value ratio against the written split


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
    limits = {name: resolve_amount(getattr(budget, name), getattr(source, name)) for name in ("params", "macs")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits and not losses:
        return Solution(chosen, solved=False)
    start = time.perf_counter()
    groups = _groups(chosen, settings, _with_floor(losses or {}))
    _check_attainable(groups, limits, budget, source, settings)
    program = _Program(groups, {name: limit - getattr(source, name) for name, limit in limits.items()})
    # The first budget is to be used up; one beside it is only a ceiling.
    name, limit = next(iter(limits.items()), ("params", np.inf))
    for leftover in _LEFTOVERS:
        counts, gap = program.nearest(name, limit * leftover)
        if counts is not None:
            return Solution(_assign(groups, counts, chosen), True, time.perf_counter() - start, gap)
    raise AugmentError(f"{_asked(limits, budget)} cannot be met together. {_help(settings)}")


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
    """The integer program; `ceilings` are the changes against the source that the budgets allow."""

    def __init__(self, groups: list[_Group], ceilings: dict[str, int]) -> None:
        self.ceilings = ceilings
        sizes = [len(group.options) for group in groups]
        self.group_of = np.repeat(np.arange(len(groups)), sizes)
        self.counts = np.array([len(group.sites) for group in groups])
        self.changes = {name: np.concatenate([getattr(g, name) for g in groups]) for name in ("params", "macs")}
        self.distances = np.concatenate([g.distances for g in groups])
        values = np.concatenate([[c.value_channels for c in g.options] for g in groups])
        self.objective = self.distances - 1e-7 * values / max(values.max(), 1)
        losses = np.concatenate([g.losses for g in groups])
        self.ratios = np.concatenate([g.ratios for g in groups]) if losses.any() else None
        if losses.any():
            self.objective = losses / losses[self.distances == 0].max() + _NEARNESS * self.distances

    def nearest(self, name: str, leftover: float) -> tuple[np.ndarray | None, float]:
        """The counts of least distance that leave at most `leftover` of the budget `name` unused, and the gap proved.

        None where there are none.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        variables = len(self.group_of)
        members = csr_array((np.ones(variables), (self.group_of, np.arange(variables))))
        constraints = [LinearConstraint(members, self.counts, self.counts)]
        if self.ratios is not None:
            constraints.append(LinearConstraint(self.ratios, -1e-9, np.inf))
        for budget, ceiling in self.ceilings.items():
            change, floor = self.changes[budget], ceiling - leftover if budget == name else -np.inf
            constraints.append(LinearConstraint(change, floor, ceiling))
        result = milp(
            self.objective,
            integrality=np.ones(variables),
            bounds=Bounds(0, self.counts[self.group_of]),
            constraints=constraints,
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if result.x is None:
            return None, 0.0
        return np.round(result.x).astype(int), float(result.mip_gap or 0.0)


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

    return {name: (total(name, np.min), total(name, np.max)) for name in ("params", "macs")}


def _check_attainable(groups, limits: dict[str, int], budget: Budget, source: Counts, settings: Sites) -> None:
    ranges = _attainable(groups, source)
    for name, limit in limits.items():
        least, most = ranges[name]
        if least > limit:
            raise AugmentError(
                f"budget.{name}={getattr(budget, name)} asks for at most {limit:,} {_UNIT[name]}, and the chosen sites "
                f"can have {least:,} to {most:,} ({_percent(least, source, name)} to {_percent(most, source, name)} of "
                f"the source's {getattr(source, name):,}). {_help(settings)}"
            )


_UNIT = {"params": "parameters", "macs": "multiply-adds"}


def _percent(count: int, source: Counts, name: str) -> str:
    return f"{count / getattr(source, name) - 1:+.2%}"


def _asked(limits: dict[str, int], budget: Budget) -> str:
    return " and ".join(f"budget.{name}={getattr(budget, name)} (at most {limit:,})" for name, limit in limits.items())


def _help(settings: Sites) -> str:
    if settings.variant == "aw":
        return (
            "AW only adds parameters; a larger sites.reduction adds fewer, and variant aa+aw (recipe aa-aw) saves what "
            "AW adds"
        )
    return "A larger sites.value_ratio, a smaller sites.key_ratio or sites.min_key_channels, or more sites would help"
