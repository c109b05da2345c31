"""Evaluate a model on data, both given by name, as `augment evaluate` does."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from augment_cli.dataset import open_dataset
from augment_cli.errors import AugmentError, enough_memory
from augment_cli.files import write_file
from augment_cli.reporting.style import COUNTS, picture
from augment_cli.seeds import preserved
from augment_cli.specs import OnCorrupt
from augment_cli.training.accelerators import one_accelerator
from augment_cli.training.data import Data, data_config, evaluation_loader
from augment_cli.training.evaluate import Scores, evaluate
from augment_cli.training.models import Opened, label_names, open_companion, open_model

# Classes up to which a confusion matrix is drawn with their names, and with a number in each cell.
_NAMED, _NUMBERED = 40, 12


@dataclass(frozen=True)
class Assessment:
    """A model, the data to evaluate it on, and how: the options of `augment evaluate`."""

    model: str
    data: str
    split: str = "validation"
    data_root: str | None = None
    class_map: Path | None = None
    pretrained: bool = False
    checkpoint: Path | None = None
    ema: bool | None = None
    base: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    against_checkpoint: Path | None = None
    confusion: bool = False
    input_key: str | None = None
    target_key: str | None = None
    img_size: tuple[int, int] | None = None
    batch_size: int = 64
    workers: int = 4
    on_corrupt: OnCorrupt = "fail"
    cpu: bool = False


@dataclass(frozen=True)
class Result:
    """Scores, the classes' names, images that could not be read, and which weights of a checkpoint were taken."""

    scores: Scores
    classes: list[str]
    corrupt: list[str]
    weights: str | None = None


def assess(asked: Assessment) -> Result | None:
    """Evaluate. Returns None in all processes but the first.

    Raises:
        AugmentError: model or data cannot be opened, or have different numbers of classes.
    """
    doing, less = f"evaluating with `batch_size={asked.batch_size}`", "a smaller `batch_size` or `img_size`"
    with enough_memory(doing, less), preserved(), one_accelerator(cpu=asked.cpu) as accelerator:
        return _assess(asked, accelerator)


def _assess(asked: Assessment, accelerator: Accelerator) -> Result | None:
    opened = open_model(
        asked.model,
        pretrained=asked.pretrained,
        weights=asked.checkpoint,
        ema=asked.ema,
        base=asked.base,
        args=asked.model_args,
    )
    data = _data(asked, opened)
    other = _other(asked, opened)
    config = data_config(opened.model, opened.input_size, asked.img_size)
    loader = evaluation_loader(data, asked.batch_size, asked.workers, config, accelerator)
    scores = evaluate(
        opened.model.to(accelerator.device),
        loader,
        accelerator,
        other=None if other is None else other.model.to(accelerator.device),
        num_classes=opened.num_classes if asked.confusion else None,
    )
    corrupt = sorted(set(gather_object(data.corrupt_names())))
    result = Result(scores, _names(data, opened), corrupt, opened.weights)
    return result if accelerator.is_main_process else None


def _data(asked: Assessment, opened: Opened) -> Data:
    classes = _read_map(asked.class_map) if asked.class_map else label_names(asked.model)
    data = open_dataset(
        asked.data,
        split=asked.split,
        classes=classes,
        root=asked.data_root,
        on_corrupt=asked.on_corrupt,
        channels=opened.input_size[0],
        input_key=asked.input_key,
        target_key=asked.target_key,
    )
    if data.classes is not None and len(data.classes) != opened.num_classes:
        raise AugmentError(
            f"data {asked.data} have {len(data.classes)} classes, and {asked.model} has {opened.num_classes}: "
            f"say with `class_map` which of them they are, or fine-tune first"
        )
    return data


def _read_map(path: Path) -> dict[str, int]:
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AugmentError(f"class map {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return {name.strip(): index for index, name in enumerate(names) if name.strip()}


def _other(asked: Assessment, opened: Opened) -> Opened | None:
    if asked.against is None:
        return None
    other = open_companion(asked.against, asked.against_checkpoint)
    if other.num_classes != opened.num_classes:
        raise AugmentError(
            f"{asked.against} has {other.num_classes} classes, and {asked.model} {opened.num_classes}: "
            f"they cannot agree on any"
        )
    return other


def _names(data: Data, opened: Opened) -> list[str]:
    names = {index: name for name, index in (data.classes or {}).items()}
    return [names.get(index, str(index)) for index in range(opened.num_classes)]


def write_confusion(result: Result, path: Path) -> None:
    """Write the confusion matrix, rows true and columns predicted, as a table or as a picture.

    Raises:
        AugmentError: the evaluation made none, or the disk is full or refuses.
    """
    counts, write = result.scores.confusion, _draw if path.suffix == ".png" else _write_csv
    if counts is None:
        raise AugmentError("the evaluation made no confusion matrix: ask for one, `confusion=True`")
    write_file(path, lambda temporary: write(temporary, counts, result.classes))


def _write_csv(path: Path, counts: Tensor, classes: list[str]) -> None:
    import csv

    from augment_cli.reporting.text import cell

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [cell(name) for name in classes]
        writer.writerow(["true \\ predicted", *names])
        for name, row in zip(names, counts.tolist(), strict=True):
            writer.writerow([name, *row])


def _draw(path: Path, counts: Tensor, classes: list[str]) -> None:
    share = (100 * counts.double() / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    with picture(path, 7, 6) as figure:
        axes = figure.subplots()
        image = axes.imshow(share, cmap=COUNTS, vmin=0, vmax=100)
        axes.set(xlabel="predicted", ylabel="true")
        axes.grid(visible=False)
        if len(classes) <= _NAMED:
            axes.set_xticks(range(len(classes)), classes, rotation=90)
            axes.set_yticks(range(len(classes)), classes)
        if len(classes) <= _NUMBERED:
            for (row, column), value in np.ndenumerate(share):
                colour = "white" if value > 50 else "black"
                axes.text(column, row, f"{value:.0f}", color=colour, ha="center", va="center")
        figure.colorbar(image, label="% of the true class")
