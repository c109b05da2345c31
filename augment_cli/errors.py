"""What the user can put right: one message, which names the thing, the reason and the way out."""

import difflib
from collections.abc import Iterable


class AugmentError(Exception):
    """Bad input or a request that cannot be met. The command line prints it and exits with code 2."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint with the known names most like `name`, or with how many there are: '; did you mean ...?'"""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if matches:
        return f"; did you mean {', '.join(matches)}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""
