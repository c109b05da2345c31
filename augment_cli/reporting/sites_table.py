"""The HTML report's table of sites."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from augment_cli.reporting.markup import DASH, TIMES, Markup, minus, tag
from augment_cli.reporting.numbers import Change, Report, SiteRow
from augment_cli.reporting.units import amount, duration, error, kernel, percent, share, size


@dataclass(frozen=True)
class _Columns:
    """Columns under one heading: their titles, a site's cells, and the cells of the last row."""

    heading: str
    titles: tuple[str, ...]
    cells: Callable[[SiteRow], tuple[Markup, ...]]
    foot: tuple[Markup, ...] = ()


def sites_table(report: Report) -> Markup:
    """A table with a row for every site and a row of sums."""
    groups = list(_groups(report))
    foot = (group.foot or (tag("td") for _ in group.titles) for group in groups)
    return tag(
        "table",
        tag("caption", "What each site becomes and costs"),
        tag("thead", *_head(groups)),
        tag("tbody", (_row(site, groups) for site in report.sites)),
        tag("tfoot", tag("tr", tag("th", "Together", scope="row"), foot)),
        class_="sites",
    )


def _head(groups: list[_Columns]) -> Iterator[Markup]:
    spans = (tag("th", group.heading, scope="colgroup", colspan=len(group.titles), class_="span") for group in groups)
    yield tag("tr", tag("th", "Site", scope="col", rowspan=2), spans)
    titles = (
        tag("th", title, scope="col", class_=None if i else "edge")
        for group in groups
        for i, title in enumerate(group.titles)
    )
    yield tag("tr", titles)


def _row(site: SiteRow, groups: list[_Columns]) -> Markup:
    return tag("tr", tag("th", tag("code", site.name), scope="row"), (group.cells(site) for group in groups))


def _groups(report: Report) -> Iterator[_Columns]:
    yield _Columns("Convolution", ("In", "Out", "Kernel", "Map"), _convolution)
    yield _Columns("Becomes", *_operator(report))
    for heading, show, counts, total in (
        ("Parameters", "{:,}".format, lambda site: site.params, report.sites_params),
        ("Multiply-adds", amount, lambda site: site.macs, report.sites_macs),
    ):
        yield _change_columns(heading, show, counts, total)
    if total_time := report.sites_latency:
        yield _change_columns("Time", duration, lambda site: site.latency or Change(0, 0), total_time)
    if report.inheritance:
        yield _Columns("Inherited", ("Kind", "Filters", "Share", "Error"), _inherited)


def _cells(*texts: str) -> tuple[Markup, ...]:
    return tuple(tag("td", text, class_=None if i else "edge") for i, text in enumerate(texts))


def _convolution(site: SiteRow) -> tuple[Markup, ...]:
    shape = kernel(site.kernel_size, site.stride), size(site.resolution)
    return _cells(str(site.in_channels), str(site.out_channels), *(text.replace("x", TIMES) for text in shape))


def _operator(report: Report) -> tuple[tuple[str, ...], Callable[[SiteRow], tuple[Markup, ...]]]:
    """Titles and cells of a site's split, with the operator's name if the report has several operators."""
    several = len(report.operators) > 1

    def cells(site: SiteRow) -> tuple[Markup, ...]:
        names = (site.operator.upper(),) if several else ()
        return _cells(*names, *(site.columns.get(title, DASH) for title in report.columns))

    return (*(("Operator",) if several else ()), *report.columns), cells


def _change_columns(
    heading: str, show: Callable[[int], str], counts: Callable[[SiteRow], Change], total: Change
) -> _Columns:
    def cells(change: Change) -> tuple[Markup, ...]:
        text = minus(percent(change.percent))
        return (
            tag("td", show(change.before), class_="edge"),
            tag("td", show(change.after), class_="after"),
            tag("td", text, class_=change.direction),
        )

    return _Columns(heading, ("Before", "After", "Change"), lambda site: cells(counts(site)), cells(total))


def _inherited(site: SiteRow) -> tuple[Markup, ...]:
    record = site.inheritance
    if not record:
        return _cells("", "", "", "")
    missed = DASH if site.error is None else error(site.error)
    return _cells(record.kind, f"{record.kept}/{record.kept + record.given_up}", share(record.share), missed)
