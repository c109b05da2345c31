"""A network drawn as SVG: a band for each map size, a mark for each convolution, attention in colour.

The picture needs nothing else: its style is in it, light or dark as the reader's system. Colours are Okabe and Ito's,
which the colour-blind tell apart; in grey, what attention took is solid and what stays is pale.
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from augment_cli.analysis.site import Size
from augment_cli.operators import get_operator, operator_names
from augment_cli.planning.plan import Plan, natural
from augment_cli.reporting.markup import TIMES, Markup, tag
from augment_cli.reporting.style import OPERATORS
from augment_cli.reporting.units import counted, kernel, share, size

WIDE, NARROW = 960, 320  # pixels: for a desk and for a phone
_TALLEST, _LOWEST = 72, 24
_HEAD, _FOOT, _GAP, _SIDE = 22, 8, 8, 6
_LINE, _CHARACTER = 17, 6.3  # of the legend's text
_NARROWEST = 80  # of a band, for its label
_MOST_MARKS = 1500
_FEW_MARKS = 150  # up to which they are wide

_STYLE = """
.network { --ink: #16202b; --soft: #5a6776; --band: #eef1f5; --stay: #b4bfcc; }
@media screen and (prefers-color-scheme: dark) {
  .network { --ink: #e6ebf0; --soft: #98a5b3; --band: #1b232c; --stay: #5b6876; } }
.network text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--ink); }
.network .soft { fill: var(--soft); }
.network .band { fill: var(--band); }
.network .stay { fill: var(--stay); }
.network .kept { fill-opacity: 0.28; stroke-width: 1; }
"""


@dataclass(frozen=True)
class _Scale:
    """How wide the picture and its marks are, and how high: by the logarithm of the output channels, least to most."""

    width: int
    pitch: int
    least: int
    most: int

    @classmethod
    def of(cls, shown: tuple["Mark", ...], width: int) -> "_Scale":
        channels = [mark.channels for mark in shown if mark.channels] or [1]
        return cls(width, 14 if len(shown) <= _FEW_MARKS else 8, min(channels), max(channels))

    @property
    def bar(self) -> int:
        return self.pitch - 3

    @property
    def most_beside(self) -> int:
        """How many marks fit into a band."""
        return (self.width - 2 * _SIDE) // self.pitch

    def height(self, mark: "Mark") -> float:
        if mark.channels is None or self.most == self.least:
            return _TALLEST
        grown = math.log(mark.channels / self.least) / math.log(self.most / self.least)
        return round(_LOWEST + (_TALLEST - _LOWEST) * grown, 1)

    def band(self, number: int) -> int:
        """Width of a band of so many marks."""
        return max(_NARROWEST, number * self.pitch + 2 * _SIDE - 3)


@dataclass(frozen=True)
class Mark:
    """A convolution in the picture. map_size and channels (of the output) are None where they are not known.

    operator: None where it stays as it is; taken: share of the output channels that attention computes; text: what
    becomes of it, or why it stays.
    """

    name: str
    map_size: Size | None
    channels: int | None
    shape: str
    operator: str | None
    taken: float
    text: str


def marks(plan: Plan) -> tuple[Mark, ...]:
    """A mark for each convolution of a plan, in the order of their names."""
    found = [
        Mark(
            site.name,
            site.resolution,
            site.out_channels,
            kernel(site.kernel_size, site.stride),
            site.operator,
            site.given_up / site.out_channels,
            get_operator(site.operator).describe(site.split),
        )
        for site in plan.sites
    ]
    found += [
        Mark(s.name, s.resolution, s.out_channels, size(s.kernel_size) if s.kernel_size else "", None, 0.0, s.reason)
        for s in plan.skipped
    ]
    return tuple(sorted(found, key=lambda mark: natural(mark.name)))


def draw_network(found: tuple[Mark, ...], title: str, key: str = "network", width: int = WIDE) -> Markup:
    """The picture.

    Args:
        found: the convolutions, from `marks`.
        title: what the picture is of, for those who cannot see it.
        key: begins the ids in it, which are unique in a page.
        width: in pixels; bands wrap to it.
    """
    shown = found if len(found) <= _MOST_MARKS else tuple(mark for mark in found if mark.operator)[:_MOST_MARKS]
    known = operator_names()
    used = [name for name in known if any(mark.operator == name for mark in shown)]
    colours = {name: OPERATORS[known.index(name) % len(OPERATORS)] for name in used}
    scale = _Scale.of(shown, width)
    legend, top = _legend(colours, len(found) - len(shown), width)
    bands, height = _placed(shown, scale, top)
    drawn = [_band(x, y, members, colours, scale) for x, y, members in bands]
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", _description(found), id=f"{key}-desc"),
        tag("style", Markup(_STYLE)),
        tag("g", legend),
        *drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        class_="network",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def network_figure(found: tuple[Mark, ...], title: str, key: str = "network") -> Markup:
    """The picture in a page, which shows the one that suits the screen's width."""
    narrow = draw_network(found, title, f"{key}-narrow", NARROW)
    wide = tag("div", draw_network(found, title, key), class_="wide")
    return tag("figure", wide, tag("div", narrow, class_="narrow"))


def network_picture(plan: Plan) -> str:
    """The picture of a plan as a file's text."""
    return f"{draw_network(marks(plan), f'The convolutions of {plan.model} with recipe {plan.recipe}')}\n"


def _description(found: tuple[Mark, ...]) -> str:
    replaced = sum(1 for mark in found if mark.operator)
    by_map = _bands(found)
    places = ", ".join(
        f"{sum(1 for mark in members if mark.operator)} of {len(members)} at {_map_name(key)}"
        for key, members in by_map
    )
    return (
        f"{replaced} of {counted(len(found), 'convolution')} replaced: {places}. The table of sites has every number."
    )


def _bands(found: Iterable[Mark]) -> list[tuple[Size | None, list[Mark]]]:
    """Marks by map size, the largest map first, those of unknown size last."""
    bands: dict[Size | None, list[Mark]] = defaultdict(list)
    for mark in found:
        bands[mark.map_size].append(mark)
    return sorted(bands.items(), key=lambda item: -math.prod(item[0]) if item[0] else 1)


def _placed(found: tuple[Mark, ...], scale: _Scale, y: float) -> tuple[list[tuple[float, float, list[Mark]]], float]:
    """Where each band begins, from y on; one wider than the picture is in parts. And the picture's height."""
    placed: list[tuple[float, float, list[Mark]]] = []
    x, tall = 0.0, _HEAD + _TALLEST + _FOOT + _GAP
    for _, members in _bands(found):
        for first in range(0, len(members), scale.most_beside):
            part = members[first : first + scale.most_beside]
            width = scale.band(len(part))
            if x and x + width > scale.width:
                x, y = 0.0, y + tall
            placed.append((x, y, part))
            x += width + _GAP
    return placed, y + tall


def _band(x: float, y: float, members: list[Mark], colours: dict[str, str], scale: _Scale) -> Markup:
    ground = tag("rect", x=x, y=y, width=scale.band(len(members)), height=_HEAD + _TALLEST + _FOOT, rx=6, class_="band")
    label = tag("text", _map_name(members[0].map_size), x=x + _SIDE, y=y + 15, class_="soft")
    bars = (
        _mark(x + _SIDE + i * scale.pitch, y + _HEAD + _TALLEST, mark, colours, scale) for i, mark in enumerate(members)
    )
    return tag("g", ground, label, *bars)


def _mark(x: float, bottom: float, mark: Mark, colours: dict[str, str], scale: _Scale) -> Markup:
    """A bar whose height grows with the output channels: solid as far as attention computes them, pale the rest."""
    height = scale.height(mark)
    top = round(bottom - height, 1)
    where = {"x": x, "width": scale.bar}
    title = tag("title", _title(mark))
    if mark.operator is None:
        return tag("g", title, tag("rect", y=top, height=height, rx=1, class_="stay", **where))
    colour = colours[mark.operator]
    solid = round(height * mark.taken, 1)
    pale = tag("rect", y=top, height=height, rx=1, fill=colour, stroke=colour, class_="kept", **where)
    taken = tag("rect", y=top, height=solid, rx=1, fill=colour, **where) if solid else None
    return tag("g", title, pale, taken)


def _title(mark: Mark) -> str:
    shape = f"{mark.name}: {mark.shape}" if mark.shape else mark.name
    channels = f", {counted(mark.channels, 'channel')}" if mark.channels else ""
    if mark.operator is None:
        return f"{shape}{channels}; stays: {mark.text}"
    return f"{shape}{channels}; {mark.operator.upper()}: {mark.text}; attention computes {share(mark.taken)}"


def _legend(colours: dict[str, str], left_out: int, width: int) -> tuple[list[Markup], float]:
    """What colours and shapes mean, in lines of a width; and where the lines end."""
    found, x, y = [], 0.0, 15.0
    for name, colour in colours.items():
        found.append(tag("rect", x=x, y=4, width=11, height=14, rx=1, fill=colour, stroke=colour, class_="kept"))
        found.append(tag("rect", x=x, y=4, width=11, height=5, rx=1, fill=colour))
        found.append(tag("text", name.upper(), x=x + 15, y=y))
        x += 32 + 8 * len(name)
    found.append(tag("rect", x=x, y=4, width=11, height=14, rx=1, class_="stay"))
    found.append(tag("text", "stays as it is", x=x + 15, y=y))
    x += 110
    note = "solid: the channels that attention computes; height: output channels, on a log scale"
    if left_out:
        note += f"; {left_out:,} more that stay are not drawn"
    if x + _CHARACTER * len(note) > width:
        x, y = 0.0, y + _LINE
    for line in textwrap.wrap(note, int((width - x) / _CHARACTER)):
        found.append(tag("text", line, x=x, y=y, class_="soft"))
        y += _LINE
    return found, y - _LINE + 15


def _map_name(map_size: Size | None) -> str:
    return f" {TIMES} ".join(map(str, map_size)) if map_size else "map unknown"
