from dataclasses import replace

import pytest

from augment_cli.operators.aa_aw import AAAWSplit
from augment_cli.planning.recipe import load_recipe
from augment_cli.reporting import Report, model_card
from augment_cli.reporting.card import base_model
from tests.reporting.conftest import attended, metadata, plan, site


def front_matter(card: str) -> dict[str, object]:
    """The YAML of a card: scalars and lists, which is all that ours has."""
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    parsed: dict[str, object] = {}
    for line in text.splitlines():
        if line.startswith("- "):
            parsed[list(parsed)[-1]] = [*(parsed[list(parsed)[-1]] or []), line.removeprefix("- ")]
        else:
            key, _, value = line.partition(":")
            parsed[key] = value.strip()
    return parsed


def made(*sites, weights: str = "pretrained", recipe: str = "aa", **changed) -> Report:
    own = load_recipe(recipe)
    result = plan(*sites, recipe=recipe, recipe_sha256=own.digest(), budget=own.budget, **changed)
    return Report.of(result, metadata(result, weights))


def test_front_matter(report: Report):
    assert front_matter(model_card(report)) == {
        "library_name": "timm",
        "base_model": "timm/resnet50.a1_in1k",
        "tags": ["image-classification", "timm", "augment-cli"],
    }


def test_front_matter_is_yaml(report: Report):
    yaml = pytest.importorskip("yaml")
    text = model_card(report).split("---\n")[1]
    assert yaml.safe_load(text) == front_matter(model_card(report))


@pytest.mark.parametrize(
    ("model", "weights"),
    [("resnet50", "pretrained"), ("resnet50.a1_in1k", "random, seed 0"), ("a.b\nlicense: mit", "pretrained")],
)
def test_no_base_model_where_it_is_not_known(model: str, weights: str):
    report = replace(made(site("a"), weights=weights), model=model)
    assert base_model(report) is None
    assert "base_model" not in front_matter(model_card(report))
    assert "license" not in front_matter(model_card(report))


def test_how_to_load(report: Report):
    card = model_card(report)
    assert 'timm.create_model("local-dir:DIR", pretrained=True)' in card
    assert 'augment_cli.load("model.safetensors")' in card


def test_what_it_costs_and_comes_from(report: Report):
    card = model_card(report)
    for text in ("1,298,556", "7 of 15 convolutions", "`layer3.0-5.conv2` (6)", report.plan_sha256, "ab" * 32, "2.9.0"):
        assert text in card


def test_says_when_to_fine_tune(report: Report):
    assert "Fine-tune before use" in model_card(report)
    exact = model_card(made(attended("a"), recipe="aw"))
    assert "Fine-tune before use" not in exact
    assert "exactly what its source computes" in exact
    assert "Not trained" in model_card(made(attended("a"), weights="random, seed 0"))


def test_names_papers_and_trust():
    card = model_card(made(site("a"), recipe="aa-resnet"))
    assert "arXiv 1904.09925" in card
    assert "2108.08205" not in card
    assert "Trust: arith" in card


def test_aw_is_our_reading():
    for report in (
        made(attended("a"), recipe="aw"),
        made(site("a", operator="aa+aw", split=AAAWSplit(8, 160, 8, 2, 16)), recipe="aa-aw"),
    ):
        card = model_card(report)
        assert "our reading of AW" in card
        assert "arXiv 2108.08205" in card


def test_hostile_names(hostile: Report):
    card = model_card(hostile)
    assert "\x1b" not in card
    assert set(front_matter(card)) == {"library_name", "tags"}
