"""A converted model on disk: the file alone, or a folder for timm with its reports and a model card.

Imports torch and timm only to write.
"""

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from augment_cli.checkpoint.metadata import WEIGHTS, Metadata, read_metadata
from augment_cli.errors import AugmentError, FileError
from augment_cli.files import check_output, check_place, recover, write_file, write_folder
from augment_cli.reporting import FORMATS, Report
from augment_cli.reporting.card import model_card
from augment_cli.reporting.network import network_picture

if TYPE_CHECKING:
    from torch import nn

FOLDER_FILES = (WEIGHTS, "config.json", "plan.json", "README.md", "report.json", "report.html", "network.svg")
_OTHER_FORMATS = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".onnx", ".json", ".html", ".toml")


def check_target(path: Path, overwrite: bool, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse an output for a converted model that cannot be written, before any work is done.

    A name that ends in .safetensors is a file, any other a folder. A folder is replaced as a whole, so it may hold
    nothing but files that `write_model` wrote.

    Args:
        inputs: files that are read for the model. The output may not be or contain one.

    Raises:
        AugmentError: the output exists, holds other files, has the suffix of another format, or cannot be written.
    """
    if path.suffix.lower() in _OTHER_FORMATS:
        raise FileError(
            f"{path}: a converted model is not written as {path.suffix}: give a name that ends in .safetensors for "
            f"one file, or a name without a suffix for a folder"
        )
    if _is_file(path):
        check_output(path, overwrite, inputs)
        return
    recover(path)
    mode = check_place(path, overwrite, inputs)
    if mode is None:
        return
    if not stat.S_ISDIR(mode):
        raise FileError(f"{path} is a file: give a name that ends in .safetensors, or a folder")
    if Path.cwd().is_relative_to(path.resolve()):
        raise FileError(f"{path} is the current folder, and would be replaced as a whole: name another folder")
    if foreign := sorted(file.name for file in path.iterdir() if not _is_own(file)):
        raise FileError(
            f"{path} would be replaced as a whole, and augment did not write {foreign[0]} in it: move {foreign[0]}, or "
            f"name another folder"
        )


def write_model(model: "nn.Module", metadata: Metadata, target: Path) -> None:
    """Write a converted model to a file, if the name ends in .safetensors, else to a folder.

    Raises:
        AugmentError: the output cannot be written.
    """
    from augment_cli.checkpoint.files import save_weights

    if _is_file(target):
        write_file(target, lambda temporary: save_weights(model, metadata, temporary))
    else:
        write_folder(target, lambda temporary: _fill(temporary, model, metadata, target))


def write_config(model: "nn.Module", input_size: tuple[int, int, int], folder: Path) -> None:
    """Write timm's config.json, from which timm and transformers create the model again."""
    from augment_cli.compat import save_timm_config

    path = folder / "config.json"
    save_timm_config(model, str(path), input_size)
    config = json.loads(path.read_text(encoding="utf-8"))
    # num_classes is in the file twice. transformers passes both to timm, and Python refuses an argument given twice.
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_file(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _is_own(file: Path) -> bool:
    """Whether a file in an output folder is one that `_fill` wrote."""
    try:
        if file.name == WEIGHTS:
            return bool(read_metadata(file))
        if file.name == "README.md":
            return "- augment-cli" in file.read_text(encoding="utf-8").partition("\n---\n")[0].splitlines()
        if file.name == "config.json":
            return json.loads(file.read_text(encoding="utf-8")).get("architecture") == "augmented"
    except (AugmentError, OSError, ValueError, AttributeError):
        return False
    return file.name in FOLDER_FILES and not os.path.isdir(file)


def _fill(folder: Path, model: "nn.Module", metadata: Metadata, target: Path) -> None:
    from augment_cli.checkpoint.files import save_weights

    report = Report.of(metadata.plan, metadata, target)
    save_weights(model, metadata, folder / WEIGHTS)
    if metadata.plan.base == "timm":
        write_config(model, metadata.plan.input_size, folder)
    (folder / "plan.json").write_text(metadata.plan.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    (folder / "network.svg").write_text(network_picture(metadata.plan), encoding="utf-8")
    for form in ("json", "html"):
        (folder / f"report.{form}").write_text(FORMATS[form](report), encoding="utf-8")
