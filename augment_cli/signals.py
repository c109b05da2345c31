"""SIGINT, SIGTERM and SIGHUP end the program by an exception, which waits for the end of a `held` block.

Only the command line installs these handlers; a library call leaves the caller's signals alone.
"""

import atexit
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Protocol

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# Seconds in which a second signal is ignored. The terminal sends it to all processes, and torchrun sends it again.
_REPEATED = 1.0


class Stopped(BaseException):
    """A signal asked the program to end; `exit_code` is 128 plus its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


_holding = 0
_waiting: int | None = None
_raised_at: float | None = None


def install() -> None:
    """Make the signals raise `Stopped` in this process. A signal that is ignored, as under nohup, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_receive, os.getpid()))


def restore() -> None:
    """Restore Python's own handling of the signals, for code that is not ours."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def ignore() -> None:
    """Ignore the signals from now on: at the program's end, and in worker processes, which their parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Flag(Protocol):
    """A number in memory that processes share."""

    value: int


@cache
def at_exit() -> Flag:
    """A flag for worker processes, which becomes 1 when this process is about to exit."""
    from multiprocessing.sharedctypes import RawValue

    flag: Flag = RawValue("b", 0)
    atexit.register(setattr, flag, "value", 1)
    return flag


def ignore_in_worker(ending: Flag) -> None:
    """Ignore the signals in a worker process: the main process finishes its batch first, and then ends its workers.

    Ones that are left when the main process exits get SIGTERM from it, and it waits for them.
    """
    ignore()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)


def pending() -> bool:
    """Whether a signal came within a `held` block that has not ended."""
    return _waiting is not None


def stop() -> None:
    """Raise `Stopped` for the pending signal; for SIGTERM if the signal reached another process only."""
    _raise(_waiting or signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Delay signals until the block has ended, by an exception or not."""
    global _holding
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        if not _holding and _waiting is not None:
            _raise(_waiting)


def _receive(owner: int, number: int, frame: object) -> None:
    global _waiting
    if os.getpid() != owner:  # a forked worker
        return
    if _raised_at is not None and time.monotonic() - _raised_at < _REPEATED:
        return
    if _holding:
        _waiting = number
    else:
        _raise(number)


def _raise(number: int) -> None:
    global _waiting, _raised_at
    _waiting, _raised_at = None, time.monotonic()
    raise Stopped(number)
