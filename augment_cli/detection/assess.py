"""Train and evaluate detectors, both given by name, as `augment detect` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from augment_cli.detection.build import settings_of
from augment_cli.detection.coco import read_annotations
from augment_cli.detection.data import DetectionImages, check_pycocotools, make_loader
from augment_cli.detection.files import load_detector
from augment_cli.detection.pictures import draw_examples
from augment_cli.detection.precision import Precision, average_precision, predict
from augment_cli.detection.run_settings import DetectionSettings
from augment_cli.detection.task import Detection
from augment_cli.errors import InputError, enough_memory
from augment_cli.files import write_file
from augment_cli.seeds import preserved
from augment_cli.specs import OnCorrupt
from augment_cli.training.accelerators import one_accelerator
from augment_cli.training.finetune import finetune as run


def finetune(settings: DetectionSettings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Train a detector as the settings say; results go to their output folder.

    The folder gets `best.safetensors` and `last.safetensors`, detectors as `augment_cli.load` reads them; `summary.csv`
    and `curves.png`; `examples.png`, images with true boxes and those found; and what a resume needs.

    Args:
        resume: go on from the checkpoint in the folder. Settings outside `settings.fixed` may differ from before.
        overwrite: replace a run that is in the folder.

    Raises:
        AugmentError: bad settings, model, data or checkpoint. Files written before stay.
    """
    run(settings, resume=resume, overwrite=overwrite, task=Detection)


@dataclass(frozen=True)
class Assessment:
    """A detector's file, the data to evaluate it on, and how: the options of `augment detect evaluate`."""

    model: str
    data: str
    split: str = "validation"
    img_size: tuple[int, int] | None = None
    batch_size: int = 4
    workers: int = 4
    on_corrupt: OnCorrupt = "fail"
    pictures: Path | None = None
    cpu: bool = False


@dataclass(frozen=True)
class Result:
    """Average precision of boxes, and of masks where the detector draws them; images, notes on the data."""

    images: int
    boxes: Precision
    masks: Precision | None
    notes: list[str]
    corrupt: list[str]


def assess(asked: Assessment) -> Result | None:
    """Evaluate a detector. Returns None in all processes but the first.

    Raises:
        AugmentError: detector or data cannot be opened, or have different classes.
    """
    check_pycocotools(Path(asked.data))
    model: Any = load_detector(Path(asked.model))
    settings = settings_of(model)
    annotations = read_annotations(Path(asked.data), asked.split)
    if settings is None or settings.classes != annotations.classes:
        own = settings.classes if settings else ()
        raise InputError(
            f"{asked.model} finds {len(own)} classes ({', '.join(own[:5])}{', ...' if len(own) > 5 else ''}), and "
            f"{annotations.file} has {len(annotations.classes)} others: fine-tune it on these data first"
        )
    if asked.img_size:
        model.transform.min_size, model.transform.max_size = (asked.img_size[0],), asked.img_size[1]
    images = DetectionImages(annotations, on_corrupt=asked.on_corrupt)
    doing, less = f"evaluating with `batch_size={asked.batch_size}`", "a smaller `batch_size` or `img_size`"
    with enough_memory(doing, less), preserved(), one_accelerator(cpu=asked.cpu) as accelerator:
        batches = make_loader(images, asked.batch_size, asked.workers, accelerator)
        found = predict(model.to(accelerator.device), batches, accelerator, settings.first_label)
        if not accelerator.is_main_process:
            return None
    if asked.pictures is not None:
        records = annotations.records[:4]
        write_file(asked.pictures, lambda path: draw_examples(path, records, found, settings))
    masks = average_precision(annotations, found, "segm") if settings.kind == "mask-rcnn" else None
    notes = [f"{count:,} {what}" for what, count in annotations.left_out.items()]
    boxes = average_precision(annotations, found)
    return Result(len(images), boxes, masks, notes, images.corrupt_names())
