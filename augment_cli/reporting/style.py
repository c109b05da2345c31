"""One style for every picture: colours, strokes and fonts that are told apart in grey and by the colour-blind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPERATORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Of operators, on light and on dark ground: Okabe and Ito's colours."""

SERIES = (("#0a3f66", "-", "o"), ("#c44f00", "--", "s"), ("#2b9bd4", "-.", "^"), ("#111111", ":", "D"))
"""Colour, dashes and marker of the first to the fourth series of a chart, on white ground."""

COUNTS, WEIGHTS, SIGNED = "Blues", "inferno", "cividis"
"""Maps of colours, each of which grows lighter or darker throughout: of counts, of attention, of what has a sign."""

QUIET = "#5a6776"
_INK = "#16202b"


@contextmanager
def picture(path: Path, width: float, height: float, form: str = "png", dpi: int = 120) -> Iterator["Figure"]:
    """A figure to draw on within the block, which is then written: PNG, SVG or PDF. Width and height are in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_settings()):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format=form, dpi=dpi)


def _settings() -> Any:
    from matplotlib.rcsetup import cycler

    colours, dashes, markers = zip(*SERIES, strict=True)
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": QUIET,
        "axes.formatter.use_mathtext": True,
        "axes.grid": True,
        "axes.labelcolor": _INK,
        "axes.prop_cycle": cycler(color=colours) + cycler(linestyle=dashes) + cycler(marker=markers),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": _INK,
        "axes.titlesize": 10,
        "figure.facecolor": "white",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "grid.color": "#e3e7ec",
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
        "savefig.facecolor": "white",
        "svg.hashsalt": "augment-cli",
        "text.color": _INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
    }
