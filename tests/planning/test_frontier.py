"""The front of a budget against the distance from the recipe, or against the predicted divergence."""

import json
from pathlib import Path

import pytest

import augment_cli as augment
from augment_cli.analysis.facts import Source
from augment_cli.planning import frontier as planning
from augment_cli.planning.frontier import Point, _front, count
from augment_cli.planning.plan import Sensitivity
from augment_cli.planning.reading import parse_plan
from augment_cli.planning.recipe import load_recipe
from tests.cli.helpers import ok, run
from tests.conftest import graph_of, plan_of

SOURCE = Source("test_resnet", {}, (3, 160, 160))


@pytest.mark.parametrize("unit", ["params", "macs"])
@pytest.mark.parametrize("recipe", ["aa", "aa-aw"])
def test_no_point_beats_another_and_the_ends_are_the_least_and_the_recipes_own(unit, recipe):
    front = augment.frontier("test_resnet", recipe, "budget.params=free", unit=unit, points=6).points
    counts = [count(point, unit) for point in front]
    assert len(front) > 2
    assert counts == sorted(set(counts))
    losses = [point.loss for point in front]
    assert losses == sorted(set(losses), reverse=True)
    assert losses[-1] == 0
    assert front[-1].plan == plan_of("test_resnet", recipe, "budget.params=free")


def test_the_recipes_budget_for_the_other_count_holds():
    front = augment.frontier("test_resnet", "aa", "budget.params=keep", unit="macs", points=4).points
    assert all(point.plan.params_after <= point.plan.params_before for point in front)


def test_each_plan_is_the_one_of_its_budget():
    for point in augment.frontier("test_resnet", "aa", points=4).points:
        budget = point.plan.budget.params
        assert point.plan == plan_of("test_resnet", "aa", f"budget.params={budget}")
        assert budget == "free" or point.plan.params_after <= int(budget)


def test_what_was_measured_is_what_is_predicted():
    written = plan_of("test_resnet", "aa", "budget.params=free")
    found = {
        site.name: Sensitivity(agreement=0.9, divergence=0.01 * (i + 1), given_up=site.given_up)
        for i, site in enumerate(written.sites)
    }
    front = planning.frontier(SOURCE, graph_of("test_resnet"), load_recipe("aa"), "params", 5, found)
    assert [point.loss for point in front] == [point.plan.predicted_divergence for point in front]


def test_points_that_another_beats_are_left_out(monkeypatch):
    points = [Point(plan_of("test_resnet", "aa"), loss) for loss in (3.0, 2.0, 2.5)]
    counts = dict(zip(map(id, points), (1, 2, 3), strict=True))
    monkeypatch.setattr(planning, "count", lambda point, unit: counts[id(point)])
    assert _front(points, "params") == points[:2]


def test_the_command_shows_draws_and_gives_plans_that_convert_takes(in_tmp):
    shown = ok("plan", "test_resnet", "--frontier", "params", "--points", "4", "--plot", "f.png").stdout
    assert "Distance" in shown
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(ok("plan", "test_resnet", "--frontier", "params", "--points", "4", "--json").stdout)
    losses = [point["loss"] for point in data["points"]]
    assert losses == sorted(losses, reverse=True)
    assert all(f"{point['count']:,}" in shown for point in data["points"])
    second = ok("plan", "test_resnet", "--frontier", "params", "--points", "4", "--point", "2", "--json").stdout
    assert parse_plan(second, "plan") == parse_plan(json.dumps(data["points"][1]["plan"]), "plan")
    Path("p.json").write_text(second)
    ok("convert", "--plan", "p.json", "-o", "m.safetensors")
    ok("check", "m.safetensors")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("test_resnet", "--frontier", "size"), "size"),
        (("test_resnet", "--frontier", "params", "--points", "1"), "points"),
        (("test_resnet", "--frontier", "params", "--point", "50"), "--point"),
        (("test_resnet", "--point", "2"), "--frontier"),
        (("test_resnet", "--frontier", "params", "--plot", "f.gif"), ".svg"),
        (("--plan", "p.json", "--frontier", "params"), "--plan"),
        (("test_vit", "--frontier", "params"), "3x3"),
    ],
)
def test_wrong_arguments_are_told(in_tmp, arguments, word):
    result = run("plan", *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.stderr
