import json

import pytest

from augment_cli.errors import AugmentError
from augment_cli.planning.plan import Plan, natural
from augment_cli.planning.reading import check_budget, fit_plan, parse_plan
from augment_cli.planning.recipe import override_budget
from tests.conftest import graph_of, plan_of

TOP = ["schema", "model", "recipe", "params_before", "params_after", "macs_before", "macs_after", "sites", "skipped"]
SITE = [
    *["name", "operator", "in_channels", "out_channels", "kernel_size", "stride", "groups", "resolution", "split"],
    *["params_before", "params_after", "macs_before", "macs_after", "sensitivity"],
]


def data(**changes):
    return json.loads(plan_of("resnet18", "aa").to_json()) | changes


def test_the_json_has_the_names_that_scripts_rely_on():
    plan = data()
    assert set(TOP) <= plan.keys()
    assert plan["schema"] == 1
    assert plan["recipe"] == "aa"
    assert list(plan["sites"][0]) == SITE
    assert set(plan["skipped"][0]) == {"name", "reason", "out_channels", "kernel_size", "resolution"}


def test_json_and_back_is_the_same_plan_with_the_same_hash():
    plan = plan_of("resnet18", "aa-aw")
    again = parse_plan(plan.to_json(), "plan")
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.digest() == plan.digest()
    assert {plan: 1}[again] == 1


def test_a_plan_is_frozen_and_sorted_whatever_order_it_came_in():
    plan = plan_of("resnet101", "aa")
    shuffled = data()
    shuffled["sites"].reverse()
    assert parse_plan(json.dumps(shuffled), "plan") == plan_of("resnet18", "aa")
    names = [site.name for site in plan.sites]
    assert names == sorted(names, key=natural)
    assert names.index("layer3.9.conv2") < names.index("layer3.10.conv2")
    with pytest.raises(ValueError, match="frozen"):
        plan.params_after = 1


def test_totals_are_the_sums_of_the_sites():
    for recipe in ("aa", "aw", "aa-aw"):
        plan = plan_of("resnet50", recipe)
        assert plan.params_after - plan.params_before == sum(s.params_after - s.params_before for s in plan.sites)
        assert plan.macs_after - plan.macs_before == sum(s.macs_after - s.macs_before for s in plan.sites)


def test_model_arguments_survive_and_are_hashable():
    plan = Plan.model_validate(data(model_args={"num_classes": 10, "img_size": [64, 96]}))
    assert dict(plan.model_args) == {"num_classes": 10, "img_size": (64, 96)}
    assert json.loads(plan.to_json())["model_args"] == {"num_classes": 10, "img_size": [64, 96]}
    hash(plan)


def edited(change) -> str:
    plan = data()
    change(plan)
    return json.dumps(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(schema=2), "has schema 2, and this version reads 1: install a newer"),
        (lambda p: p.update(sitse=[]), "unknown key sitse; did you mean sites"),
        (lambda p: p["sites"][0].update(stides=4), "unknown key sites.0.stides; did you mean stride"),
        (lambda p: p.update(sites=[]), "sites: Tuple should have at least 1 item"),
        (
            lambda p: p["sites"][0]["split"].update(key_channels=7),
            "key_channels=7 is not a positive multiple",
        ),
        (lambda p: p["sites"][0]["split"].update(value_channels=66), "value_channels=66 is more than 64"),
        (lambda p: p["sites"][0]["split"].update(reduction=16), "sites.0.split.*reduction"),
        (lambda p: p["sites"][0]["split"].pop("heads"), "sites.0.split.*heads"),
        (lambda p: p["sites"][0].update(split=7), "sites.0.split"),
        (lambda p: p["sites"][0].update(operator="ab"), "sites.0.operator: no operator named ab; did you mean"),
        (lambda p: p["sites"].append(p["sites"][0]), "named more than once: layer1.0.conv1"),
        (lambda p: p.update(model_args={"checkpoint_path": "/x"}), "checkpoint_path cannot be set"),
        (lambda p: p.pop("model"), "model: Field required"),
        (lambda p: p["sites"][0].update(params_before=36_865), "params_before=36,865.* has 36,864 or 36,928"),
        (lambda p: p["sites"][0].update(macs_before=7), "macs_before=7 is not a multiple of"),
        (lambda p: p["sites"][0].update(macs_before=0), "macs_before=0 is not a multiple of"),
        (lambda p: p["sites"][0].update(in_channels=0), "in_channels"),
        (lambda p: p["sites"][0].update(in_channels=32), "params_before=36,864.* this shape has 18,432"),
        (lambda p: p["sites"][0].update(resolution=[0, 56]), "resolution"),
        (lambda p: p["sites"][0].pop("params_before"), "params_before: Field required"),
        (lambda p: p.update(params_before=1), "params_before=1 is less than"),
    ],
)
def test_a_bad_plan_is_refused_with_the_place_and_the_reason(change, message):
    with pytest.raises(AugmentError, match=message):
        parse_plan(edited(change), "plan x.json")


@pytest.mark.parametrize("recipe", ["aa", "aw", "aa-aw"])
def test_a_plan_is_what_its_sites_say_and_not_what_its_totals_claim(recipe):
    """Models with biases, gains, groups and pooled maps."""
    for model in ("resnet18", "vgg11", "nf_resnet50", "resnext50_32x4d"):
        if recipe != "aw" and model == "resnext50_32x4d":
            continue
        plan = plan_of(model, recipe)
        claimed = json.loads(plan.to_json()) | {"params_after": 1, "macs_after": 1}
        for site in claimed["sites"]:
            site |= {"params_after": 1, "macs_after": 1}
        assert parse_plan(json.dumps(claimed), "plan") == plan


def test_more_keys_cost_what_they_cost_before_any_model_is_made():
    plan = data()
    split = plan["sites"][0]["split"]
    keys = split["key_channels"]
    split["key_channels"] = 2 * keys
    doubled = parse_plan(json.dumps(plan), "plan")
    height, width = (-(-size // split["attention_pool"]) for size in plan["sites"][0]["resolution"])
    more = 2 * 64 * keys + (2 * (height + width) - 2) * keys // split["heads"]
    assert doubled.params_after - plan["params_after"] == more


def test_a_convolution_that_is_called_twice_is_counted_twice():
    plan = data()
    once = parse_plan(json.dumps(plan), "plan")
    plan["sites"][0]["macs_before"] *= 2
    twice = parse_plan(json.dumps(plan), "plan")
    assert twice.sites[0].macs_after == 2 * once.sites[0].macs_after
    assert twice.sites[0].params_after == once.sites[0].params_after


def test_an_incomplete_plan_gives_three_problems_and_a_count():
    plan = data()
    for site in plan["sites"]:
        for key in ("operator", "in_channels", "kernel_size", "resolution", "stride"):
            del site[key]
    with pytest.raises(AugmentError, match=r"and \d\d more$") as told:
        parse_plan(json.dumps(plan), "plan")
    assert str(told.value).count("Field required") == 3


def test_a_plan_over_its_own_budget_is_refused_until_the_budget_is_another():
    plan = data()
    plan["sites"][0]["split"]["key_channels"] *= 4
    over = parse_plan(json.dumps(plan), "plan")
    with pytest.raises(AugmentError, match=r"plan x has [\d,]+ parameters, [\d,]+ more than its budget.params=keep"):
        check_budget(over, "plan x")
    for amount in ("free", "+1%"):
        check_budget(
            over.model_copy(update={"budget": override_budget(over.budget, (f"budget.params={amount}",))}), "x"
        )
    with pytest.raises(AugmentError, match="only the budget"):
        override_budget(over.budget, ("aa.heads=4",))
    with pytest.raises(AugmentError, match="is no budget"):
        override_budget(over.budget, ("budget.params=much",))


def test_attention_on_one_position_is_refused_in_an_edited_plan_too():
    plan = data()
    plan["sites"][-1]["split"]["attention_pool"] = 8  # of a 7x7 map
    with pytest.raises(AugmentError, match="one position"):
        fit_plan(parse_plan(json.dumps(plan), "plan"), graph_of("resnet18"), "plan")


def test_text_that_is_not_json_is_refused():
    for text in ("{", "[" * 100_000, '"a"'):
        with pytest.raises(AugmentError, match="plan x"):
            parse_plan(text, "plan x")


def test_an_edited_plan_is_counted_anew_and_what_it_leaves_out_is_skipped():
    plan = data()
    dropped = plan["sites"].pop()["name"]
    plan["sites"][0]["split"].update(key_channels=16, value_channels=10)
    fitted = fit_plan(parse_plan(json.dumps(plan), "plan"), graph_of("resnet18"), "plan")
    assert fitted.params_after - fitted.params_before == sum(s.params_after - s.params_before for s in fitted.sites)
    assert fitted.sites[0].params_after > 0
    assert {s.name: s.reason for s in fitted.skipped}[dropped] == "not in the plan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "layer1.0.conv9"}, "no convolution layer1.0.conv9; did you mean layer1.0.conv"),
        (
            {"in_channels": 32, "params_before": 18_432, "macs_before": 18_432 * 56 * 56},
            "layer1.0.conv1 has in_channels 64 in the model, and 32 in the plan",
        ),
        ({"stride": [2, 2]}, r"has stride \(1, 1\) in the model"),
        ({"name": "fc"}, "no convolution fc"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(change, message):
    plan = data()
    plan["sites"][0].update(change)
    with pytest.raises(AugmentError, match=message):
        fit_plan(parse_plan(json.dumps(plan), "plan"), graph_of("resnet18"), "plan x")
