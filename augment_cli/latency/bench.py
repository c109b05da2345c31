"""A model and variants of it, run in alternation: what their sites and what they as wholes take, round by round.

A site is timed within its model, by hooks: alone in a loop it would find its input and its weights in the cache, as it
does not in the model. Every round runs all models once, and every other round in reverse, so that what slows the
machine for a while slows all of them.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from augment_cli.compat import tree_leaves
from augment_cli.errors import boundary, enough_memory
from augment_cli.latency.machine import threads
from augment_cli.latency.stopwatch import SiteClock, Stopwatch, stopwatch
from augment_cli.planning.latency import LatencySettings
from augment_cli.planning.plan import SitePlan
from augment_cli.seeds import seeded
from augment_cli.surgery.replace import apply_sites

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

# A median of fewer rounds says nothing, and of more than this hardly more. They may take longer than was asked for.
FEWEST_ROUNDS, MOST_ROUNDS = 3, 60

Variant = Sequence[SitePlan]
"""The sites that a variant replaces."""

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it is done, and how much there is."""

Take = Callable[[], dict[str, float]]
"""Says what the sites of a model took since the last time."""


@dataclass(frozen=True)
class Pass:
    """Nanoseconds of one pass of a model, and of its sites in it by name."""

    total: float
    sites: dict[str, float]


class Bench(Protocol):
    """Runs the source and variants of it; each round has a pass of the source and one of each variant, in order."""

    def pass_seconds(self) -> float:
        """About how long a pass of the source takes."""

    def time_sites(self, names: Sequence[str], variants: Sequence[Variant], seconds: float) -> list[list[Pass]]: ...
    def time_models(self, variants: Sequence[Variant], seconds: float) -> list[list[Pass]]: ...


class ModelBench:
    """The bench of a torch model.

    Args:
        model: the source, with any weights; it is not changed.
        settings: with a number of threads, and a device that is there.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: tuple[int, int, int],
        settings: LatencySettings,
        progress: Progress | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self.settings, self.progress = settings, progress
        self.watch: Stopwatch = watch or stopwatch(settings.device)
        self.model = copy.deepcopy(model).to(settings.device).requires_grad_(True)
        images = torch.randn(settings.batch, *input_size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(settings.device)

    def pass_seconds(self) -> float:
        """Seconds of a pass of the source, after another one in which kernels may be compiled."""
        model = self._variant(())
        with threads(self.settings.threads), seeded("latency"), boundary(self.settings.describe()):
            self._timed(model, _nothing)
            return self._timed(model, _nothing).total / 1e9

    def time_sites(self, names: Sequence[str], variants: Sequence[Variant], seconds: float) -> list[list[Pass]]:
        """Time the sites `names` in the source, and in each variant those that it replaces, for about `seconds`."""
        timed = [(self._variant(()), names), *((self._variant(v), [site.name for site in v]) for v in variants)]
        clocks = [SiteClock(model, own, self.watch) for model, own in timed]
        runs = [(model, clock.take) for (model, _), clock in zip(timed, clocks, strict=True)]
        return self._rounds("timing sites", runs, seconds)

    def time_models(self, variants: Sequence[Variant], seconds: float) -> list[list[Pass]]:
        """Time the source and each variant as wholes, for about `seconds`."""
        models = [self._variant(()), *map(self._variant, variants)]
        return self._rounds("timing models", [(model, _nothing) for model in models], seconds)

    def _variant(self, sites: Variant) -> nn.Module:
        """A copy of the source that shares its tensors, with sites replaced."""
        shared = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        with seeded("latency"):
            apply_sites(model, sites)
        return model.train(self.settings.mode == "training")

    def _rounds(self, what: str, runs: Sequence[tuple[nn.Module, Take]], seconds: float) -> list[list[Pass]]:
        memory = enough_memory(f"measuring {self.settings.describe()}", "a smaller `latency.batch`")
        with threads(self.settings.threads), seeded("latency"), boundary(self.settings.describe()), memory:
            start = time.monotonic()
            self._round(runs)  # a warm-up, in which kernels may be compiled: its times are not among those found
            found: list[list[Pass]] = []
            while len(found) < FEWEST_ROUNDS or (len(found) < MOST_ROUNDS and time.monotonic() - start < seconds):
                if self.progress and found:
                    rounds = round(len(found) * seconds / (time.monotonic() - start))
                    self.progress(what, len(found), min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS))
                step = -1 if len(found) % 2 else 1
                found.append(self._round(runs[::step])[::step])
        return found

    def _round(self, runs: Sequence[tuple[nn.Module, Take]]) -> list[Pass]:
        return [self._timed(*run) for run in runs]

    def _timed(self, model: nn.Module, take: Take) -> Pass:
        self.watch.finish()
        start = self.watch.mark()
        self._run(model)
        end = self.watch.mark()
        self.watch.finish()
        return Pass(self.watch.between(start, end), take())

    def _run(self, model: nn.Module) -> None:
        with self._autocast():
            if self.settings.mode == "inference":
                with torch.inference_mode():
                    model(self.images)
                return
            outputs = [out for out in tree_leaves(model(self.images)) if isinstance(out, Tensor) and out.requires_grad]
            loss = sum(out.float().mean() for out in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()
        model.zero_grad(set_to_none=True)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _PRECISIONS.get(self.settings.precision)
        return torch.autocast(torch.device(self.settings.device).type, dtype) if dtype else nullcontext()


def _nothing() -> dict[str, float]:
    return {}
