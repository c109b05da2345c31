"""Times between those that were measured, and the settings and budgets of latency."""

import numpy as np
import pytest

from augment_cli.errors import AugmentError, BudgetError
from augment_cli.operators import get_operator
from augment_cli.planning.latency import LatencySettings, SiteTimes, Spread, Time, spread
from augment_cli.planning.plan import make_plan
from augment_cli.planning.recipe import load_recipe, override_latency, resolve_amount
from augment_cli.planning.selection import select
from augment_cli.reporting.provenance import RecipeOrigin
from tests.conftest import graph_of, plan_of


def site_of(model: str = "resnet18", recipe: str = "aa"):
    settings = load_recipe(recipe)
    site, written = select(graph_of(model).sites, settings).chosen[-1]
    operator = get_operator(settings.operator)
    return site, operator, operator.splits(site, settings, written), written


@pytest.mark.parametrize("recipe", ["aa", "aw", "aa-aw"])
def test_a_time_that_is_linear_in_the_split_is_interpolated_to_a_few_percent(recipe):
    site, operator, splits, written = site_of(recipe=recipe)
    true = {split: 1e5 + operator.macs(site, split) / 50 + 300 * operator.given_up(split) for split in splits}
    probes = spread(site, operator, splits, written, 8)
    times = SiteTimes(Time(1e5), {operator.name: {split: Time(true[split]) for split in probes}})
    found = times.estimate(site, operator, splits)
    off = [abs(time.value / true[split] - 1) for split, time in zip(splits, found, strict=True)]
    assert np.median(off) < 0.01
    assert max(off) < 0.1


def test_what_was_measured_stays_as_measured_with_its_error_and_the_rest_says_what_the_line_misses():
    site, operator, splits, written = site_of()
    probes = spread(site, operator, splits, written, 6)
    measured = {split: Time(1e6 + 1e5 * (i % 2), 5.0) for i, split in enumerate(probes)}
    found = SiteTimes(Time(1e6), {"aa": measured}).estimate(site, operator, splits)
    for split, time in zip(splits, found, strict=True):
        assert time == measured.get(split, time)
        assert 5e5 < time.value < 2e6
        if split not in measured:
            assert 1e4 < time.error < 1e5


def test_no_time_is_interpolated_below_nothing():
    site, operator, splits, _ = site_of()
    ends = sorted(splits, key=lambda split: split.given_up if hasattr(split, "given_up") else split.value_channels)
    middle = ends[len(ends) // 2 : len(ends) // 2 + 2]
    times = SiteTimes(Time(1.0), {"aa": {middle[0]: Time(1000.0), middle[1]: Time(1.0)}})
    assert all(time.value > 0 for time in times.estimate(site, operator, splits))


def test_probes_are_distinct_begin_with_the_written_split_and_stay_near_it():
    for recipe in ("aa", "aw", "aa-aw"):
        site, operator, splits, written = site_of(recipe=recipe)
        probes = spread(site, operator, splits, written, 8)
        assert probes[0] == written
        assert len(set(probes)) == len(probes) == min(8, len(splits))
        assert set(probes) <= set(splits)


@pytest.mark.parametrize(
    ("amount", "expected"),
    [("free", None), ("keep", 1000), ("+5%", 1050), ("-10%", 900), ("2us", 2000), ("1.5 ms", 1_500_000), ("1s", 10**9)],
)
def test_a_budget_of_latency_is_a_change_or_a_time(amount, expected):
    budget = load_recipe("aa", (f"budget.latency={amount}",)).budget
    assert resolve_amount(budget.latency, 1000) == expected


@pytest.mark.parametrize(
    "override", ["budget.latency=5%", "budget.latency=25M", "budget.latency=fast", "budget.params=5ms"]
)
def test_what_is_no_budget_is_refused(override):
    with pytest.raises(AugmentError, match="is no budget"):
        load_recipe("aa", (override,))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("latency.threads=0", "threads"),
        ("latency.batch=0", "batch"),
        ("latency.mode=sleeping", "inference"),
        ("latency.precision=fp8", "bf16"),
        ("latency.device=tpu", "device"),
        ("latency.seconds=0", "seconds"),
        ("latency.thread=1", "did you mean threads"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(override, word):
    with pytest.raises(AugmentError, match=f"latency.*{word}"):
        load_recipe("aa", (override,))
    with pytest.raises(AugmentError, match=f"latency.*{word}"):
        override_latency(LatencySettings(), (override,))


def test_settings_are_overridden_alone():
    assert override_latency(LatencySettings(batch=2), ("latency.threads=3",)) == LatencySettings(batch=2, threads=3)
    with pytest.raises(AugmentError, match=r"latency\.key=value"):
        override_latency(LatencySettings(), ("budget.latency=+5%",))


def test_how_latency_is_measured_makes_no_other_recipe():
    assert load_recipe("aa", ("latency.batch=8",)).digest() == load_recipe("aa").digest()
    assert load_recipe("aa", ("budget.latency=+5%",)).digest() != load_recipe("aa").digest()
    assert RecipeOrigin.of(plan_of("resnet18", "aa", "latency.batch=8")).status == "built-in"


def test_a_budget_of_latency_without_times_says_the_way_out():
    with pytest.raises(BudgetError, match=r"augment plan.*budget\.latency=free"):
        make_plan("resnet18", graph_of("resnet18"), load_recipe("aa", ("budget.latency=+5%",)))


def test_a_spread_is_the_quartiles():
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(low=2.0, median=3.0, high=4.0)
