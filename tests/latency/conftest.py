"""A bench whose times are a formula: what planning makes of times can be held against the formula."""

from collections.abc import Callable, Sequence

import pytest

from augment_cli.analysis.facts import Source
from augment_cli.analysis.site import filter_macs
from augment_cli.latency.bench import Pass, Variant
from augment_cli.latency.timer import Timer
from augment_cli.operators import get_operator
from augment_cli.planning.latency import LatencySettings
from tests.conftest import graph_of

MODEL = "resnet18"


class FormulaBench:
    """A site's time grows with its multiply-adds; a split has an overhead, and bumps that no line follows."""

    def __init__(self, model: str = MODEL) -> None:
        self.sites = {site.name: site for site in graph_of(model).sites}
        self.total = 2.0 * sum(self.before(name) for name in self.sites)
        self.timed: list[Variant] = []
        self.run: list[Variant] = []

    def before(self, name: str) -> float:
        site = self.sites[name]
        return filter_macs(site, site.out_channels) / 10

    def after(self, planned) -> float:
        macs = get_operator(planned.operator).macs(planned, planned.split)
        return macs / 10 + 0.3 * self.before(planned.name) * (1 + 0.2 * (planned.given_up % 3))

    def change(self, variant: Variant) -> float:
        return sum(self.after(planned) - self.before(planned.name) for planned in variant)

    def pass_seconds(self) -> float:
        return self.total / 1e9

    def time_sites(self, names: Sequence[str], variants: Sequence[Variant], seconds: float) -> list[list[Pass]]:
        self.timed += variants
        source = Pass(self.total, {name: self.before(name) for name in names})
        passes = [Pass(0.0, {planned.name: self.after(planned) for planned in variant}) for variant in variants]
        return [[source, *passes]] * 5

    def time_models(self, variants: Sequence[Variant], seconds: float) -> list[list[Pass]]:
        self.run += variants
        return [[Pass(self.total, {}), *(Pass(self.total + self.change(v), {}) for v in variants)]] * 5


@pytest.fixture
def bench() -> FormulaBench:
    return FormulaBench()


@pytest.fixture
def timer_of(bench) -> Callable[..., Timer]:
    def no_model():
        raise AssertionError("the bench is given")

    def make(cached: bool = False, **settings) -> Timer:
        graph = graph_of(MODEL)
        source = Source(MODEL, {}, graph.input_size)
        return Timer(source, graph, LatencySettings(**settings), no_model, cached=cached, bench=bench)

    return make
