"""What is printed, on stdout and stderr alike: text from outside is shown and never obeyed.

A name out of a file can hold terminal sequences, rich markup, line ends and letters that turn the direction of
writing. Everything that the program prints passes through `echo`, `say` or a `Terminal`.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


def plain(text: str, keep: str = "") -> str:
    """Text whose control characters, but for those in `keep`, are written as escapes.

    >>> plain("conv\\x1b[2J")
    'conv\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Terminal(Console):
    """A rich console that takes no markup and no emoji codes, and shows control characters as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(plain(segment.text, keep="\n"), segment.style)


def echo(text: str) -> None:
    """Print data of several lines on stdout, with one line end after it."""
    sys.stdout.write(plain(text, keep="\n\t").removesuffix("\n") + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    """Print a message of one line on stderr."""
    print(plain(message), file=sys.stderr, flush=True)
