import subprocess
import sys

import pytest

from augment_cli.planning.plan import Plan
from augment_cli.planning.recipe import Budget, load_recipe
from augment_cli.reporting import Report
from augment_cli.reporting.numbers import Change
from tests.reporting.conftest import attended, metadata, plan, site


def test_sites_add_up_to_the_change_of_the_model(report: Report):
    assert report.params == Change(1_082_192, 1_298_556)
    assert report.params.delta == report.sites_params.delta == sum(entry.params.delta for entry in report.sites)
    assert report.params.delta == 6 * 33_912 + 12_892
    assert report.macs.delta == report.sites_macs.delta == 56_328_832
    assert report.sites_params.before == 7 * 147_456


def test_flops_are_twice_the_multiply_adds(report: Report):
    assert (report.flops.before, report.flops.after) == (2 * report.macs.before, 2 * report.macs.after)
    assert report.flops.percent == report.macs.percent


def test_percent_and_ratio():
    assert Change(200, 150).percent == -25
    assert Change(200, 150).ratio == 0.75
    assert Change(0, 5).percent is Change(0, 5).ratio is None


@pytest.mark.parametrize(
    ("asked", "most", "left"),
    [("free", None, None), ("keep", 197_456, -33_912), ("+20%", 236_947, 5_579), ("300k", 300_000, 68_632)],
)
def test_what_is_left_of_a_budget(asked: str, most: int | None, left: int | None):
    report = Report.of(plan(site("a.conv"), budget=Budget(params=asked)))
    assert (report.params_limit.asked, report.params_limit.most, report.params_limit.left) == (asked, most, left)
    assert report.macs_limit.left is None


def test_attained_ratios(report: Report):
    assert report.ratios["keys"].overall == pytest.approx((6 * 160 + 80) / (7 * 128))
    assert (report.ratios["keys"].least, report.ratios["keys"].most) == (80 / 128, 160 / 128)
    assert report.ratios["values"].overall == 8 / 128


def test_inheritance_is_by_site_and_counted(report: Report, small: Plan):
    record = report.sites[0].inheritance
    assert (record.kind, record.kept, record.given_up, record.share) == ("carried", 120, 8, 0.9)
    assert report.inheritance == {"exact": 0, "carried": 7, "fitted": 0, "new": 0}
    assert Report.of(small).inheritance is None
    assert Report.of(small).sites[0].inheritance is None


def test_aw_alone_is_exact_and_has_no_attention_ratios():
    made = plan(attended("a.conv"), attended("b.conv"))
    report = Report.of(made, metadata(made))
    assert report.exact
    assert report.ratios == {}
    assert [operator.name for operator in report.operators] == ["aw"]


def test_one_augmented_site_is_enough_to_be_not_exact():
    assert not Report.of(plan(attended("a.conv"), site("b.conv"))).exact


def test_skipped_by_reason_the_most_first(report: Report):
    assert [(group.reason.split(":")[0], len(group.names)) for group in report.skipped] == [
        ("1x1 kernel, the recipe takes 3x3", 6),
        ("map too large", 1),
        ("stem", 1),
    ]
    assert report.convolutions == 7 + 8


def test_a_recipe_is_known_by_its_hash():
    own = load_recipe("aa-resnet")
    with_budget = load_recipe("aa-resnet", ("budget.params=keep",))
    changed = load_recipe("aa-resnet", ("aa.heads=4",))

    def origin(recipe, name="aa-resnet"):
        made = plan(site("a"), recipe=name, recipe_sha256=recipe.digest(), budget=recipe.budget)
        return Report.of(made).recipe

    assert origin(own).status == "built-in"
    assert origin(own).paper.title.startswith("Attention Augmented")
    assert origin(with_budget).status == "built-in with another budget"
    assert origin(changed).status == "built-in with changes"
    assert origin(own, "mine").status == "not built-in"
    assert origin(own, "mine").paper is None


def test_reports_need_neither_torch_nor_timm():
    code = "import sys, augment_cli.reporting; print({'torch', 'timm', 'scipy'} & sys.modules.keys() or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
