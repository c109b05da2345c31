import importlib.util
from pathlib import Path

import pytest
import survey
import torch
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.support import Support, read_table, table_file
from augment_cli.layers import AWConv2d
from tests.conftest import graph_of, plan_of


def test_a_survey_says_what_each_recipe_makes_of_a_model():
    found = survey.survey("test_byobnet")
    assert (found.family, found.params) == ("byobnet", graph_of("test_byobnet").params)
    for recipe, outcome in found.outcomes.items():
        plan = plan_of("test_byobnet", recipe)
        assert (outcome.sites, outcome.params, outcome.macs) == (len(plan.sites), plan.params_after, plan.macs_after)
        assert outcome.least_params <= outcome.params <= outcome.most_params
        assert outcome.failure is None


def test_a_model_without_a_place_has_its_reason():
    outcomes = survey.survey("levit_128").outcomes
    assert "Every dense 3x3 convolution belongs to the stem: select.include_stem=true" in outcomes["aa"].reason
    assert outcomes["aw"].sites == 3
    assert "cannot be traced" in survey.survey("gemma4_vit_570m").reason


def test_a_trial_finds_other_counts_and_parameters_without_a_gradient(monkeypatch):
    _, model = source.describe("test_resnet")
    graph, plan = graph_of("test_resnet"), plan_of("test_resnet", "aw")
    survey.try_converted(model, plan, graph)
    with pytest.raises(survey.TrialError, match=r"parameters: .*, and not 7"):
        survey.try_converted(model, plan.model_copy(update={"params_after": 7}), graph)
    with pytest.raises(survey.TrialError, match="multiply-adds"):
        survey.try_converted(model, plan.model_copy(update={"macs_after": 7}), graph)
    monkeypatch.setattr(AWConv2d, "forward", lambda self, x: nn.Conv2d._conv_forward(self, x, self.weight, self.bias))
    found = survey.outcome("test_resnet", model, graph, "aw")
    assert "multiply-adds" in found.failure
    without = survey._without_gradient(_built(model, plan), torch.empty(2, *plan.input_size, device="meta"))
    assert "layer1.0.conv1.reduce.weight" in without


def _built(model, plan):
    from augment_cli.analysis.graph import meta_copy
    from augment_cli.surgery.replace import apply_plan

    built = meta_copy(model)
    apply_plan(built, plan)
    return built


def test_the_shipped_table_has_all_of_timm_without_a_failure():
    table = {model.model: model for model in read_table().models}
    assert len(table) > 1_300
    assert not [name for name, m in table.items() if any(o.failure for o in m.outcomes.values())]
    assert [m.model for m in table.values() if m.dense and not m.outcomes["aw"].sites] == []
    without = {m.model for m in table.values() if m.behind_stem and not m.outcomes["aa"].sites}
    assert without == {"csatv2", "csatv2_21m"}  # their 3x3 convolutions have one channel
    for m in table.values():
        for recipe in ("aa", "aa-aw"):
            if m.outcomes and m.outcomes[recipe].sites:
                assert 0 <= m.params - m.outcomes[recipe].params < 5e-4 * m.params
            elif m.outcomes and m.dense and not m.behind_stem:
                assert "belongs to the stem" in m.outcomes[recipe].reason or "depthwise" in m.outcomes[recipe].reason


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", table_file().parent / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STATE", tmp_path / "out" / "sweep.jsonl")
    return module


def test_a_sweep_goes_on_where_it_was_stopped_and_starts_anew_with_other_code(sweep):
    found = Support(model="a", family="f", params=10)
    sweep.STATE.parent.mkdir()
    lines = ['{"code": "1"}', found.model_dump_json(), '{"model": "b", "fam']
    sweep.STATE.write_text("\n".join(lines))
    assert sweep.known("1") == {"a": found}
    assert sweep.known("2") == {}


def test_the_page_is_made_of_the_table(sweep):
    page = Path(table_file().parent / "support.md").read_text()
    assert sweep.markdown(read_table()) == page
    assert "| byobnet |" in page
