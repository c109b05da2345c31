"""A run's output folder: its files, and whether a run may begin in it. Imports nothing heavy."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from augment_cli.errors import AugmentError
from augment_cli.files import check_place, remove_leftovers

STATE = "state.safetensors"
SETTINGS = "settings.json"
TRACKED = "augment"  # the project's name for trackers, and TensorBoard's folder
_WRITTEN = (
    *(STATE, SETTINGS, "summary.csv", "curves.png", "corrupt.txt", "best", "last", TRACKED),
    *("best.safetensors", "last.safetensors", "examples.png"),
)


def check_free(folder: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse an output folder that is not free, before any work is done.

    Args:
        inputs: files that the run reads. They may not be in a folder that is overwritten.

    Raises:
        AugmentError: the folder holds a run or other files, or cannot be made.
    """
    if folder.is_file():
        raise AugmentError(f"{folder} is a file: `output` names a folder")
    if (folder / STATE).exists() and not overwrite:
        raise AugmentError(f"{folder} holds a run: `resume=True` goes on with it, `overwrite=True` starts anew")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise AugmentError(f"{folder} is not empty: give another `output`, or `overwrite=True`")
    check_place(folder, overwrite=True, inputs=inputs)


def clear(folder: Path, everything: bool) -> None:
    """Remove temporaries of killed processes and, with `everything`, an earlier run's files. Other files stay."""
    remove_leftovers(folder)
    for path in [folder / name for name in _WRITTEN] if everything else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
