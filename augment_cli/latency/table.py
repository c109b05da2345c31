"""The times that were measured for one model, machine and setting, kept in the user's cache folder.

A file is named by what its times depend on. It is held against bounds as any file from outside, and one that is damaged
in any way is as good as none.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from augment_cli.analysis.cache import folder, keep, kept
from augment_cli.analysis.facts import Source
from augment_cli.analysis.site import ConvSite
from augment_cli.bounds import Name, Sha256
from augment_cli.errors import AugmentError
from augment_cli.latency.bench import Pass, Variant
from augment_cli.operators import Split, get_operator
from augment_cli.planning.latency import LatencySettings, Measured, SiteTimes, Spread, Time, Times, splits_digest
from augment_cli.planning.plan import SitePlan

# What a convolution's time does not depend on: where it stands, what it is called, and what is said of it.
_PLACE = ("name", "params", "stage", "block", "block_index", "reads_image", "stem", "pyramid", "norm", "obstacle")

_Share = Annotated[float, Field(ge=0, le=1e6)]


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Entry(_Kept):
    """A time and its standard error, as shares of the source's pass; of a split, or of the convolution itself."""

    operator: Name = ""
    split: dict[Name, int] = Field(default_factory=dict, max_length=20)
    value: _Share
    error: _Share
    samples: Annotated[int, Field(ge=1, le=10**9)] = 1

    def merged(self, other: "_Entry") -> "_Entry":
        """Both, weighted by their samples: what was chosen for being measured short is measured again, and grows."""
        ours, theirs, samples = self.samples, other.samples, self.samples + other.samples
        value = (self.value * ours + other.value * theirs) / samples
        error = ((self.error * ours) ** 2 + (other.error * theirs) ** 2) ** 0.5 / samples
        return self.model_copy(update={"value": value, "error": error, "samples": samples})


class Table(_Kept):
    """Times of a source, of its sites by shape, and of plans as wholes by their splits.

    source: nanoseconds of a pass; None before anything was measured. Times of sites are kept as shares of the source's
    in the same rounds: what a machine's drift does not move. settled: digests of questions whose answer is among the
    splits that were measured.
    """

    source: Annotated[float, Field(gt=0, le=1e15)] | None = None
    before: dict[Name, _Entry] = Field(default_factory=dict, max_length=10_000)
    splits: dict[Name, list[_Entry]] = Field(default_factory=dict, max_length=10_000)
    wholes: dict[Name, Measured] = Field(default_factory=dict, max_length=10_000)
    settled: list[Sha256] = Field(default_factory=list, max_length=10_000)

    def has(self, site: ConvSite, planned: SitePlan) -> bool:
        """Whether the time of a site's split is known."""
        split = asdict(planned.split)
        entries = self.splits.get(shape_of(site), ())
        return any(entry.operator == planned.operator and entry.split == split for entry in entries)

    def add_sites(
        self, sites: Mapping[str, ConvSite], variants: Sequence[Variant], rounds: Sequence[Sequence[Pass]]
    ) -> None:
        """Take in rounds of `Bench.time_sites`: of the source with `sites`, and of variants."""
        total = _typical([passes[0].total for passes in rounds]).value
        self.source = self.source or total
        by_shape: dict[str, list[Time]] = {}
        for name, site in sites.items():
            of_source = _typical([passes[0].sites.get(name, 0.0) for passes in rounds])
            by_shape.setdefault(shape_of(site), []).append(of_source)
        for shape, times in by_shape.items():
            mean = _mean(times)
            self.before.setdefault(shape, _Entry(value=mean.value / total, error=mean.error / total))
        for (shape, operator, split), times in _changes(sites, variants, rounds).items():
            mean = _mean(times)
            value = max(self.before[shape].value + mean.value / total, 1e-9)
            entry = _Entry(operator=operator, split=asdict(split), value=value, error=mean.error / total)
            self._add(shape, entry.model_copy(update={"samples": len(times) * len(rounds)}))

    def _add(self, shape: str, entry: _Entry) -> None:
        entries = self.splits.setdefault(shape, [])
        for i, known in enumerate(entries):
            if (known.operator, known.split) == (entry.operator, entry.split):
                entries[i] = known.merged(entry)
                return
        entries.append(entry)

    def add_wholes(self, variants: Sequence[Variant], rounds: Sequence[Sequence[Pass]]) -> None:
        """Take in rounds of `Bench.time_models`."""
        before = [passes[0].total for passes in rounds]
        for i, variant in enumerate(variants, 1):
            after = [passes[i].total for passes in rounds]
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            spreads = {"before": Spread.of(before), "after": Spread.of(after), "ratio": Spread.of(ratios)}
            self.wholes[splits_digest(variant)] = Measured(**spreads, rounds=len(rounds))

    def times(
        self, settings: LatencySettings, machine: str, sites: Iterable[ConvSite], only_measured: bool = False
    ) -> Times:
        """The times of sites that were measured, in nanoseconds."""
        source = self.source or 0.0
        by_shape = {shape: self.site_times(shape, source) for shape in self.before}
        named = {site.name: by_shape[shape_of(site)] for site in sites if shape_of(site) in by_shape}
        return Times(settings, machine, round(source), named, only_measured)

    def site_times(self, shape: str, source: float) -> SiteTimes:
        """Times of the splits that were measured for a convolution's shape; `source` scales shares to times."""
        splits: dict[str, dict[Split, Time]] = {}
        for entry in self.splits.get(shape, ()):
            split = get_operator(entry.operator).parse(entry.split)
            splits.setdefault(entry.operator, {})[split] = Time(entry.value * source, entry.error * source)
        before = self.before[shape]
        return SiteTimes(Time(before.value * source, before.error * source), splits)


def _changes(
    sites: Mapping[str, ConvSite], variants: Sequence[Variant], rounds: Sequence[Sequence[Pass]]
) -> dict[tuple[str, str, Split], list[Time]]:
    """By shape, operator and split: how many nanoseconds longer than the source's each site of the variants took."""
    found: dict[tuple[str, str, Split], list[Time]] = {}
    for i, variant in enumerate(variants, 1):
        for planned in variant:
            name = planned.name
            each = [passes[i].sites.get(name, 0.0) - passes[0].sites.get(name, 0.0) for passes in rounds]
            key = shape_of(sites[name]), planned.operator, planned.split
            found.setdefault(key, []).append(_typical(each))
    return found


def _typical(values: Sequence[float]) -> Time:
    """The median, since those of the sites add up to the model's; its error by the interquartile range."""
    low, median, high = np.quantile(np.array(values), (0.25, 0.5, 0.75)).tolist()
    return Time(median, (high - low) / len(values) ** 0.5)


def _mean(times: Sequence[Time]) -> Time:
    """The mean over equal sites; their errors are not independent, as they share the rounds."""
    return Time(sum(t.value for t in times) / len(times), sum(t.error for t in times) / len(times))


def shape_of(site: ConvSite) -> str:
    """A key that equal convolutions share, wherever they stand in the model."""
    known = {field.name: getattr(site, field.name) for field in fields(site) if field.name not in _PLACE}
    return json.dumps(known, sort_keys=True)


def table_file(source: Source, settings: LatencySettings, machine: str) -> Path | None:
    """Where the table of a timm model is kept; None for other models, and where the user does without a cache."""
    at = folder()
    if at is None or source.base != "timm":
        return None
    known = settings.model_dump(exclude={"seconds"})
    question = json.dumps([source.name, source.args, source.input_size, known, machine, _versions()], sort_keys=True)
    return at / "latency" / f"{hashlib.sha256(question.encode()).hexdigest()}.json"


@cache
def _versions() -> list[str]:
    """timm's version, and a digest of the code that is timed and that times it."""
    code, package = hashlib.sha256(), Path(__file__).parents[1]
    for room in ("layers", "operators", "latency"):
        for file in sorted((package / room).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                code.update(file.read_bytes())
    return [version("timm"), code.hexdigest()]


def read_table(file: Path | None) -> Table:
    """The table in a file; an empty one where there is none, or it is not whole and valid."""
    text = kept(file) if file else None
    if text is None:
        return Table()
    try:
        table = Table.model_validate_json(text)
        for shape in table.before:
            table.site_times(shape, 1.0)
    except (AugmentError, ValueError, RecursionError):
        return Table()
    return table


def write_table(file: Path | None, table: Table) -> None:
    """Keep a table, where it is to be kept."""
    if file:
        keep(file, table.model_dump_json())
