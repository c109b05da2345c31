import copy

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import augment_cli
from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.errors import AugmentError
from augment_cli.surgery.records import Inheritance
from augment_cli.training.models import Opened, with_classes
from augment_cli.training.parameters import make_optimizer, make_scheduler, parameter_groups, provenance
from tests.conftest import graph_of, plan_of
from tests.training.conftest import short


def converted(name: str, recipe: str, weights: str = "pretrained", kind: str | None = None) -> Opened:
    described, _ = source.describe(name)
    model = source.create(described)
    metadata = conversion.operate(model, plan_of(name, recipe), graph_of(name), weights)
    if kind:
        records = tuple(Inheritance.model_construct(**{**r.model_dump(), "kind": kind}) for r in metadata.inheritance)
        metadata = metadata.model_copy(update={"inheritance": records})
    return Opened(model, name, metadata, metadata.plan.input_size)


def of_kind(opened: Opened, kind: str) -> set[str]:
    return {name for name, found in provenance(opened).items() if found == kind}


@pytest.mark.parametrize("name", ["resnet10t", "test_nfnet"])
@pytest.mark.parametrize("recipe", ["aa", "aw", "aa-aw"])
def test_what_the_source_has_is_carried_and_the_rest_is_new(name, recipe):
    opened = converted(name, recipe)
    own = dict(timm.create_model(name).named_parameters())
    sites = {site.name for site in opened.metadata.plan.sites}
    branches = {f"{site}.conv." for site in sites}
    expected = set()
    for parameter, _ in opened.model.named_parameters():
        plain = parameter.replace("standardize.", "")
        for branch in branches:
            plain = plain.replace(branch, branch.removesuffix("conv."))
        if plain not in own:
            expected.add(parameter)
    assert expected
    assert of_kind(opened, "new") == expected
    assert of_kind(opened, "fitted") == set()


def test_fitted_attention_is_fitted():
    opened = converted("resnet10t", "aa", kind="fitted")
    assert of_kind(opened, "fitted") == of_kind(converted("resnet10t", "aa"), "new")
    assert not of_kind(opened, "new")


def test_weights_that_were_random_are_all_new():
    opened = converted("resnet10t", "aw", weights="random, seed 0")
    assert set(provenance(opened).values()) == {"new"}


def test_fine_tuning_changes_no_provenance_and_a_new_classifier_stays_new():
    first = converted("resnet10t", "aa", weights="pretrained, fine-tuned on flowers", kind="fitted")
    assert provenance(first) == provenance(converted("resnet10t", "aa", kind="fitted"))
    other = with_classes(first, 7, 0)
    assert of_kind(other, "new") == set(other.metadata.fresh) == {"fc.weight", "fc.bias"}
    assert of_kind(other, "fitted") == of_kind(first, "fitted")


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "test_vit", "levit_128s"])
def test_another_classifier_keeps_all_other_weights(name):
    model = timm.create_model(name)
    opened = with_classes(Opened(model, name, None, (3, 224, 224)), 7, 0)
    heads = tuple([h] if isinstance(h := model.pretrained_cfg["classifier"], str) else h)
    assert opened.model.num_classes == 7
    assert opened.fresh
    assert all(n.startswith(heads) for n in opened.fresh)
    state = model.state_dict()
    same = {n for n, t in opened.model.state_dict().items() if torch.equal(state[n], t) if n in state}
    assert {n for n in state if not n.startswith(heads)} <= same


def test_groups_multiply_provenance_and_layer_decay_and_hold_each_parameter_once():
    opened = converted("resnet10t", "aa")
    kinds = provenance(opened)
    settings = short("m", "d", "o", lr_carried=0.1, lr_new=2.0, layer_decay=0.5)
    groups = parameter_groups(opened.model, kinds, settings)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in opened.model.parameters())
    group_of = {id(p): group for group in groups for p in group["params"]}
    parameters = dict(opened.model.named_parameters())
    assert group_of[id(parameters["fc.weight"])]["lr_scale"] == pytest.approx(0.1)
    site = opened.metadata.plan.sites[-1].name
    conv, qkv = (group_of[id(parameters[f"{site}.{name}.weight"])] for name in ("conv", "qkv"))
    assert qkv["lr_scale"] == pytest.approx(20 * conv["lr_scale"])
    first = group_of[id(next(iter(opened.model.parameters())))]
    assert first["lr_scale"] < conv["lr_scale"] < 0.1


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_norms_biases_and_position_tables_are_not_decayed(layer_decay):
    opened = converted("resnet10t", "aa")
    groups = parameter_groups(opened.model, provenance(opened), short("m", "d", "o", layer_decay=layer_decay))
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in opened.model.named_parameters():
        exempt = parameter.ndim == 1 or name.endswith(("rel_height", "rel_width"))
        assert decay_of[id(parameter)] == (0 if exempt else 0.05), name


@pytest.mark.parametrize("schedule", ["cosine", "tanh", "poly", "step", "wsd", "rsqrt", "constant"])
def test_every_schedule_scales_the_groups_and_depends_on_the_update_alone(schedule):
    opened = converted("resnet10t", "aa")
    settings = short("m", "d", "o", epochs=10, schedule=schedule, warmup_epochs=2.0, lr=1.0, opt="sgd", lr_carried=0.1)

    def rates(updates):
        optimizer = make_optimizer(opened.model, provenance(opened), settings)
        scheduler = make_scheduler(optimizer, settings, updates_per_epoch=5)
        for update in updates:
            scheduler.step_update(update)
        return {group["provenance"]: group["lr"] for group in optimizer.param_groups}

    for update in (0, 3, 10, 30, 50):
        found = rates([update])
        assert found["carried"] == pytest.approx(0.1 * found["new"])
        assert found == rates(range(update + 1))
    assert rates([0])["new"] == pytest.approx(0.01)
    assert 0.75 < rates([11])["new"] <= 1.0


def test_a_warm_up_lasts_whole_updates():
    opened = converted("resnet10t", "aa")
    settings = short("m", "d", "o", epochs=1, schedule="constant", warmup_epochs=1.0, lr=1.0, opt="sgd")
    optimizer = make_optimizer(opened.model, provenance(opened), settings)
    scheduler = make_scheduler(optimizer, settings, updates_per_epoch=7)  # half an epoch: 3.5 updates, rounded to 4
    rates = []
    for update in range(6):
        scheduler.step_update(update)
        rates.append(max(group["lr"] for group in optimizer.param_groups))
    assert rates == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0, 1.0])


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_groups_for_any_trainer_are_those_of_fine_tuning(model, opt):
    loaded = augment_cli.load(model)
    groups = augment_cli.param_groups(loaded, lr=0.1, weight_decay=0.2, lr_carried=0.5)
    assert {(group["provenance"], group["lr"]) for group in groups} == {("carried", 0.05), ("new", 0.1)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in loaded.parameters())
    optimizer = create_optimizer_v2(groups, opt=opt, lr=0.1, weight_decay=0.2)
    for rates in (optimizer, torch.optim.SGD(groups, lr=7.0)):
        assert {g["provenance"]: g["lr"] for g in rates.param_groups} == {"carried": 0.05, "new": 0.1}


def test_groups_are_of_converted_models_alone():
    with pytest.raises(AugmentError, match="load"):
        augment_cli.param_groups(timm.create_model("test_resnet"), lr=0.1)
    model = augment_cli.convert("test_resnet", "aw")
    assert {group["provenance"] for group in augment_cli.param_groups(copy.deepcopy(model), lr=0.1)} == {"new"}
