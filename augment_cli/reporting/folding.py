"""Equal sites on one line: layer3.1-5.conv2 for five of them."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from augment_cli.planning.plan import natural
from augment_cli.reporting.numbers import Change, SiteRow

# A number with a leading zero stays part of the name.
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """Sites with the same numbers, under one name."""

    name: str
    sites: tuple[SiteRow, ...]

    @property
    def label(self) -> str:
        return self.name if len(self.sites) == 1 else f"{self.name} ({len(self.sites)} sites)"

    @property
    def site(self) -> SiteRow:
        """The first site, which stands for all."""
        return self.sites[0]

    @property
    def params(self) -> Change:
        """Parameters of all sites together."""
        return Change.total(site.params for site in self.sites)

    @property
    def macs(self) -> Change:
        """Multiply-adds of all sites together."""
        return Change.total(site.macs for site in self.sites)

    @property
    def latency(self) -> Change | None:
        """Nanoseconds of all sites together; None where they were not measured."""
        changes = [site.latency for site in self.sites if site.latency]
        return Change.total(changes) if changes else None


def unfolded(sites: Iterable[SiteRow]) -> tuple[Line, ...]:
    return tuple(Line(site.name, (site,)) for site in sites)


def fold(sites: Iterable[SiteRow]) -> tuple[Line, ...]:
    """One line for sites that differ only by numbers in their names; lines in the order of their first sites."""
    equal: defaultdict[tuple[SiteRow, str | None], dict[str, SiteRow]] = defaultdict(dict)
    for site in sites:
        kind = site.inheritance.kind if site.inheritance else None
        equal[replace(site, name="", inheritance=None, sensitivity=None), kind][site.name] = site
    lines = (
        Line(name, tuple(group[member] for member in members))
        for group in equal.values()
        for name, members in fold_names(group)
    )
    return tuple(sorted(lines, key=lambda line: natural(line.site.name)))


def fold_names(names: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Short names for groups of names, each with its members: exactly those that the short name spells out.

    >>> [short for short, _ in fold_names(["a.0.c1", "a.0.c2", "a.1.c1", "a.1.c2", "a.3.c1"])]
    ['a.0-1.c1-2', 'a.3.c1']
    """
    alike = defaultdict(list)
    for name in names:
        parts = tuple(_NUMBER.split(name))  # text and number, alternating
        alike[parts[::2]].append(parts)
    groups = (group for members in alike.values() for group in _products(members))
    named = [(_spell(group), tuple(sorted(("".join(parts) for parts in group), key=natural))) for group in groups]
    return sorted(named, key=lambda item: natural(item[1][0]))


def _products(names: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Split names until the numbers in each group combine freely, so that ranges spell out the group and no more."""
    choices = [sorted(set(column), key=natural) for column in zip(*names, strict=True)]
    if prod(map(len, choices)) == len(names):
        return [names]
    axis = next(i for i, column in enumerate(choices) if len(column) > 1)
    groups = [[name for name in names if name[axis] == value] for value in choices[axis]]
    return _merged([part for group in groups for part in _products(group)], axis)


def _merged(groups: list[list[tuple[str, ...]]], axis: int) -> list[list[tuple[str, ...]]]:
    """Join groups that differ on this axis only."""
    merged: defaultdict[frozenset[tuple[str, ...]], list[tuple[str, ...]]] = defaultdict(list)
    for group in groups:
        merged[frozenset(name[:axis] + name[axis + 1 :] for name in group)] += group
    return list(merged.values())


def _spell(names: list[tuple[str, ...]]) -> str:
    columns = zip(*names, strict=True)
    return "".join(_ranges(column) if i % 2 else column[0] for i, column in enumerate(columns))


def _ranges(numbers: Iterable[str]) -> str:
    ordered = sorted({int(number) for number in numbers})
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
