"""A task: everything of a run that the engine does not know, from the data to the file that is written."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn

from augment_cli.training.meter import Meter
from augment_cli.training.parameters import Provenance
from augment_cli.training.settings import RunSettings

Row = dict[str, float]


class Batches(Protocol):
    """Batches on the device. The methods that accelerate adds to torch's loader."""

    def __iter__(self) -> Any: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class Chart:
    """A picture of columns of the history over the epochs; `lines` maps a line's name to its column."""

    unit: str
    lines: Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """The column of the history by which an epoch is the best, the highest, and its name in messages; in percent."""

    column: str
    name: str


SettingsT = TypeVar("SettingsT", bound=RunSettings)


class Task(ABC, Generic[SettingsT]):
    """A model and data, opened for a run, and how the one learns from the other.

    Making one opens both; the engine then moves `model` to its device and puts it into training.

    Attributes:
        name: of the kind of task; a checkpoint has it.
        scores: columns of the history that `train_scores` and `validate` give, in order.
        charts: what is drawn of them.
        best: which of them decides.
        sums: how many numbers `loss` gives the meter.
        model: the model in training.
        kinds: each parameter's provenance, by name.
        train: batches to train on.
        images, val_images: how many there are.
    """

    name: ClassVar[str]
    scores: ClassVar[tuple[str, ...]]
    charts: ClassVar[tuple[Chart, ...]]
    best: ClassVar[Metric]
    sums: ClassVar[int]

    model: nn.Module
    kinds: dict[str, Provenance]
    train: Batches
    images: int
    val_images: int

    @abstractmethod
    def __init__(self, settings: SettingsT, accelerator: Accelerator, resumed: bool) -> None:
        """Open model and data.

        Args:
            resumed: open the model that the run wrote last.

        Raises:
            AugmentError: one of them cannot be opened, or they contradict each other.
        """
        self.settings, self.accelerator = settings, accelerator

    @abstractmethod
    def describe(self) -> list[str]:
        """The model and its source, a line each."""

    @abstractmethod
    def set_epoch(self, epoch: int) -> None:
        """Tell the data the epoch, of which augmentation depends."""

    @abstractmethod
    def loss(self, model: nn.Module, images: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """The loss of a batch, a scalar, and what the meter sums (`sums`,): loss times images first, images last."""

    @abstractmethod
    def validate(self, model: nn.Module) -> Row:
        """Scores of a model on the validation data, from all processes together. Modules get their mode back."""

    @abstractmethod
    def train_scores(self, meter: Meter) -> Row:
        """The columns of the history that come from training."""

    @abstractmethod
    def running(self, meter: Meter) -> str:
        """The epoch so far, in a few words."""

    @abstractmethod
    def summary(self, row: Row) -> str:
        """A finished epoch, in a line."""

    @abstractmethod
    def write(self, model: nn.Module, folder: Path, name: str) -> None:
        """Write a model as `name`, "best" or "last", into the run's folder.

        Raises:
            AugmentError: it cannot be written.
        """

    def core(self, model: nn.Module) -> nn.Module:
        """The part of a model that is compiled, and recomputed with gradient checkpointing."""
        return model

    def corrupt_names(self) -> list[str]:
        """Images that this process could not read so far."""
        return []

    def check_resumed(self, position: tuple[int, int, int], before: SettingsT) -> None:
        """Refuse to go on where the data would come in another order; the engine has checked their number.

        Raises:
            AugmentError: says how to go on.
        """
