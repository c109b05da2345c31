"""What is printed, on stdout and stderr alike: text from outside is shown and never obeyed.

A name out of a file can hold terminal sequences, rich markup, line ends and letters that turn the direction of
writing. Everything that the program prints passes through `echo`, `say` or a `Terminal` (console.py).
"""

import sys


def plain(text: str, keep: str = "") -> str:
    """Text whose control characters, but for those in `keep`, are written as escapes.

    >>> plain("conv\\x1b[2J")
    'conv\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def echo(text: str) -> None:
    """Print data of several lines on stdout, with one line end after it."""
    sys.stdout.write(plain(text, keep="\n\t").removesuffix("\n") + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    """Print a message of one line on stderr."""
    print(plain(message), file=sys.stderr, flush=True)
