"""Reads one case under limits of time and memory, and says how that ended."""

import contextlib
import io
import random
import resource
import signal
import tempfile
import traceback
import warnings
import zlib
from pathlib import Path

from augment_cli.errors import AugmentError
from tests.fuzz.targets import TARGETS

CASES = Path(__file__).with_name("cases")
_SECONDS = 30
_KILOBYTES = 2**21


class TooSlow(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


def make(target: str, seed: int, number: int) -> bytes:
    """A case, drawn from the seed and its number alone."""
    return TARGETS[target].make(random.Random(zlib.crc32(f"{target} {seed} {number}".encode())))


def read(target: str, case: bytes) -> str:
    """How a reader takes a case: "accepted", "refused", or else the failure."""
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = _read(target, case)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown
    return outcome if grown < _KILOBYTES else f"took {grown // 1024:,} MiB"


def _read(target: str, case: bytes) -> str:
    def ring(*_) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "case"
            path.write_bytes(case)
            with contextlib.redirect_stderr(io.StringIO()):
                TARGETS[target].read(path)
        return "accepted"
    except AugmentError as error:
        return "refused" if str(error).strip() else "refused without a word"
    except TooSlow:
        return f"took more than {_SECONDS} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def keep(target: str, case: bytes) -> Path:
    """Keep a case for the test suite."""
    folder = CASES / target
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{zlib.crc32(case):08x}"
    path.write_bytes(case)
    return path
