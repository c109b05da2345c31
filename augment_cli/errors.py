"""Errors that the user can put right: one message, which names the thing, the reason and the way out."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class AugmentError(Exception):
    """Bad input or a request that cannot be met. The command line prints it and exits with code 2.

    Settings stand in backticks as Python writes them, such as `overwrite=True`; the command line shows its options.
    """


class InputError(AugmentError):
    """A model, recipe, plan, data set or setting that cannot be used."""


class BudgetError(AugmentError):
    """A budget that cannot be met, or that a plan exceeds."""


class FileError(AugmentError):
    """A file or folder that cannot be read, written or replaced, or that does not hold what it should."""


@contextmanager
def boundary(subject: str) -> Iterator[None]:
    """Turn whatever exception is raised within into one InputError that begins with `subject`.

    It stands around code of others that works on input from outside, such as parsers and timm's constructors: they
    raise anything. AugmentErrors pass as they are.
    """
    try:
        yield
    except AugmentError:
        raise
    except Exception as error:
        raise InputError(f"{subject}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters long; its type's name where it has none."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if "int_max_str_digits" in str(error):  # Python's advice is none for users
        return "a number of thousands of digits"
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A hint with the known names most like `name`, or with how many there are: '; did you mean ...?'"""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if matches:
        return f"; did you mean {', '.join(matches)}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""
