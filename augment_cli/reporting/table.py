"""A report for the terminal, as rich tables that fit its width. All but the rules is ASCII."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from augment_cli.console import Terminal
from augment_cli.reporting.folding import Line, fold, fold_names, unfolded
from augment_cli.reporting.numbers import Change, Limit, Report
from augment_cli.reporting.provenance import fidelity
from augment_cli.reporting.units import (
    amount,
    counted,
    describe_latency,
    divergence,
    duration,
    error,
    kernel,
    percent,
    share,
    signed_amount,
    signed_duration,
    size,
    span,
)
from augment_cli.terminal import plain

_NAMES_SHOWN = 4


def table(report: Report, full: bool = False) -> RenderableType:
    """Tables of the sites, the convolutions that stay with their reasons, and the totals.

    Args:
        full: a line for every site, and the names of all convolutions that stay; otherwise equal sites share a line
            with their sums.
    """
    lines = unfolded(report.sites) if full else fold(report.sites)
    parts: list[RenderableType] = [_heading(report), _SiteTables(report, lines)]
    if report.skipped:
        parts += [_skipped_heading(report), _skipped(report, full), ""]
    return Group(*parts, _totals(report), "", _notes(report))


def plain_table(report: Report, full: bool = False, width: int = 120) -> str:
    """The tables as text, for a file."""
    return to_text(table(report, full), width)


def to_text(renderable: RenderableType, width: int = 120) -> str:
    """Tables for the terminal as text without colours."""
    stream = io.StringIO()
    Terminal(file=stream, width=width, color_system=None).print(renderable)
    return "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())


def _heading(report: Report) -> Text:
    text = Text.assemble((plain(report.model), "bold"), " with recipe ", (plain(report.recipe.name), "bold"))
    text.append(f": {len(report.sites)} of {counted(report.convolutions, 'convolution')} replaced\n")
    return text.append(f"{report.becomes}; images of {size(report.input_size)}\n", style="dim")


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[Line], str]
    foot: str = ""
    justify: JustifyMethod = "right"


_Columns = list[_Column]


class _SiteTables:
    """The sites' columns in as few tables as the width allows; each table begins with the sites' names."""

    def __init__(self, report: Report, lines: tuple[Line, ...]):
        self.report, self.lines = report, lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        def fits(groups: list[_Columns]) -> bool:
            unlimited = options.update(width=10_000)
            return Measurement.get(console, unlimited, self._table(groups)).maximum <= options.max_width

        becomes, costs = _becomes(self.report), _costs(self.report)
        for groups in [[*becomes, *costs]] if fits([*becomes, *costs]) else [becomes, costs]:
            while groups:
                count = max((n for n in range(1, len(groups) + 1) if fits(groups[:n])), default=1)
                yield self._table(groups[:count])
                yield ""
                groups = groups[count:]

    def _table(self, groups: list[_Columns]) -> Table:
        columns = [column for group in groups for column in group]
        folded = len(self.lines) < len(self.report.sites)
        if folded:
            columns.insert(0, _Column("Sites", lambda line: str(len(line.sites)), str(len(self.report.sites))))
        result = bare_table(show_footer=any(group[0].foot for group in groups))
        result.add_column("Site", "All of them", overflow="fold")
        for column in columns:
            result.add_column(column.title, column.foot, justify=column.justify, no_wrap=True)
        for line in self.lines:
            result.add_row(Text(plain(line.name)), *(Text(column.cell(line)) for column in columns))
        return result


def bare_table(show_footer: bool = False) -> Table:
    """A table with a rule under its head, and nothing else around the cells."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        show_footer=show_footer,
        header_style="bold",
        footer_style="bold",
        pad_edge=False,
        collapse_padding=True,
        padding=(0, 1, 0, 0),
    )


def _becomes(report: Report) -> list[_Columns]:
    """Columns of the convolution and of its split. Columns of one group stay in one table."""
    return [list(_convolution_columns(report)), list(_operator_columns(report))]


def _costs(report: Report) -> list[_Columns]:
    """Columns of parameters, multiply-adds, kept filters, time and sensitivity."""
    params = _change_columns("Params", lambda line: line.params, report.sites_params)
    macs = _change_columns("MACs", lambda line: line.macs, report.sites_macs)
    kept = [_Column("Kept", _kept)] if report.inheritance else []
    kept += [_Column("Error", _error, error(report.error))] if report.error is not None else []
    groups = [list(params), [*macs, *kept]]
    if total := report.sites_latency:
        groups.append(list(_change_columns("Time", lambda line: line.latency or Change(0, 0), total, duration)))
    if any(site.sensitivity for site in report.sites):
        groups.append(list(_sensitivity_columns()))
    return groups


def _sensitivity_columns() -> Iterator[_Column]:
    """Columns of how much replacing a site alone changes the model's output."""

    def shown(line: Line, name: str, show: Callable[[float], str]) -> str:
        values = [getattr(site.sensitivity, name) for site in line.sites if site.sensitivity]
        return span(values, show) if values else "-"

    yield _Column("Alone\nagrees", lambda line: shown(line, "agreement", share))
    yield _Column("\nKL", lambda line: shown(line, "divergence", divergence))


def _convolution_columns(report: Report) -> Iterator[_Column]:
    if len(report.operators) > 1:
        yield _Column("Operator", lambda line: line.site.operator, justify="left")
    yield _Column("In", lambda line: str(line.site.in_channels))
    yield _Column("Out", lambda line: str(line.site.out_channels))
    yield _Column("Kernel", lambda line: kernel(line.site.kernel_size, line.site.stride), justify="left")
    yield _Column("Map", lambda line: size(line.site.resolution))


def _operator_columns(report: Report) -> Iterator[_Column]:
    for title in report.columns:
        yield _Column(title, partial(_operator_cell, title))


def _operator_cell(title: str, line: Line) -> str:
    return line.site.columns.get(title, "-")


def _change_columns(
    title: str, counts: Callable[[Line], Change], total: Change, show: Callable[[int], str] = amount
) -> Iterator[_Column]:
    yield _Column(f"{title}\nbefore", lambda line: show(counts(line).before), show(total.before))
    yield _Column("\nafter", lambda line: show(counts(line).after), show(total.after))
    yield _Column("\nchange", lambda line: percent(counts(line).percent), percent(total.percent))


def _kept(line: Line) -> str:
    records = [site.inheritance for site in line.sites if site.inheritance]
    if not records or records[0].kind not in ("carried", "fitted"):
        return records[0].kind if records else ""
    return span((record.share for record in records), lambda value: share(value, digits=0))


def _error(line: Line) -> str:
    errors = [site.error for site in line.sites if site.error is not None]
    return span(errors, error) if errors else "-"


def _skipped_heading(report: Report) -> Text:
    number = sum(len(group.names) for group in report.skipped)
    return Text(f"{counted(number, 'convolution stays as it is', 'convolutions stay as they are')}\n", style="bold")


def _skipped(report: Report, full: bool) -> Table:
    result = bare_table()
    result.add_column("Number", justify="right", no_wrap=True)
    result.add_column("Why", ratio=2)
    result.add_column("Which", ratio=3, style="dim", overflow="fold")
    for group in report.skipped:
        names = [plain(name) for name, _ in fold_names(group.names)]
        if len(names) > _NAMES_SHOWN and not full:
            names = [*names[: _NAMES_SHOWN - 1], "..."]
        result.add_row(str(len(group.names)), Text(plain(group.reason)), Text(", ".join(names)))
    return result


def _totals(report: Report) -> Table:
    result = bare_table()
    result.add_column("Whole model")
    for title in ("before", "after", "change", "", "budget", "left"):
        result.add_column(title, justify="right", no_wrap=True)
    result.add_row("Parameters", *_change(report.params, "{:,}".format), *_limit(report.params_limit, "{:,}".format))
    result.add_row("Multiply-adds (MACs)", *_change(report.macs, amount), *_limit(report.macs_limit, amount))
    result.add_row("FLOPs", *_change(report.flops, amount), "", "")
    if report.latency:
        result.add_row("Predicted time", *_change(report.latency, duration), *_limit(report.latency_limit, duration))
    if report.measured_latency:
        result.add_row("Measured time", *_change(report.measured_latency, duration), "", "")
    return result


_SIGNED = {amount: signed_amount, duration: signed_duration}


def _change(change: Change, show: Callable[[int], str]) -> tuple[str | Text, ...]:
    delta = _SIGNED.get(show, "{:+,}".format)(change.delta)
    return show(change.before), Text(show(change.after), style="bold"), delta, percent(change.percent)


def _limit(limit: Limit, show: Callable[[int], str]) -> tuple[str | Text, ...]:
    if limit.left is None:
        return limit.asked, "-"
    return limit.asked, Text(show(limit.left), style="green" if limit.left >= 0 else "red")


def _notes(report: Report) -> Text:
    notes = ["MACs are the multiply-adds of one image; FLOPs = 2 x multiply-adds."]
    notes += report.legend
    if report.ratios:
        attained = ", ".join(f"{name} {ratio.overall:.3f}" for name, ratio in report.ratios.items())
        notes.append(f"Attained ratios to the output channels: {attained}.")
    if report.inheritance:
        kinds = ", ".join(f"{number} {kind}" for kind, number in report.inheritance.items() if number)
        notes.append(f"Kept is the share of the source's filters by importance: {kinds}.")
    if report.error is not None:
        notes.append(
            "Error is the fitted channels' mean squared error over their variance, on images held out of the fit."
        )
    if report.timed:
        notes.append(f"Latency {describe_latency(report.timed)}.")
    if report.fidelity:
        notes.append(fidelity(report.fidelity))
    if report.weights:
        notes.append(f"Source weights: {plain(report.weights)}.")
    return Text("\n".join(notes), style="dim")
