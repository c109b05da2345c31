"""The loss of replacing each site alone, measured, and a budget that minimises the sum."""

import json

import pytest
import timm
import torch
from typer.testing import CliRunner

from augment_cli.analysis.graph import analyze
from augment_cli.cli import app
from augment_cli.errors import AugmentError
from augment_cli.planning.plan import Sensitivity, make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.sensitivity import measure_sensitivity
from tests.conftest import graph_of, plan_of
from tests.surgery.test_calibration import picture_folder
from tests.surgery.test_replace import randomized


def planned(overrides: tuple[str, ...], divergence: dict[str, float]):
    sites = plan_of("resnet18", "aa", "budget.params=free").sites
    found = {
        site.name: Sensitivity(agreement=0.9, divergence=divergence.get(site.name, 0.01), given_up=site.given_up)
        for site in sites
    }
    return make_plan("resnet18", graph_of("resnet18"), load_recipe("aa", overrides), sensitivity=found)[0]


def ratios(plan) -> dict[str, float]:
    return {site.name: site.given_up / site.out_channels for site in plan.sites}


@pytest.mark.parametrize("budget", ["keep", "free", "-5%"])
def test_attention_moves_from_sensitive_sites_to_others_within_the_budget(budget):
    sensitive = {"layer3.0.conv1": 0.2, "layer4.1.conv1": 0.2}
    plan = planned((f"budget.params={budget}",), sensitive)
    written = plan_of("resnet18", "aa", "budget.params=free")
    found, before = ratios(plan), ratios(written)
    assert all(found[name] < before[name] for name in sensitive)
    assert max(found[name] for name in sensitive) < min(value for name, value in found.items() if name not in sensitive)
    assert sum(found.values()) >= sum(before.values()) - 1e-6
    if budget != "free":
        limit = plan.params_before * (1 if budget == "keep" else 0.95)
        assert 0.999 * limit <= plan.params_after <= limit
    assert {site.name: site.sensitivity.divergence for site in plan.sites} == dict.fromkeys(found, 0.01) | sensitive


def test_equal_sensitivities_leave_the_written_splits_where_the_budget_is_free():
    plan = planned(("budget.params=free",), {})
    written = plan_of("resnet18", "aa", "budget.params=free")
    assert sum(ratios(plan).values()) == pytest.approx(sum(ratios(written).values()), abs=0.05)
    assert all(abs(ratios(plan)[name] - ratio) < 0.05 for name, ratio in ratios(written).items())


def test_the_predicted_divergence_grows_with_the_square_of_the_channels():
    measured = Sensitivity(agreement=0.9, divergence=0.02, given_up=8)
    assert [measured.predict(channels) for channels in (8, 16, 4, 0)] == [0.02, 0.08, 0.005, 0]
    plan = planned(("budget.params=free",), {})
    assert plan.predicted_divergence == pytest.approx(sum(s.sensitivity.predict(s.given_up) for s in plan.sites))
    assert plan_of("resnet18", "aa").predicted_divergence is None


def test_each_site_is_measured_alone_and_the_model_stays_what_it_is():
    model = randomized("test_resnet", num_classes=5).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    graph = analyze(model, (3, 32, 32))
    plan, _ = make_plan("test_resnet", graph, load_recipe("aa", ("budget.params=free",)))
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    calibration = Calibration(images, (0.5,) * 3, (0.25,) * 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    found = measure_sensitivity(model, plan, graph, calibration, lambda *step: steps.append(step))
    assert list(found) == [site.name for site in plan.sites]
    assert [done for what, done, _ in steps if what.startswith("measuring")] == list(range(len(plan.sites)))
    assert all(0 <= s.agreement <= 1 for s in found.values())
    assert len({s.divergence for s in found.values() if s.divergence > 0}) > 1, found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_a_classifier_is_refused():
    model = timm.create_model("test_resnet", num_classes=0)
    graph = analyze(model, (3, 32, 32))
    plan, _ = make_plan("test_resnet", graph, load_recipe("aa", ("budget.params=free",)))
    calibration = Calibration(torch.zeros(25, 3, 32, 32, dtype=torch.uint8), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(AugmentError, match="no classifier"):
        measure_sensitivity(model, plan, graph, calibration)


def test_the_command_shows_a_column_draws_a_plot_and_keeps_the_numbers_in_the_plan(in_tmp):
    torch.save(timm.create_model("test_resnet").state_dict(), "w.pt")
    picture_folder(in_tmp / "pictures", 25)
    options = ["--sensitivity", "--calibrate", "pictures", "--checkpoint", "w.pt", "--plot", "s.png"]
    result = CliRunner().invoke(app, ["plan", "test_resnet", "--img-size", "32", *options])
    assert result.exit_code == 0, result.output
    assert "agrees" in result.stdout
    assert (in_tmp / "s.png").read_bytes().startswith(b"\x89PNG")
    options = [*options[:-2], "--json"]
    plan = json.loads(CliRunner().invoke(app, ["plan", "test_resnet", "--img-size", "32", *options]).stdout)
    assert all(site["sensitivity"]["divergence"] >= 0 for site in plan["sites"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", "x"], "--calibrate is for --sensitivity"),
        (["--sensitivity"], "--sensitivity needs images"),
        (["--sensitivity", "--calibrate", "x"], "either --pretrained or --checkpoint"),
        (["--sensitivity", "--calibrate", "x", "--pretrained", "--plot", "a.gif"], ".svg, .png or .pdf"),
        (["--sensitivity", "--calibrate", "nowhere", "--pretrained"], "nowhere"),
        (["--sensitivity", "--calibrate", "x", "--pretrained", "-r", "aw"], "nothing to fit"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(options, message, in_tmp):
    (in_tmp / "x").mkdir()
    result = CliRunner().invoke(app, ["plan", "test_resnet", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
