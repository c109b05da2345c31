"""Latency by the command line: planned, shown, compared and refused."""

import json

import pytest

import augment_cli as augment
from augment_cli.errors import AugmentError
from tests.cli.helpers import ok, run

QUICK = ("--set", "latency.seconds=1", "--set", "latency.threads=1")
BUDGET = ("--set", "budget.latency=+40%", "--set", "budget.params=free")
SMALL = ("test_resnet", "--img-size", "48")


@pytest.fixture
def planned(in_tmp, monkeypatch):
    """A plan within a budget of latency, in plan.json; what was measured for it is kept."""
    monkeypatch.setenv("AUGMENT_CACHE", str(in_tmp / "cache"))
    found = ok("plan", *SMALL, *BUDGET, *QUICK, "--json")
    assert "measuring latency for about 1 s: inference on cpu, batch 1, 1 thread, fp32" in found.stderr
    assert "predicted" in found.stderr
    (in_tmp / "plan.json").write_text(found.stdout)
    return json.loads(found.stdout)


def test_a_plan_has_its_latency_and_what_shows_plans_shows_it(planned, in_tmp):
    latency = planned["latency"]
    assert latency["predicted"] <= 1.4 * latency["source"] + 1
    assert latency["measured"]["rounds"] >= 3
    assert latency["settings"]["threads"] == 1
    assert {site["name"] for site in latency["sites"]} == {site["name"] for site in planned["sites"]}
    for form in ("table", "markdown", "html"):
        shown = ok("report", "plan.json", "-f", form).stdout
        assert "Predicted time" in shown
        assert "Measured time" in shown
        assert "quartiles" in shown
    report = json.loads(ok("report", "plan.json", "-f", "json").stdout)
    assert report["totals"]["latency"]["budget"] == "+40%"
    assert report["totals"]["latency"]["after"] == latency["predicted"]
    assert all(site["latency"]["before"] > 0 for site in report["sites"])
    assert "nanoseconds_after" in ok("report", "plan.json", "-f", "csv").stdout.splitlines()[0]


def test_a_converted_model_keeps_the_latency_of_its_plan_and_is_measured_again_where_asked(planned, in_tmp):
    ok("convert", "--plan", "plan.json", "-o", "model")
    assert json.loads(ok("report", "model", "-f", "json").stdout)["latency"]["machine"] == planned["latency"]["machine"]
    again = ok("report", "model", "--latency", "--set", "latency.batch=2", "--set", "latency.seconds=1", "-f", "json")
    settings = json.loads(again.stdout)["latency"]["settings"]
    assert (settings["batch"], settings["threads"]) == (2, 1)
    ok("check", "model")


def test_the_same_question_is_answered_from_the_cache(planned):
    again = ok("plan", *SMALL, *BUDGET, *QUICK, "--json")
    assert json.loads(again.stdout) == planned
    assert "measuring latency" not in again.stderr
    ok("convert", *SMALL, *BUDGET, *QUICK, "-o", "model")


def test_an_edited_plan_is_measured_again_before_its_budget_is_believed(planned, in_tmp):
    planned["sites"].pop()
    (in_tmp / "plan.json").write_text(json.dumps(planned))
    result = run("convert", "--plan", "plan.json", "-o", "model")
    assert result.exit_code == 2
    assert "plan --plan FILE --latency" in result.stderr
    shown = ok("plan", "--plan", "plan.json", "--set", "budget.latency=+900%", "--latency", "--json")
    assert json.loads(shown.stdout)["latency"]["sites"]


def test_models_are_compared_and_a_front_is_drawn_by_time(in_tmp):
    shown = ok("compare", *SMALL, "-r", "aa", "-r", "aw", *QUICK, "--latency").stdout
    assert "Measured" in shown
    front = json.loads(ok("plan", *SMALL, *QUICK, "--frontier", "latency", "--points", "3", "--json").stdout)
    assert front["unit"] == "latency"
    assert all(point["count"] == point["plan"]["latency"]["predicted"] for point in front["points"])
    ok("plan", *SMALL, *QUICK, "--frontier", "latency", "--points", "2", "--plot", "front.svg")


def test_python_measures_what_the_command_line_does():
    overrides = ("budget.latency=+40%", "budget.params=free", "latency.seconds=1", "latency.threads=1")
    plan = augment.plan("test_resnet", "aa", *overrides, input_size=48)
    assert plan.latency.measured is not None
    shown = augment.report(plan, latency=True, batch=2, seconds=1, threads=1)
    assert "batch 2, 1 thread" in str(shown)
    with pytest.raises(AugmentError, match="latency"):
        augment.report(plan, batch=2)
    with pytest.raises(AugmentError, match="batch"):
        augment.report(plan, latency=True, batch=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "test_resnet", "--set", "budget.latency=5%"), "is no budget"),
        (("plan", "test_resnet", "--set", "latency.threads=0"), "latency.threads"),
        (("plan", "test_resnet", "--set", "latency.mode=asleep"), "latency.mode"),
        (("plan", "test_resnet", "--latency", "--set", "latency.device=cuda:99"), "latency.device=cpu"),
        (("plan", "test_resnet", *QUICK, "--set", "budget.latency=-99%"), "the chosen sites can have"),
        (("plan", "test_resnet", "--frontier", "time"), "latency"),
        (("report", "plan.json", "--set", "latency.batch=2"), "--set is for --latency"),
        (("report", "plan.json", "--latency", "--set", "budget.params=keep"), "latency.key=value"),
    ],
)
def test_wrong_input_is_refused_in_one_line(in_tmp, arguments, message):
    (in_tmp / "plan.json").write_text(augment.plan("test_resnet").to_json())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
