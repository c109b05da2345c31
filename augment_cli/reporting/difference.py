"""Two models beside each other: what their sites become, which tensors moved how far, and how far they agree."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from augment_cli.reporting.comparison import Comparison
from augment_cli.reporting.sheet import Column, Sheet, Sheets
from augment_cli.reporting.text import cell
from augment_cli.reporting.units import counted, divergence, share

SCHEMA = 1
_MOST_SHOWN = 10

Kind = Literal["carried", "fitted", "new", "buffer"]
"""Provenance of a parameter, or a buffer, such as a normalisation's running mean."""

State = Literal["equal", "moved", "only here", "only there", "another shape"]


@dataclass(frozen=True)
class TensorChange:
    """A tensor of two models. norm: of the first model's, squared; change: of the difference, squared.

    Both are 0 unless the state is equal or moved, and for whole numbers, which have no distance.
    """

    name: str
    kind: Kind
    values: int
    state: State
    norm: float = 0.0
    change: float = 0.0

    @property
    def distance(self) -> float | None:
        """Norm of the difference over the norm of the first model's tensor; None where there is no such number."""
        if self.state == "equal":
            return 0.0
        return distance([self]) if self.state == "moved" and self.change else None


def distance(tensors: Iterable[TensorChange]) -> float | None:
    """The relative distance of several tensors together."""
    tensors = tuple(tensors)
    norm, change = (math.fsum(getattr(tensor, key) for tensor in tensors) for key in ("norm", "change"))
    return math.sqrt(change / norm) if norm else (0.0 if not change else None)


@dataclass(frozen=True)
class Agreement:
    """Two models on `images` images: the share with the same first class, and KL(first, second) in nats, on average."""

    images: int
    agreement: float
    divergence: float


@dataclass(frozen=True, repr=False)
class Difference(Sheets):
    """The difference of two models by name: their plans, their tensors, and their predictions where asked for.

    `str` gives the tables that `augment diff` shows.
    """

    first: str
    second: str
    plans: Comparison
    tensors: tuple[TensorChange, ...]
    agreement: Agreement | None = None

    @property
    def heading(self) -> str:
        return f"{self.first} and {self.second}"

    def sheets(self, full: bool = False) -> Iterator[Sheet]:
        yield from self.plans.sheets(full)
        yield self._by_kind()
        yield from self._furthest(full)
        if self.agreement:
            columns = Column("Images"), Column("Agree"), Column("KL, nats")
            row = f"{self.agreement.images:,}", share(self.agreement.agreement), divergence(self.agreement.divergence)
            yield Sheet("Predictions", columns, (row,))

    def _by_kind(self) -> Sheet:
        kinds: dict[Kind, list[TensorChange]] = defaultdict(list)
        for tensor in self.tensors:
            kinds[tensor.kind].append(tensor)
        titles = ("Tensors", "Values", "Equal", "Moved", "Only in one", "Distance")
        columns = Column("Provenance", is_text=True), *map(Column, titles)
        rows = tuple((kind, *_counts(kinds[kind])) for kind in ("carried", "fitted", "new", "buffer") if kind in kinds)
        note = "Distance is the norm of the change over the norm of the first model's tensors."
        return Sheet("Tensors by provenance", columns, rows, note)

    def _furthest(self, full: bool) -> Iterator[Sheet]:
        """The tensors that moved furthest, then those that only one model has or that differ in shape."""
        moved = sorted((t for t in self.tensors if t.state == "moved"), key=lambda t: -(t.distance or 0))
        apart = [tensor for tensor in self.tensors if tensor.state not in ("moved", "equal")]
        text = Column("Tensor", is_text=True), Column("Provenance", is_text=True)
        places = {"only here": self.first, "only there": self.second}
        for title, tensors, column in (
            ("moved", moved, Column("Distance")),
            ("in one model only, or of another shape", apart, Column("Where", is_text=True)),
        ):
            shown = tensors if full else tensors[:_MOST_SHOWN]
            rows = tuple((t.name, t.kind, places.get(t.state, t.state) if t in apart else _distance(t)) for t in shown)
            some = f"; the first {len(shown)}" if len(shown) < len(tensors) else ""
            if rows:
                yield Sheet(f"{counted(len(tensors), 'tensor')} {title}{some}", (*text, column), rows)

    def data(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "first": self.first,
            "second": self.second,
            "plans": self.plans.data(),
            "tensors": [
                {"name": t.name, "kind": t.kind, "values": t.values, "state": t.state, "distance": t.distance}
                for t in self.tensors
            ],
            "agreement": asdict(self.agreement) if self.agreement else None,
        }

    def rows(self) -> list[dict[str, Any]]:
        return [tensor | {"name": cell(tensor["name"])} for tensor in self.data()["tensors"]]


def _counts(tensors: list[TensorChange]) -> tuple[str, ...]:
    states = [tensor.state for tensor in tensors]
    apart = len(tensors) - states.count("equal") - states.count("moved")
    both = [tensor for tensor in tensors if tensor.state in ("equal", "moved")]
    far = distance(both) if both else None
    counts = len(tensors), sum(tensor.values for tensor in tensors), states.count("equal"), states.count("moved"), apart
    return (*(f"{count:,}" for count in counts), "-" if far is None else divergence(far))


def _distance(tensor: TensorChange) -> str:
    return "-" if tensor.distance is None else divergence(tensor.distance)
