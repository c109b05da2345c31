"""The HTML report's tables of sites: equal sites in one row, and many rows folded by block."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from augment_cli.reporting.folding import Line, fold
from augment_cli.reporting.markup import DASH, TIMES, Markup, minus, tag
from augment_cli.reporting.numbers import Change, Report
from augment_cli.reporting.units import amount, counted, duration, error, kernel, percent, share, size, span

MANY = 20
"""Most rows of one table; more are folded by block."""

_BLOCK = re.compile(r"^.*?\d+[^.]*")


Cells = tuple[tuple[str, str | None], ...]
"""Texts with their styles."""


@dataclass(frozen=True)
class _Columns:
    """Columns under one heading: their titles, a line's cells, and whether cells of all lines add up."""

    heading: str
    titles: tuple[str, ...]
    cells: Callable[[Line], Cells]
    adds_up: bool = False


def sites_tables(report: Report) -> Markup:
    """One table for all sites or, for more than MANY rows, a table for each block behind its sums."""
    lines = fold(report.sites)
    columns = list(_columns(report))
    if len(lines) <= MANY:
        return _table(lines, columns, "All sites", report)
    blocks = ((name, tuple(members)) for name, members in groupby(lines, lambda line: _block(line.site.name)))
    return tag("div", (_folded(name, members, columns, report) for name, members in blocks), class_="reasons")


def _block(name: str) -> str:
    """The part of a module's name that a stage shares: up to the first part with a number.

    >>> _block("layer3.1.conv2"), _block("blocks.2.0.conv"), _block("stem.conv")
    ('layer3', 'blocks.2', 'stem.conv')
    """
    found = _BLOCK.match(name)
    return found.group() if found else name


def _folded(block: str, lines: tuple[Line, ...], columns: list[_Columns], report: Report) -> Markup:
    number = sum(len(line.sites) for line in lines)
    changes = Change.total(line.params for line in lines), Change.total(line.macs for line in lines)
    params, macs = (minus(percent(change.percent)) for change in changes)
    text = f" {counted(number, 'site')}, parameters {params}, multiply-adds {macs}"
    summary = tag("summary", tag("b", number), tag("code", block), text)
    return tag("details", summary, _table(lines, columns, f"Sites of {block}", report, foot=False))


def _table(lines: Sequence[Line], columns: list[_Columns], caption: str, report: Report, foot: bool = True) -> Markup:
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", *_head(columns)),
        tag("tbody", (_row(line, columns) for line in lines)),
        tag("tfoot", _sums(columns, report)) if foot else None,
        class_="sites stack",
    )
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _head(groups: list[_Columns]) -> Iterator[Markup]:
    spans = (tag("th", group.heading, scope="colgroup", colspan=len(group.titles), class_="span") for group in groups)
    yield tag("tr", tag("th", "Site", scope="col", rowspan=2), spans)
    titles = (
        tag("th", title, scope="col", class_=None if i else "edge")
        for group in groups
        for i, title in enumerate(group.titles)
    )
    yield tag("tr", titles)


def _row(line: Line, groups: list[_Columns]) -> Markup:
    number = tag("small", f" {TIMES} {len(line.sites)}") if len(line.sites) > 1 else None
    return tag("tr", tag("th", tag("code", line.name), number, scope="row"), _cells(line, groups))


def _cells(line: Line, groups: list[_Columns]) -> Iterator[Markup]:
    """A line's cells. Each has its title too, which narrow screens show in place of the table's head."""
    for group in groups:
        for i, (title, (text, style)) in enumerate(zip(group.titles, group.cells(line), strict=True)):
            label = f"{group.heading} {title.lower()}" if group.adds_up or group.heading == "Kept" else title
            styles = " ".join(filter(None, (None if i else "edge", style)))
            yield tag("td", text, class_=styles or None, data_label=label)


def _sums(groups: list[_Columns], report: Report) -> Markup:
    """The row of all sites together: counts add up, splits do not."""
    summed = [group if group.adds_up else replace(group, cells=_empty(len(group.titles))) for group in groups]
    return tag("tr", tag("th", "Together", scope="row"), _cells(Line("", report.sites), summed))


def _empty(number: int) -> Callable[[Line], Cells]:
    return lambda line: (("", None),) * number


def _columns(report: Report) -> Iterator[_Columns]:
    yield _Columns("Convolution", ("In", "Out", "Kernel", "Map"), _convolution)
    yield _Columns("Becomes", *_operator(report))
    yield _change("Parameters", amount, lambda line: line.params)
    yield _change("Multiply-adds", amount, lambda line: line.macs)
    if report.sites_latency:
        yield _change("Time", duration, lambda line: line.latency or Change(0, 0))
    if report.inheritance:
        yield _Columns("Kept", ("Share",), _kept)
    if report.error is not None:
        yield _Columns("Fitted", ("Error",), _error)


def _plain(*texts: str) -> Cells:
    return tuple((text, None) for text in texts)


def _convolution(line: Line) -> Cells:
    site = line.site
    shape = kernel(site.kernel_size, site.stride), size(site.resolution)
    return _plain(str(site.in_channels), str(site.out_channels), *(text.replace("x", TIMES) for text in shape))


def _operator(report: Report) -> tuple[tuple[str, ...], Callable[[Line], Cells]]:
    """Titles and cells of a split, with the operator's name if the report has several operators."""
    several = len(report.operators) > 1

    def cells(line: Line) -> Cells:
        names = (line.site.operator.upper(),) if several else ()
        return _plain(*names, *(line.site.columns.get(title, DASH) for title in report.columns))

    return (*(("Operator",) if several else ()), *report.columns), cells


def _change(heading: str, show: Callable[[int], str], counts: Callable[[Line], Change]) -> _Columns:
    """Columns of a count over all sites of a line."""

    def cells(line: Line) -> Cells:
        change = counts(line)
        text = minus(percent(change.percent))
        return (show(change.before), None), (show(change.after), "after"), (text, change.direction)

    return _Columns(heading, ("Before", "After", "Change"), cells, adds_up=True)


def _kept(line: Line) -> Cells:
    """The share of the source's filters by importance."""
    records = [site.inheritance for site in line.sites if site.inheritance]
    shown = span((record.share for record in records), lambda value: share(value, digits=0)) if records else ""
    return _plain(shown.replace("-", DASH))


def _error(line: Line) -> Cells:
    errors = [site.error for site in line.sites if site.error is not None]
    return _plain(span(errors, error).replace("-", DASH) if errors else DASH)
