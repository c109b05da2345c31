"""Detection: the second task of the training engine."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn

from augment_cli.checkpoint.metadata import attach, metadata_of
from augment_cli.detection.build import assemble, make_settings, settings_of
from augment_cli.detection.coco import read_annotations
from augment_cli.detection.data import DetectionImages, check_pycocotools, check_same_categories, make_loader
from augment_cli.detection.files import build, load_detector, save_detector
from augment_cli.detection.pictures import draw_examples
from augment_cli.detection.precision import Found, average_precision, predict
from augment_cli.detection.pyramid import open_body
from augment_cli.detection.run_settings import DetectionSettings
from augment_cli.detection.settings import TWO_STAGES, Anchors, DetectorSettings, Kind
from augment_cli.errors import InputError
from augment_cli.files import write_file
from augment_cli.formats import DETECTOR_KEY, read_tensor_metadata
from augment_cli.planning.recipe import describe_errors
from augment_cli.training.meter import Meter
from augment_cli.training.models import FINETUNED
from augment_cli.training.parameters import Provenance
from augment_cli.training.task import Chart, Metric, Row, Task

_EXAMPLES = 4

# Parts of torchvision's detectors that have a row for every class.
_OF_CLASSES = ("head.classification_head.cls_logits", "roi_heads.box_predictor", "roi_heads.mask_predictor")


class Detection(Task[DetectionSettings]):
    """The task of `augment detect finetune`."""

    name = "detection"
    scores = ("train_loss", "val_ap", "val_ap50", "val_ap75")
    charts = (
        Chart("loss", {"train": "train_loss"}),
        Chart("AP, %", {"AP": "val_ap", "AP50": "val_ap50", "AP75": "val_ap75"}),
    )
    best = Metric("val_ap", "AP")
    sums = 2

    def __init__(self, settings: DetectionSettings, accelerator: Accelerator, resumed: bool) -> None:
        super().__init__(settings, accelerator, resumed)
        folder = Path(settings.data)
        check_pycocotools(folder)
        train, val = (read_annotations(folder, split) for split in (settings.train_split, settings.val_split))
        check_same_categories(train, val)
        if not val.things:
            raise InputError(f"{val.file} has no boxes: there is nothing to validate on")
        self.notes = [
            f"{split.file.name}: {n:,} {what}" for split in (train, val) for what, n in split.left_out.items()
        ]
        if resumed:
            self.model: Any = load_detector(Path(settings.output) / "last.safetensors")
            self.kinds = dict.fromkeys(dict(self.model.named_parameters()), "carried")
        else:
            self.model, self.kinds = open_detector(settings, train.classes, train.category_ids)
        self.detector = _settings(self.model)
        options: Any = {"first_label": self.detector.first_label, "masks": self.detector.kind == "mask-rcnn"}
        options |= {"on_corrupt": settings.on_corrupt, "seed": settings.seed}
        self.data = DetectionImages(train, flip=settings.flip, crop_scale=settings.crop_scale, **options)
        self.val_data = DetectionImages(val, **{**options, "masks": False})
        self.images, self.val_images = len(self.data), len(self.val_data)
        self.train = make_loader(self.data, settings.batch_size, settings.workers, accelerator, settings.seed)
        self.val = make_loader(self.val_data, settings.batch_size, settings.workers, accelerator)
        self.found: Found = {}

    def describe(self) -> list[str]:
        detector = self.detector
        plan = metadata_of(self.model)
        converted = f" ({plan.plan.recipe})" if plan else ""
        return [f"{detector.kind} on {detector.model}{converted}, {len(detector.classes)} classes", *self.notes]

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def loss(self, model: nn.Module, images: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The sum of the detector's losses, and (2,): that times images, images."""
        losses = model(list(images), list(targets))
        loss = torch.stack([part.float() for part in losses.values()]).sum()
        count = torch.full((), float(len(targets)), device=loss.device)  # torch.tensor would wait for the device
        return loss, torch.stack([loss.detach() * count, count])

    def validate(self, model: nn.Module) -> Row:
        self.found = predict(model, self.val, self.accelerator, self.detector.first_label)
        precision = average_precision(self.val_data.annotations, self.found)
        return {"val_ap": precision.ap, "val_ap50": precision.ap50, "val_ap75": precision.ap75}

    def train_scores(self, meter: Meter) -> Row:
        return {"train_loss": meter.loss}

    def running(self, meter: Meter) -> str:
        return f"loss {meter.loss:.4f}"

    def summary(self, row: Row) -> str:
        scores = f"AP {row['val_ap']:.2f}%, AP50 {row['val_ap50']:.2f}%, AP75 {row['val_ap75']:.2f}%"
        return f"train loss {row['train_loss']:.4f}; validation {scores}"

    def write(self, model: nn.Module, folder: Path, name: str) -> None:
        save_detector(model, folder / f"{name}.safetensors")
        if name == "best" and self.found:
            records = self.val_data.annotations.records[:_EXAMPLES]
            write_file(folder / "examples.png", lambda path: draw_examples(path, records, self.found, self.detector))

    def core(self, model: nn.Module) -> nn.Module:
        """The backbone: what follows it loops over boxes, whose number varies."""
        return model.get_submodule("backbone")

    def corrupt_names(self) -> list[str]:
        return [*self.data.corrupt_names(), *self.val_data.corrupt_names()]


def open_detector(
    settings: DetectionSettings, classes: tuple[str, ...], ids: tuple[int, ...]
) -> tuple[Any, dict[str, Provenance]]:
    """A run's detector for these classes, and its parameters' provenance.

    MODEL is a detector's file, which keeps all weights that fit the classes, or what `detection.backbone` takes.

    Raises:
        AugmentError: there is no such model, or a setting that its file decides.
    """
    if is_detector(settings.model):
        return _reopen(settings, classes, ids)
    kind = settings.detector
    if kind is None:
        raise InputError(f"{settings.model} is no detector: which one is it to be in? Give `detector='retinanet'`")
    body = open_body(
        settings.model,
        settings.levels,
        (4, 8, 16, 32) if kind in TWO_STAGES else (8, 16, 32),
        pretrained=settings.pretrained,
        checkpoint=settings.checkpoint,
        ema=settings.ema,
        args=settings.model_args,
        seed=settings.seed,
    )
    random = set(body.kinds.values()) == {"new"}
    made = make_settings(
        body,
        kind=kind,
        classes=classes,
        category_ids=ids,
        norm=settings.norm or ("batch" if random else "frozen"),
        anchors=_anchors(settings, kind),
        channels=settings.channels,
        min_size=settings.min_sizes(),
        max_size=settings.img_size[1],
    )
    model = assemble(made, body, settings.seed)
    prefix = "backbone.body."
    names = [name for name, _ in model.named_parameters()]
    kinds: dict[str, Provenance] = {
        name: body.kinds.get(name.removeprefix(prefix), "new") if name.startswith(prefix) else "new" for name in names
    }
    return _marked(model, settings), kinds


def is_detector(spec: str) -> bool:
    """Whether a model's spec is the file of a detector."""
    path = Path(spec)
    return path.is_file() and path.suffix == ".safetensors" and DETECTOR_KEY in read_tensor_metadata(path)


def _reopen(
    settings: DetectionSettings, classes: tuple[str, ...], ids: tuple[int, ...]
) -> tuple[Any, dict[str, Provenance]]:
    """A detector's file for other data. Heads whose classes changed begin anew."""
    model = load_detector(Path(settings.model))
    own = _settings(model)
    for name in ("levels", "norm", "anchor_base", "anchor_scales", "anchor_ratios", "pretrained", "checkpoint"):
        if getattr(settings, name):
            raise InputError(f"{settings.model} is a detector, whose file decides this: leave out `{name}`")
    if settings.detector not in (None, own.kind):
        raise InputError(f"{settings.model} is a {own.kind}: leave out `detector`")
    sizes = {"min_size": settings.min_sizes(), "max_size": settings.img_size[1]}
    made = own.model_copy(update={"classes": classes, "category_ids": ids, **sizes})
    other = build(made, metadata_of(model))
    shapes = {key: value.shape for key, value in other.state_dict().items()}
    kept = {
        key: value
        for key, value in model.state_dict().items()
        if shapes[key] == value.shape and (classes == own.classes or not key.startswith(_OF_CLASSES))
    }
    other.load_state_dict(kept, strict=False)
    kinds: dict[str, Provenance] = {name: "carried" if name in kept else "new" for name, _ in other.named_parameters()}
    return _marked(other, settings), kinds


def _anchors(settings: DetectionSettings, kind: Kind) -> Anchors | None:
    values = {"base": settings.anchor_base, "scales": settings.anchor_scales, "ratios": settings.anchor_ratios}
    given = {key: value for key, value in values.items() if value is not None}
    if not given:
        return None
    default = {"scales": 1} if kind in TWO_STAGES else {}
    try:
        return Anchors.model_validate(default | given)
    except ValidationError as error:
        raise InputError(f"the anchors: {describe_errors(error, Anchors)}") from error


def _settings(model: nn.Module) -> DetectorSettings:
    settings = settings_of(model)
    if settings is None:
        raise InputError(f"{type(model).__name__} is no detector of augment_cli.detection")
    return settings


def _marked(model: Any, settings: DetectionSettings) -> Any:
    """Add to the metadata of a converted backbone that its weights were fine-tuned."""
    metadata = metadata_of(model)
    if metadata is not None and FINETUNED not in metadata.weights:
        weights = f"{metadata.weights}, {FINETUNED} {Path(settings.data).name}"
        attach(model, metadata.model_copy(update={"weights": weights}))
    return model
