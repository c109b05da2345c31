"""The names that users give for models and data, checked before torch and timm are imported."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from augment_cli.analysis.functions import is_function
from augment_cli.errors import InputError, nearest

KINDS = ("hfds", "hfids", "wds", "tfds", "torch")
STREAMS = ("hfids", "wds", "tfds")
COLUMNS = ("hfds", "hfids", "wds", "tfds")

ImageSize = int | tuple[int, int] | tuple[int, int, int]
"""Of an image: its side, (height, width) or (channels, height, width)."""

OnCorrupt = Literal["fail", "skip"]
"""At an image that cannot be read: stop, or take the next readable one in its place."""


def kind_of(spec: str) -> str | None:
    """The kind of data that a spec names, such as `hfds`; None for a folder or a tar file."""
    kind = spec.partition("/")[0].lower()
    return kind if kind in KINDS else None


def check_data(spec: str) -> None:
    """Refuse data whose folder or tar file does not exist.

    Raises:
        AugmentError: there is no such folder or file.
    """
    path = Path(spec)
    if kind_of(spec) is None and not path.exists():
        near = nearest(path.name, [p.name for p in path.absolute().parent.glob("*")]) if path.parent.is_dir() else ""
        raise InputError(f"data {path}: no such folder or file{near}")


def check_model(spec: str) -> None:
    """Refuse a model that is neither a file, a folder nor a name that timm knows.

    Raises:
        AugmentError: there is no such model.
    """
    if Path(spec).exists():
        return
    if Path(spec).suffix == ".safetensors" or spec.startswith((".", "/")):
        raise InputError(f"{spec}: no such file or folder")
    check_name(spec)


def check_name(name: str) -> None:
    """Refuse a name that timm does not know. Tags and models on a hub are left to timm to check.

    The support table may be older than the installed timm: a name that it lacks is searched for in timm's files.

    Raises:
        AugmentError: there is no such model.
    """
    if name.startswith("local-dir:"):
        config = Path(name.removeprefix("local-dir:")) / "config.json"
        if not config.is_file():
            raise InputError(f"{name} cannot be created: Config file not found: {config}")
    elif is_function(name):
        if find_spec(name.partition(":")[0].partition(".")[0]) is None:
            raise InputError(f"{name}: no package {name.partition('.')[0]} is installed here")
    elif ":" not in name:
        from augment_cli.analysis.support import model_names

        architecture = name.partition(".")[0]
        known = model_names()
        if architecture in known:
            return
        if Path(name).exists():
            raise InputError(f"{name} is a file or folder: give the name of a model that is not converted yet")
        if not _in_timm(architecture):
            raise InputError(f"timm has no model {name}{nearest(architecture, known)}")


def height_width(input_size: ImageSize | None) -> tuple[int, int] | None:
    """An image's (height, width), whichever way its size is given.

    Raises:
        AugmentError: it is no size.
    """
    if input_size is None:
        return None
    sides = input_size if isinstance(input_size, (tuple, list)) else (input_size, input_size)
    if len(sides) not in (2, 3) or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"`input_size={input_size!r}`: give a side in pixels, (height, width) or (channels, height, width)"
        )
    return sides[-2], sides[-1]


def check_channels(input_size: ImageSize | None, channels: int) -> None:
    """Refuse an image size with another number of channels than the model takes."""
    if isinstance(input_size, tuple) and len(input_size) == 3 and input_size[0] != channels:
        raise InputError(f"`input_size={input_size!r}`: the model takes images of {channels} channels")


def check_file(option: str, path: str | Path | None) -> None:
    """Refuse an input file that does not exist; `option` names it in the message.

    Raises:
        AugmentError: there is no such file.
    """
    if path is not None and not Path(path).is_file():
        raise InputError(f"{option} {path}: {'a folder, and no file' if Path(path).is_dir() else 'no such file'}")


def _in_timm(architecture: str) -> bool:
    """Whether a file of timm's models defines or aliases this name."""
    found = find_spec("timm")
    folders = (found and found.submodule_search_locations) or ()
    word = re.compile(rf"\b{re.escape(architecture)}\b")
    files = (file for folder in folders for file in Path(folder, "models").glob("*.py"))
    return any(word.search(file.read_text(encoding="utf-8")) for file in files)
