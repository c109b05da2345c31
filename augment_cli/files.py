"""Files that are either whole or not there: written under a temporary name, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from augment_cli.errors import AugmentError


def read_text(path: Path, what: str, most: int = 2**20) -> str:
    """The text of a file of at most `most` bytes; `what` names its kind in messages.

    Raises:
        AugmentError: no such file, not readable, too long, or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise AugmentError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > most:
        raise AugmentError(f"{what} {path} is longer than {most:,} bytes: that is no {what}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AugmentError(f"{what} {path} is not a text file: {error}") from error


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output before any work is done for it.

    Raises:
        AugmentError: it exists, or its folder does not or cannot be written.
    """
    if path.exists() and not overwrite:
        raise AugmentError(f"{path} exists; --overwrite replaces it")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise AugmentError(f"{path} cannot be written: there is no folder {parent}")
    if not os.access(path if path.is_dir() else parent, os.W_OK):
        raise AugmentError(f"{path} cannot be written: no permission in {path if path.is_dir() else parent}")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make the file under a temporary name beside `path`, and rename it to `path` when it is whole.

    Raises:
        AugmentError: the disk is full or refuses.
    """
    with _oserrors(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary folder beside `path`, then put its files at `path`.

    A new folder appears whole. In one that exists, each file is replaced whole, and files of other names stay.
    """
    with _oserrors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.absolute().parent))
        try:
            write(temporary)
            for file in temporary.iterdir():
                file.chmod(0o666 & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            if path.is_dir():
                for file in sorted(temporary.iterdir()):
                    file.replace(path / file.name)
            else:
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _oserrors(path: Path):
    try:
        yield
    except OSError as error:
        raise AugmentError(f"{path} cannot be written: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
