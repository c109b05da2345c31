"""Errors that the user can put right: one message, which names the thing, the reason and the way out."""

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What torch, cuBLAS, cuDNN and the operating system say of memory, and torch of a worker that the system has ended.
_NO_MEMORY = re.compile(
    r"out of (shared )?memory|can't allocate memory|not enough memory|ALLOC_FAILED|killed by signal: Killed"
)


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


class OutOfMemory(AugmentError):
    """A device, or this machine, has not enough memory for what was asked."""


def out_of_memory(error: BaseException, doing: str, *ways: str) -> OutOfMemory | None:
    """An error that says what ran out of memory, how much was in use, and the ways out; None for another error.

    The traceback's frames lose their local variables, so that a caller can try again with their memory.

    Args:
        doing: what needs the memory, such as "training with `batch_size=64`".
        ways: what to do about it, the best first.
    """
    if not _of_memory(error):
        return None
    traceback.clear_frames(error.__traceback__)
    said = first_line(error) if str(error) else "out of memory"
    said = re.sub(r"^\[enforce fail[^]]*\][^A-Z]*", "", said.partition(" Of the allocated memory")[0]).rstrip(". ")
    if "worker" in said:
        ways = ("fewer `workers`", *ways)
    return OutOfMemory(
        f"{doing} needs more memory than there is: {said}" + (f"; try {', or '.join(ways)}" if ways else "")
    )


def _of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        return _NO_MEMORY.search(str(error)) is not None
    return isinstance(error, (MemoryError, OutOfMemory))


@contextmanager
def enough_memory(doing: str, *ways: str) -> Iterator[None]:
    """Turn an error of memory that is raised within into an OutOfMemory; arguments as of `out_of_memory`."""
    try:
        yield
    except Exception as error:
        if short := out_of_memory(error, doing, *ways):
            raise short from error
        raise


@contextmanager
def boundary(subject: str) -> Iterator[None]:
    """Turn whatever exception is raised within into one InputError or OutOfMemory that begins with `subject`.

    It stands around code of others that works on input from outside, such as parsers and timm's constructors: they
    raise anything. AugmentErrors pass as they are.
    """
    try:
        yield
    except AugmentError:
        raise
    except Exception as error:
        kind = OutOfMemory if _of_memory(error) else InputError
        raise kind(f"{subject}: {first_line(error)}") from error


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
    folded = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(name.lower(), folded, n=count, cutoff=0.5)
    if matches:
        return f"; did you mean {', '.join(folded[match] for match in matches)}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 20 else ""
