"""Bar charts of counts before and after, as inline SVG. The page's style sheet colours them."""

from collections.abc import Callable

from augment_cli.reporting.folding import Line
from augment_cli.reporting.markup import Markup, minus, tag
from augment_cli.reporting.numbers import Change
from augment_cli.reporting.units import amount, counted, percent

_WIDTH, _ROW, _BAR, _LABEL = 480, 38, 6, 40


def bar_chart(key: str, lines: tuple[Line, ...], counts: Callable[[Line], Change], unit: str) -> Markup:
    """A pair of bars for each line, before over after, with its name and numbers above.

    Args:
        key: the chart's id in the page.
        counts: gives the count of a line to show.
        unit: name of the counted things, in the plural.
    """
    changes = [counts(line) for line in lines]
    longest = max(1, *(number for change in changes for number in (change.before, change.after)))
    total = Change.total(changes)
    return tag(
        "svg",
        tag("title", f"{unit.capitalize()} per site, before and after", id=f"{key}-title"),
        tag(
            "desc",
            f"{counted(len(lines), 'pair')} of bars. All sites together: {total.before:,} {unit} before and "
            f"{total.after:,} after, {percent(total.percent)}. The table below has every number.",
            id=f"{key}-desc",
        ),
        (_row(i, line, counts(line), longest, unit) for i, line in enumerate(lines)),
        viewBox=f"0 0 {_WIDTH} {len(lines) * _ROW - 7}",
        preserveAspectRatio="xMinYMin meet",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def _row(index: int, line: Line, change: Change, longest: int, unit: str) -> Markup:
    top = index * _ROW
    return tag(
        "g",
        tag("title", f"{line.label}: {change.before:,} {unit} before, {change.after:,} after"),
        tag("text", _shortened(line.label), x=0, y=top + 12, class_="name"),
        tag(
            "text",
            tag("tspan", f"{amount(change.before)} \N{RIGHTWARDS ARROW} {amount(change.after)}  "),
            tag("tspan", minus(percent(change.percent)), class_=direction(change)),
            x=_WIDTH,
            y=top + 12,
            class_="value",
        ),
        _bar(change.before, longest, top + 17, "before"),
        _bar(change.after, longest, top + 17 + _BAR + 1, "after"),
    )


def _bar(number: int, longest: int, top: int, kind: str) -> Markup:
    width = max(1, round(_WIDTH * number / longest, 1)) if number else 0
    return tag("rect", x=0, y=top, width=width, height=_BAR, rx=1.5, class_=kind)


def _shortened(label: str) -> str:
    """A long name without its middle."""
    half = _LABEL // 2
    return label if len(label) <= _LABEL else f"{label[: half - 1]}\N{HORIZONTAL ELLIPSIS}{label[-half:]}"


def direction(change: Change) -> str:
    """The style of a change: more, less or same."""
    return "more" if change.delta > 0 else "less" if change.delta else "same"
