"""A run's history: one row for each epoch, as a CSV file and as a picture."""

import csv
from pathlib import Path

from augment_cli.files import write_file

COLUMNS = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr", "seconds")

Row = dict[str, float]


def check_row(row: Row) -> Row:
    """The row, if its columns are those of a history.

    Raises:
        ValueError: a column is missing, or is one too many.
    """
    if row.keys() != set(COLUMNS):
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    return row


def write_history(folder: Path, rows: list[Row], metric: str = "val_top1") -> None:
    """Write `summary.csv` and `curves.png`. Epochs count from 1; losses are in nats, top-1 and top-5 in percent.

    Raises:
        AugmentError: a file cannot be written.
    """
    write_file(folder / "summary.csv", lambda path: _write_csv(path, rows))
    write_file(folder / "curves.png", lambda path: _draw(path, rows, metric))


def best_row(rows: list[Row], metric: str = "val_top1") -> Row | None:
    """The first of the rows with the highest metric; None without rows."""
    return max(rows, key=lambda row: row[metric], default=None)


def _write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _number(row[key]) for key in COLUMNS} for row in rows)


def _number(value: float) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _draw(path: Path, rows: list[Row], metric: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, name, unit in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss, nats", "top-1, %"), strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            axes.plot(epochs, [row[f"{split}_{name}"] for row in rows], style, marker=".", label=split)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        if metric == f"val_{name}" and (best := best_row(rows, metric)):
            axes.set_title(f"best: {best[metric]:.2f}%, epoch {best['epoch']}", fontsize="medium")
    figure.savefig(path, format="png", dpi=120)
