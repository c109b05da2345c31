import timm
import torch
from torch import nn

from augment_cli.surgery.inherit import carry, importance
from tests.conftest import graph_of, plan_of
from tests.surgery.test_replace import randomized


def test_importance_is_the_norm_of_the_filter_with_the_normalisation_folded_in():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(1, 3, 8, 8)
    folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    shift = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(nn.functional.conv2d(x, folded, shift), norm.eval()(conv(x)))
    torch.testing.assert_close(importance(conv, norm), folded.detach().flatten(1).norm(dim=1))
    torch.testing.assert_close(importance(conv, None), conv.weight.detach().flatten(1).norm(dim=1))


def test_a_normalisation_that_starts_at_zero_does_not_make_all_filters_equal():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    torch.testing.assert_close(importance(conv, norm), importance(conv, None))


def test_the_least_important_filters_are_given_up_and_the_others_carried_bit_for_bit():
    graph, plan = graph_of("resnet18"), plan_of("resnet18", "aa")
    source = randomized("resnet18")
    converted = timm.create_model("resnet18")
    converted.load_state_dict(source.state_dict())
    records = carry(converted, plan, graph)
    for site, record in zip(plan.sites, records, strict=True):
        conv, new = source.get_submodule(site.name), converted.get_submodule(site.name)
        norm = next(s.norm for s in graph.sites if s.name == site.name)
        score = importance(conv, source.get_submodule(norm))
        order = new.channel_order.tolist()
        kept = [c for c in range(site.out_channels) if order[c] < record.kept]
        assert len(kept) == record.kept == site.out_channels - site.given_up
        assert score[kept].min() >= max(score[[c for c in range(site.out_channels) if c not in kept]])
        assert torch.equal(new.conv.weight, conv.weight[kept])
        assert record.kind == "carried"
        assert abs(record.share - float(score[kept].sum() / score.sum())) < 1e-5
        assert order == [*dict.fromkeys(order)]


def test_everything_outside_the_sites_is_untouched():
    source = randomized("resnet18")
    converted = timm.create_model("resnet18")
    converted.load_state_dict(source.state_dict())
    plan = plan_of("resnet18", "aa-aw")
    carry(converted, plan, graph_of("resnet18"))
    sites = tuple(site.name + "." for site in plan.sites)
    state = converted.state_dict()
    rest = [key for key in source.state_dict() if not key.startswith(sites)]
    assert len(rest) > 80
    assert all(torch.equal(source.state_dict()[key], state[key]) for key in rest)


def test_each_site_says_what_it_kept():
    graph = graph_of("resnet50")
    exact = carry(timm.create_model("resnet50"), plan_of("resnet50", "aw"), graph)
    assert {(r.kind, r.given_up, r.share) for r in exact} == {("exact", 0, 1.0)}
    ones = ("aa.key_ratio=1.0", "aa.value_ratio=1.0")
    new = carry(timm.create_model("resnet50"), plan_of("resnet50", "aa-ratio", *ones), graph)
    assert {(r.kind, r.kept, r.share) for r in new} == {("new", 0, 0.0)}


def test_on_random_weights_the_same_seed_gives_the_same_model():
    def model():
        torch.manual_seed(5)
        made = timm.create_model("resnet18")
        carry(made, plan_of("resnet18", "aa"), graph_of("resnet18"))
        return made.state_dict()

    first, second = model(), model()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
