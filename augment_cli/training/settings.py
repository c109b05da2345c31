"""The settings of a fine-tuning run: one frozen object, written beside the results. Imports nothing heavy."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from augment_cli.errors import AugmentError, boundary, nearest
from augment_cli.files import read_text
from augment_cli.specs import OnCorrupt

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["cosine", "tanh", "poly", "step", "wsd", "rsqrt", "constant"]
_CHOICES = {
    "on_corrupt": get_args(OnCorrupt),
    "loss": ("ce", "bce"),
    "schedule": get_args(Schedule),
    "precision": get_args(Precision),
}


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run of any task."""

    model: str
    data: str
    output: str

    # The model's weights, where MODEL is a timm model's name.
    pretrained: bool = False
    checkpoint: str | None = None
    ema: bool | None = None
    model_args: dict[str, Any] = field(default_factory=dict)

    # Data.
    train_split: str = "train"
    val_split: str = "validation"
    workers: int = 4
    on_corrupt: OnCorrupt = "fail"

    # Optimisation. Lengths in epochs; batch_size is of one process and one step of accumulation.
    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    opt: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    clip_grad: float = 1.0
    schedule: str = "cosine"
    warmup_epochs: float = 1.0
    min_lr: float = 0.0
    ema_decay: float = 0.0
    patience: int = 0

    # Learning rates by provenance.
    lr_carried: float = 1.0
    lr_fitted: float = 10.0
    lr_new: float = 1.0
    layer_decay: float = 1.0
    new_first: int = 0

    # How it runs.
    freeze_norm: bool = False
    sync_norm: bool = False
    precision: str = "no"
    cpu: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    checkpoint_every: str | None = None
    log_with: tuple[str, ...] = ()
    log_every: int = 50

    fixed: ClassVar[tuple[str, ...]] = (
        *("model", "pretrained", "checkpoint", "ema", "model_args", "seed", "train_split"),
        *("batch_size", "accumulate", "opt", "layer_decay", "ema_decay"),
    )
    """Settings that a resumed run keeps, since its checkpoint depends on them. All others may change."""

    def __post_init__(self) -> None:
        for name, least, most in _RANGES:
            value = getattr(self, name, least)
            if not least <= value <= most:
                raise AugmentError(f"`{name}={value}` is not from {least:g} to {most:g}")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name, known[0])) not in known:
                raise AugmentError(f"`{name}={value!r}` is none of {', '.join(known)}")
        if self.freeze_norm and self.sync_norm:
            raise AugmentError(
                "`freeze_norm=True` uses no statistics of batches: leave out `sync_norm`, which averages them"
            )
        if self.new_first > self.epochs:
            raise AugmentError(f"`new_first={self.new_first}` is more than `epochs={self.epochs}`")
        if unknown := next((name for name in self.log_with if name not in TRACKERS), None):
            raise AugmentError(f"`log_with={unknown!r}`: no such tracker{nearest(unknown, TRACKERS)}")
        parse_interval(self.checkpoint_every)

    def inputs(self) -> list[Path]:
        """The files and folders that models are read from."""
        return [Path(name) for name in self._models() if name and Path(name).exists()]

    def _models(self) -> tuple[str | None, ...]:
        return self.model, self.checkpoint

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


@dataclass(frozen=True)
class Settings(RunSettings):
    """A classification run's settings. The defaults suit a converted model that keeps most of its source's weights."""

    base: str | None = None
    num_classes: int | None = None

    # Data.
    val_data: str | None = None
    hold_out: float = 0.0
    data_root: str | None = None
    download: bool = False
    input_key: str | None = None
    target_key: str | None = None
    img_size: tuple[int, int] | None = None

    # Augmentation.
    augmentation: bool = True
    crop_scale: float = 0.7
    flip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float = 0.0

    # Loss.
    loss: str = "ce"
    smoothing: float = 0.1
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    distill: float = 0.5
    temperature: float = 2.0

    fixed: ClassVar[tuple[str, ...]] = (*RunSettings.fixed, "base", "num_classes", "img_size", "hold_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise AugmentError(f"mixup and cutmix pair the images of a batch: `batch_size={self.batch_size}` is odd")

    def _models(self) -> tuple[str | None, ...]:
        return *super()._models(), self.teacher, self.teacher_checkpoint


_MANY = 10**9
_RANGES = (
    ("epochs", 1, _MANY),
    ("batch_size", 1, _MANY),
    ("accumulate", 1, _MANY),
    ("workers", 0, 1024),
    ("hold_out", 0, 0.9),
    ("crop_scale", 0.01, 1),
    ("flip", 0, 1),
    ("random_erasing", 0, 1),
    ("smoothing", 0, 0.99),
    ("distill", 0, 1),
    ("temperature", 0.01, 1000),
    ("ema_decay", 0, 1),
    ("layer_decay", 0.01, 1),
    ("lr", 0, 1000),
    ("lr_carried", 0, 1000),
    ("lr_fitted", 0, 1000),
    ("lr_new", 0, 1000),
    ("clip_grad", 0, _MANY),
    ("weight_decay", 0, 1000),
    ("momentum", 0, 1),
    ("warmup_epochs", 0, _MANY),
    ("min_lr", 0, 1000),
    ("color_jitter", 0, 100),
    ("mixup", 0, 1000),
    ("cutmix", 0, 1000),
    ("new_first", 0, _MANY),
    ("seed", 0, 2**63 - 1),
    ("drop_path", 0, 0.9),
    ("patience", 0, _MANY),
    ("log_every", 1, _MANY),
)


def option(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def parse_interval(text: str | None) -> tuple[int | None, float | None]:
    """Parse how often to write a checkpoint: `200` to (200 updates, None), `10m` to (None, 600 seconds).

    Raises:
        AugmentError: anything else.
    """
    if text is None:
        return None, None
    number = text[:-1] if text[-1:] in ("m", "s") else text
    if not number.isascii() or not number.isdigit() or not int(number):
        raise AugmentError(f"`checkpoint_every={text!r}`: write updates as 200, minutes as 10m, seconds as 30s")
    seconds = {"m": 60.0, "s": 1.0}.get(text[-1])
    return (None, int(number) * seconds) if seconds else (int(number), None)


SettingsT = TypeVar("SettingsT", bound=RunSettings)


def read_settings(path: Path, kind: type[SettingsT]) -> SettingsT:
    """The settings of an earlier run, from its JSON.

    A setting that the file lacks gets its default, and a setting that this version does not know is ignored: the file
    may come from an older or a newer version.

    Raises:
        AugmentError: no such file, no JSON object, or a setting that is missing or not valid.
    """
    text = read_text(path, "settings")
    with boundary(f"{path} cannot be read"):
        data = json.loads(text)
    return settings_of(data, str(path), kind)


def settings_of(data: Any, origin: str, kind: type[SettingsT]) -> SettingsT:
    """Read settings from a JSON value; `origin` names the value in messages.

    Raises:
        AugmentError: no object, or a setting that is missing or not valid.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(data, dict):
        raise AugmentError(f"{origin} does not hold settings: it is not a JSON object")
    known = {entry.name for entry in fields(kind)}
    values = {key: value for key, value in data.items() if key in known}
    with boundary(f"{origin} does not hold the settings of a run"):
        try:
            return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise AugmentError(f"{origin} does not hold the settings of a run: {place}: {first['msg']}") from error
