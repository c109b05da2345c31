"""A run's output folder: its files, and whether a run may begin in it. Imports nothing heavy."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from augment_cli.errors import AugmentError
from augment_cli.files import check_place, remove_leftovers

STATE = "state.safetensors"
SETTINGS = "settings.json"
TRACKED = "augment"  # what trackers call the project, and TensorBoard its folder
_WRITTEN = (STATE, SETTINGS, "summary.csv", "curves.png", "corrupt.txt", "best", "last", TRACKED)


def check_free(folder: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a folder with something in it, before any work is done.

    Args:
        inputs: files that the run reads, which an overwritten run may not hold.

    Raises:
        AugmentError: a run is there, or other files are, or the folder cannot be made.
    """
    if folder.is_file():
        raise AugmentError(f"{folder} is a file: `output` names a folder")
    if (folder / STATE).exists() and not overwrite:
        raise AugmentError(f"{folder} holds a run: `resume=True` goes on with it, `overwrite=True` starts anew")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise AugmentError(f"{folder} is not empty: give another `output`, or `overwrite=True`")
    check_place(folder, overwrite=True, inputs=inputs)


def clear(folder: Path, everything: bool) -> None:
    """Remove what a killed process left half-written, and with `everything`, an earlier run's files; no others."""
    remove_leftovers(folder)
    for path in [folder / name for name in _WRITTEN] if everything else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
