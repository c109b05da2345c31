"""The operator: everything that the rest of the program asks about the replacement of a convolution.

A third operator is one file: a subclass of `Operator` with the decorator `register`. Planning, surgery, reports and
training know operators by this class alone. Modules are built by torch, which a built-in operator imports only when it
builds, so that a plan can be made without it.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter

from augment_cli.analysis.site import Convolution, ConvSite

if TYPE_CHECKING:
    from torch import nn


class Table(BaseModel):
    """A table of a recipe: its keys are the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Settings(BaseModel):
    """The tables that an operator reads of a recipe: each field is a `Table`, and its name is the table's."""


@dataclass(frozen=True, slots=True, order=True)
class Split:
    """The replacement of one site, in numbers. Fields are whole numbers, as a plan's JSON holds them."""

    __pydantic_config__ = ConfigDict(extra="forbid")


SettingsT = TypeVar("SettingsT", bound=Settings)
SplitT = TypeVar("SplitT", bound=Split)


class Operator(ABC, Generic[SettingsT, SplitT]):
    """A kind of replacement for convolutions.

    Attributes:
        name: as recipes and plans write it.
        title: what a converted convolution is, in words; completes "convolutions become ...".
        papers: where the operator comes from; `reading` is a note for reports, of what is not the paper's own.
        settings_type, split_type: classes of `settings` and `split` everywhere below.
        advice: ends the message that a budget cannot be met.
        legend: sentences that explain the columns of `columns` under a table.
        fittable: `build` gives an AAConv2d, whose attention can be fitted to the filters that it replaces.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    papers: ClassVar[tuple[str, ...]] = ()
    reading: ClassVar[str] = ""
    settings_type: ClassVar[type[Settings]]
    split_type: ClassVar[type[Split]]
    advice: ClassVar[str] = "More sites would help"
    legend: ClassVar[tuple[str, ...]] = ()
    fittable: ClassVar[bool] = False

    # Which convolutions it can replace, and by what.

    def obstacle(self, site: ConvSite) -> str | None:
        """Why the operator cannot take this convolution's place under any settings; None where it can."""
        return None

    @abstractmethod
    def written(self, site: ConvSite, settings: SettingsT) -> SplitT | None:
        """The split that a recipe asks for at this site; None where there is none, and `refusal` says why."""

    def refusal(self, site: ConvSite, settings: SettingsT) -> str:
        """Why `written` found no split."""
        return f"the settings of {self.name} leave nothing to do here"

    def idle(self, site: Convolution, split: SplitT) -> str | None:
        """Why this split would be of no use at this site; None where it is of use."""
        return None

    def check(self, site: Convolution, split: SplitT) -> None:
        """Refuse a split, of whatever origin, that this convolution cannot have.

        Raises:
            ValueError: names the numbers that do not fit.
        """

    # What a budget chooses from.

    def splits(self, site: ConvSite, settings: SettingsT, written: SplitT) -> tuple[SplitT, ...]:
        """The splits that a budget may choose from, `written` among them."""
        return (written,)

    def distance(self, site: ConvSite, split: SplitT, written: SplitT) -> float:
        """How far a split is from the written one; 0 for itself."""
        return 0.0 if split == written else 1.0

    def distance_left(self, site: ConvSite, written: SplitT) -> float | None:
        """How far it is from the written split to leave the convolution as it is; None: no budget leaves it."""
        return None

    def rank(self, split: SplitT) -> Any:
        """A key to sort splits by: the more a split changes, the later it comes."""
        return self.given_up(split)

    @abstractmethod
    def params(self, site: Convolution, split: SplitT) -> int:
        """Parameters of the module that `build` makes."""

    @abstractmethod
    def macs(self, site: Convolution, split: SplitT) -> int:
        """Multiply-adds of all calls of that module, for one image, as torch.utils.flop_counter counts them."""

    def given_up(self, split: SplitT) -> int:
        """Output channels that the source's filters no longer compute. 0: the module starts as its source computes."""
        return 0

    # The module.

    @abstractmethod
    def build(self, conv: "nn.Conv2d", site: Convolution, split: SplitT, kept: list[int]) -> "nn.Module":
        """The module for a convolution's place. The source's own tensors are taken over, not copied.

        Args:
            conv: the source's convolution, on any device.
            kept: the filters that stay, ascending; all but `given_up(split)`.
        """

    @abstractmethod
    def added(self, module: "nn.Module") -> list[str]:
        """Names, within a module of `build`, of the parameters that its source did not have."""

    # How a split reads.

    def columns(self, split: SplitT) -> dict[str, str]:
        """A split in a table, by the columns' titles."""
        return {name.replace("_", " ").capitalize(): str(value) for name, value in asdict(split).items()}

    def describe(self, split: SplitT) -> str:
        """A split in words, as a part of a sentence."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(split).items())

    def ratios(self, site: Convolution, split: SplitT) -> dict[str, float]:
        """Named ratios to the output channels, for a report's summary."""
        return {}

    # For plans' JSON.

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.split_type)

    def parse(self, split: Any) -> SplitT:
        """A validated split out of a JSON object, or a split as it is.

        Raises:
            pydantic.ValidationError: not a split of this operator.
        """
        return self._adapter.validate_python(split)
