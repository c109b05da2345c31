"""Write files and folders under a temporary name, then rename them: they are whole or not there.

The process that writes a temporary locks it. A temporary without a lock was left by a killed process; the next write
into the same folder removes it.
"""

import ctypes
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from augment_cli import signals
from augment_cli.errors import FileError

if sys.platform != "win32":
    import fcntl

_PREFIX, _SUFFIX = ".augment-", ".tmp"
# Versions of safetensors quote the system as `IoError(Os { ..., message: "..." })` and `I/O error: ... (os error 28)`.
_SAID_BY_THE_DISK = re.compile(r'message: "(.+?)"|I/O error: (.+?)(?: \(os error|$)')

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def read_text(path: Path, what: str, most: int = 2**20) -> str:
    """Read a text file of at most `most` bytes; `what` names its kind in messages.

    Raises:
        AugmentError: the file cannot be read, is too long, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:
        raise FileError(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > most:
        raise FileError(f"{what} {path} has more than {most:,} bytes, the most that a {what} may have")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{what} {path} is not a text file: {error}") from error


def check_output(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Args:
        inputs: files that are read for the output. It may not replace one.

    Raises:
        AugmentError: the output exists, is an input or not a file, or its folder is missing or not writable.
    """
    mode = check_place(path, overwrite, inputs)
    if mode is not None and not stat.S_ISREG(mode):
        raise FileError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}: give a file's name")


def check_place(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> int | None:
    """Like `check_output`, for a file or a folder. Returns the mode of what exists there, or None."""
    target = _followed(path)
    for source in inputs:
        if source is not None and _followed(source).is_relative_to(target):
            raise FileError(f"{path} cannot be written: {source} is read for it; give another output")
    with errors_named(path):
        try:
            mode = target.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            mode = None
    if mode is not None and not overwrite:
        raise FileError(f"{path} exists; `overwrite=True` replaces it")
    if not target.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise FileError(f"{path} cannot be written: no permission in {target.parent}")
    return mode


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary name beside `path`, and rename the finished file to `path`.

    Raises:
        AugmentError: the file cannot be written; an existing one stays as it was.
    """
    target = _followed(path)
    with errors_named(path), _temporary(target.parent, is_folder=False) as temporary:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary folder beside `path`, and replace `path` by the finished folder.

    A killed process leaves the old folder or the new one, each whole.

    Raises:
        AugmentError: the folder cannot be written; an existing one stays as it was.
    """
    target = _followed(path)
    with errors_named(path):
        recover(target)
        with _temporary(target.parent, is_folder=True) as temporary:
            write(temporary)
            for file in temporary.iterdir():
                file.chmod(0o666 & ~_umask())
            temporary.chmod(0o777 & ~_umask())
            if not target.exists():
                temporary.rename(target)
            elif not _exchange(temporary, target):
                with signals.held():
                    target.rename(_aside(target))
                    temporary.rename(target)
                    recover(target)


def recover(path: Path) -> None:
    """Finish or undo a replacement of a folder that a kill interrupted between its two renames."""
    target = _followed(path)
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        aside.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporaries that no process writes any more. Windows has no such locks: there they stay."""
    if sys.platform == "win32":
        return
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):  # locked, of another user, or gone by now
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(handle)


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that names the user's file, not the temporary one."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error
    except SafetensorError as error:
        found = _SAID_BY_THE_DISK.search(str(error))
        reason = next(filter(None, found.groups())) if found else error
        raise FileError(f"{path} cannot be written: {reason}") from error


@contextmanager
def _temporary(parent: Path, is_folder: bool) -> Iterator[Path]:
    """A new, locked file or folder. It is removed at the end unless it was renamed."""
    remove_leftovers(parent)
    made: list[tuple[Path, int]] = []
    try:
        with signals.held():
            made.append(_make(parent, is_folder))
        yield made[0][0]
    finally:
        with signals.held():
            for path, handle in made:
                _remove(path)
                os.close(handle)


def _make(parent: Path, is_folder: bool) -> tuple[Path, int]:
    while True:
        if is_folder:
            name = tempfile.mkdtemp(dir=parent, prefix=_PREFIX, suffix=_SUFFIX)
            handle = os.open(name, os.O_RDONLY)
        else:
            handle, name = tempfile.mkstemp(dir=parent, prefix=_PREFIX, suffix=_SUFFIX)
        if _lock(handle) and os.path.exists(name):
            return Path(name), handle
        os.close(handle)  # another process took it for a leftover before it was locked


def _lock(handle: int) -> bool:
    """Lock a temporary. Returns False if another process has; on file systems without locks, True."""
    try:
        if sys.platform != "win32":
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. Returns False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _aside(target: Path) -> Path:
    """The name to which an old folder is moved while a new one takes its place."""
    return target.parent / f"{_PREFIX}{hashlib.blake2b(os.fsencode(target.name), digest_size=8).hexdigest()}.old"


def _followed(path: Path) -> Path:
    """The absolute path with every symbolic link followed."""
    return Path(os.path.realpath(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
