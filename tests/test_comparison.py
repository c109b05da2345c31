"""Several models and plans side by side."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
import torch

import augment_cli as augment
from augment_cli.analysis import cache, graph
from augment_cli.comparison import alternatives
from augment_cli.errors import AugmentError
from augment_cli.planning.plan import Sensitivity
from tests.cli.helpers import ok, run
from tests.conftest import plan_of
from tests.reporting.conftest import HOSTILE, plan, site
from tests.reporting.test_html import Page

BUDGETS = ("budget.params=keep,-5%",)


def test_every_combination_is_a_plan_and_what_cannot_be_is_named():
    found = augment.compare("test_resnet", "test_vit", recipe=("aa", "aw"), overrides=BUDGETS)
    expected = {
        f"test_resnet aa budget.params={budget}": plan_of("test_resnet", "aa", f"budget.params={budget}")
        for budget in ("keep", "-5%")
    }
    assert {c.label: c.plan for c in found.candidates if c.plan} == expected
    assert [c.label for c in found.candidates if not c.plan] == ["test_resnet", "test_vit"]
    expected = [f"test_resnet aw budget.params={budget}" for budget in ("keep", "-5%")]
    expected += [f"test_vit {recipe} budget.params={budget}" for recipe in ("aa", "aw") for budget in ("keep", "-5%")]
    assert [label for label, _ in found.impossible] == expected
    assert all("asks for at most" in reason for _, reason in found.impossible[:2])


def test_one_analysis_a_model_however_many_plans(monkeypatch):
    traced, trace = [], graph.trace
    monkeypatch.setattr(graph, "trace", lambda model: (traced.append(1), trace(model))[1])
    augment.compare("test_resnet")
    once = len(traced)
    found = augment.compare("test_resnet", overrides=["budget.params=keep,-1%,-2%,-3%", "aa.heads=2,4"])
    assert len(found.candidates) == 1 + 8
    assert len(traced) == 2 * once


def test_a_row_of_the_page_begins_with_its_header():
    html = augment.compare("test_resnet", recipe="aa").to("html")
    assert html.count('scope="row"') == html.count("<tr>") - html.count("<thead>")
    assert '<th class="number" scope="row">1</th>' in html


def test_models_of_every_kind(in_tmp):
    model = augment.convert("test_resnet", "aa", "select.names=layer4.*")
    augment.save(model, "m.safetensors")
    made = augment.plan("test_resnet", "aw")
    (in_tmp / "p.json").write_text(made.to_json())
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 16, 3))
    found = augment.compare(model, "m.safetensors", made, "p.json", "test_resnet", module, input_size=(16, 16))
    plans = [model.augment_metadata.plan] * 2 + [made] * 2 + [None] * 2
    assert [candidate.plan for candidate in found.candidates] == plans
    assert found.candidates[-1].params.after == sum(p.numel() for p in module.parameters())
    assert found.candidates[-2].input_size == (3, 16, 16)


def test_what_differs_is_what_differs():
    several = augment.compare("test_resnet", recipe="aa", overrides=["budget.params=keep,-2%"])
    first, second = ({s.name: s.split for s in c.plan.sites} for c in several.candidates[1:])
    expected = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert expected
    assert several.differing["test_resnet"].keys() == expected
    assert not augment.compare(*[plan_of("test_resnet", "aa")] * 2).differing
    left_out = augment.compare(plan_of("test_resnet", "aa"), plan_of("test_resnet", "aa", "select.names=layer4.*"))
    rows = left_out.differing["test_resnet"]
    assert all(row[1] == "-" for name, row in rows.items() if not name.startswith("layer4"))


def test_what_is_measured_and_predicted_is_shown():
    measured = Sensitivity(agreement=0.9, divergence=0.25, given_up=8)
    known = plan(site("a", sensitivity=measured), site("b", value_channels=16, sensitivity=measured))
    found = augment.compare(known, plan(site("a")))
    assert [candidate.predicted_divergence for candidate in found.candidates] == [1.25, None]
    assert "1.25" in str(found)
    assert "KL predicted" not in str(augment.compare(plan(site("a")), plan(site("b"))))


def test_forms_agree():
    found = augment.compare("test_resnet", recipe="aa", overrides=BUDGETS)
    data = json.loads(found.to("json"))
    rows = list(csv.DictReader(io.StringIO(found.to("csv"))))
    for candidate, entry, row in zip(found.candidates, data["candidates"], rows, strict=True):
        assert entry["label"] == row["label"] == candidate.label
        assert entry["params"]["after"] == int(row["params_after"]) == candidate.params.after
        for text in (str(found), found.to("markdown"), found.to("html")):
            assert f"{candidate.params.after:,}" in text
    with pytest.raises(AugmentError, match="xml"):
        found.to("xml")


def test_the_page_draws_the_networks_of_a_few_plans():
    plans = [plan_of("test_resnet", "aa", f"budget.params=-{percent}%") for percent in range(1, 8)]
    page = Page(augment.compare(*plans[:3], "test_vit").to("html"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) == 2 * len(page.all("svg")) == 2 * 2 * 3  # each for a desk and for a phone
    assert not Page(augment.compare(*plans).to("html")).all("svg")


def test_hostile_names_stay_text():
    made = plan(site(f"{HOSTILE}.0"), model=HOSTILE, recipe=HOSTILE)
    found = augment.compare(made, plan(site(f"{HOSTILE}.0", value_channels=16), model=HOSTILE, recipe=HOSTILE))
    html = found.to("html")
    Page(html)
    assert "<script" not in html
    assert not any("\x1b" in text for text in (html, str(found), found.to("markdown"), found.to("csv")))


def test_a_comma_within_brackets_or_quotes_belongs_to_a_value():
    assert alternatives("a.b=1, 2") == ["a.b=1", "a.b=2"]
    assert alternatives("a.b=[1,2],[3]") == ["a.b=[1,2]", "a.b=[3]"]
    assert alternatives("a.b='x,y',\"z]\",w") == ["a.b='x,y'", 'a.b="z]"', "a.b=w"]
    assert alternatives("a.b") == ["a.b"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("test_resnet",), "alone"),
        (("test_resnet", "resnet51"), "resnet51"),
        (("test_resnet", "none.json"), "none.json"),
        (("test_resnet", "none.safetensors"), "none.safetensors"),
        (("test_resnet", "--recipe", "none"), "none"),
        (("test_resnet", "--set", "budget.prams=keep"), "prams"),
        (("test_resnet", "--recipe", "aw", "--set", "budget.params=keep,-5%"), "asks for at most"),
        (("p.json", "p.json", "--recipe", "aa"), "by name"),
        (("p.json", "test_resnet", "-o", "p.json"), "p.json"),
        (("p.json", "test_resnet", "-o", "x.pdf"), ".pdf"),
        (("p.json", "bad.json"), "bad.json"),
    ],
)
def test_wrong_arguments_are_one_line(in_tmp, arguments, word):
    (in_tmp / "p.json").write_text(plan_of("test_resnet", "aa").to_json())
    (in_tmp / "bad.json").write_text("{}")
    before = sorted(in_tmp.iterdir())
    result = run("compare", *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(in_tmp.iterdir()) == before


def test_the_suffix_says_how_it_is_written(in_tmp):
    begins = {"html": "<!doctype html>", "json": "{", "csv": "label,", "md": "#", "txt": "2 models"}
    for suffix, text in begins.items():
        ok("compare", "test_resnet", "--recipe", "aa", "-o", f"c.{suffix}")
        assert (in_tmp / f"c.{suffix}").read_text().startswith(text), suffix


def test_models_seen_before_are_compared_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    ok("compare", "test_resnet", "test_vit")
    code = (
        "import sys; from typer.testing import CliRunner; from augment_cli.cli import app\n"
        "result = CliRunner().invoke(app, ['compare', 'test_resnet', 'test_vit', '--set', 'budget.params=keep,-5%'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'timm'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
