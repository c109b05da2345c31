"""A frontier of plans: as tables, JSON and a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from augment_cli.files import write_file
from augment_cli.planning.frontier import Point, Unit, count
from augment_cli.planning.recipe import UNITS
from augment_cli.reporting.comparison import Candidate, flat
from augment_cli.reporting.sheet import Column, Sheet, Sheets
from augment_cli.reporting.style import SERIES, picture
from augment_cli.reporting.units import amount, divergence, percent, share

SCHEMA = 1

_NAMES = UNITS | {"latency": "predicted time"}


@dataclass(frozen=True, repr=False)
class Frontier(Sheets):
    """Plans of one model from the smallest to the recipe's own; `str` gives the table of `augment plan --frontier`."""

    points: tuple[Point, ...]
    unit: Unit

    @property
    def heading(self) -> str:
        plan = self.points[0].plan
        return f"{plan.model} with recipe {plan.recipe}: {_NAMES[self.unit]} against {self.loss_name}"

    @property
    def measured(self) -> bool:
        return self.points[0].plan.predicted_divergence is not None

    @property
    def timed(self) -> bool:
        return self.points[0].plan.latency is not None

    @property
    def loss_name(self) -> str:
        return "predicted divergence" if self.measured else "distance from the recipe"

    def sheets(self, full: bool = False) -> Iterator[Sheet]:
        times = ("Time", "Measured") if self.timed else ()
        titles = (
            "#",
            "Parameters",
            "%",
            "MACs",
            "% ",
            *times,
            "Taken",
            "KL predicted" if self.measured else "Distance",
        )
        note = "KL in nats." if self.measured else "Distance is the sum of squared changes of the recipe's ratios."
        if timed := self.points[0].plan.latency:
            note += f" Time is predicted from the sites: {timed.settings.describe()}; {timed.machine}."
        yield Sheet(self.heading, tuple(map(Column, titles)), tuple(map(self._row, range(len(self.points)))), note)

    def _row(self, i: int) -> tuple[str, ...]:
        point = self.points[i]
        row = Candidate.of("", point.plan)
        counts: tuple[str, ...]
        counts = f"{row.params.after:,}", percent(row.params.percent), amount(row.macs.after), percent(row.macs.percent)
        if timed := point.plan.latency:
            whole = percent(100 * (timed.measured.ratio.median - 1)) if timed.measured else "-"
            counts += percent(100 * (timed.predicted_ratio - 1)), whole
        return str(i + 1), *counts, share(row.given_up or 0), divergence(point.loss)

    def data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "unit": self.unit,
            "loss": "predicted_divergence" if self.measured else "distance",
            "points": [
                {"count": count(p, self.unit), "loss": p.loss, "plan": p.plan.model_dump(mode="json", by_alias=True)}
                for p in self.points
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        return [flat(Candidate.of(str(i), point.plan)) | {"loss": point.loss} for i, point in enumerate(self.points, 1)]

    def draw(self, path: Path) -> None:
        """Draw the front, with the source's count as a line; PNG, SVG or PDF by suffix.

        Raises:
            AugmentError: the file cannot be written.
        """
        write_file(path, lambda temporary: self._draw(temporary, path.suffix[1:]))

    def _draw(self, path: Path, form: str) -> None:
        plan, counts = self.points[0].plan, [count(point, self.unit) / 1e6 for point in self.points]
        timed = plan.latency.source if plan.latency else 0
        before = timed if self.unit == "latency" else getattr(plan, f"{self.unit}_before")
        with picture(path, 7, 4.4, form) as figure:
            axes = figure.subplots()
            axes.plot(counts, [point.loss for point in self.points], label="plans, by their number")
            for i, (x, point) in enumerate(zip(counts, self.points, strict=True), 1):
                axes.annotate(str(i), (x, point.loss), xytext=(4, 4), textcoords="offset points")
            axes.axvline(before / 1e6, color=SERIES[1][0], linestyle=SERIES[1][1], label="the source")
            axes.set_xlabel(f"{_NAMES[self.unit]}, {'milliseconds' if self.unit == 'latency' else 'millions'}")
            axes.set_ylabel(f"{self.loss_name}{', nats' if self.measured else ''}")
            axes.set_title(f"{plan.model}, recipe {plan.recipe}")
            axes.legend()
