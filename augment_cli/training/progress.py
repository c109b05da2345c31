"""Progress of a run, on stderr and from one process: a bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from augment_cli.console import Terminal
from augment_cli.training.task import Row

_SECONDS_BETWEEN_LINES = 30.0
_NAMES = 5


class Reporter:
    """Shows a run's progress; a silent one shows nothing."""

    def __init__(self, silent: bool = False) -> None:
        self.console = Terminal(stderr=True, quiet=silent)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=None)
        self.epochs = self.batches = 0
        self.line_at = self.began = time.monotonic()
        self.images = 0

    def __enter__(self) -> "Reporter":
        if not self.bar.disable:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if not self.bar.disable:  # early versions of rich end even a disabled bar with an empty line
            self.bar.stop()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(self, epochs: int, batches: int, epoch: int, batch: int) -> None:
        """Start the bar at this epoch and batch; both count from 0."""
        self.epochs, self.batches = epochs, batches
        self.bar.reset(self.task, total=epochs * batches, completed=epoch * batches + batch)
        self.began = time.monotonic()

    def advance(self, epoch: int, batch: int, images: int, scores: str) -> None:
        """Show that `batch` batches of the epoch are done. `images` were trained on since the last call."""
        self.images += images
        rate = self.images / max(time.monotonic() - self.began, 1e-9)
        text = f"epoch {epoch + 1}/{self.epochs}  {scores}  {rate:,.0f} images/s"
        self.bar.update(self.task, description=text, completed=epoch * self.batches + batch)
        if self.bar.disable and time.monotonic() - self.line_at > _SECONDS_BETWEEN_LINES:
            self.line_at = time.monotonic()
            self.say(f"{text}, batch {batch}/{self.batches}")

    def end_epoch(self, row: Row, scores: str, best: bool) -> None:
        so_far = ", the best so far" if best else ""
        self.say(f"epoch {row['epoch']}/{self.epochs}: {scores}; {row['seconds']:.0f} s{so_far}")

    def corrupt(self, names: list[str]) -> None:
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        self.say(f"{len(names)} corrupt images skipped: {', '.join(names[:_NAMES])}{more}")
