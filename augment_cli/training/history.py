"""A run's history: one row for each epoch, as a CSV file and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from augment_cli.files import write_file
from augment_cli.reporting.style import QUIET, picture
from augment_cli.training.task import Chart, Metric, Row, Task


def columns(scores: Sequence[str]) -> list[str]:
    """The columns of a task's history."""
    return ["epoch", *scores, "lr", "seconds"]


def write_history(folder: Path, rows: list[Row], task: type[Task]) -> None:
    """Write `summary.csv` and `curves.png`. Epochs count from 1.

    Raises:
        AugmentError: a file cannot be written.
    """
    write_file(folder / "summary.csv", lambda path: _write_csv(path, rows, columns(task.scores)))
    write_file(folder / "curves.png", lambda path: _draw(path, rows, task.charts, task.best))


def best_row(rows: list[Row], metric: Metric) -> Row | None:
    """The first of the rows with the highest metric; None without rows."""
    return max(rows, key=lambda row: row[metric.column], default=None)


def _write_csv(path: Path, rows: list[Row], names: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _number(row[key]) for key in names} for row in rows)


def _number(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _draw(path: Path, rows: list[Row], charts: Sequence[Chart], metric: Metric) -> None:
    epochs, best = [row["epoch"] for row in rows], best_row(rows, metric)
    with picture(path, 4.5 * len(charts), 3.6) as figure:
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            for name, column in chart.lines.items():
                axes.plot(epochs, [row[column] for row in rows], label=name)
            axes.set(xlabel="epoch", ylabel=chart.unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
            if best and metric.column in chart.lines.values():
                axes.set_title(f"best: {best[metric.column]:.2f}%, epoch {best['epoch']}")
                axes.axvline(best["epoch"], color=QUIET, linestyle=":", marker="", linewidth=1)
