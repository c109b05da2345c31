import copy

import pytest
import torch
from torch import nn

from augment_cli.analysis.graph import analyze
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d
from augment_cli.planning.plan import make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.inherit import carry, fit
from augment_cli.surgery.inherit.fisher import fisher_roots
from augment_cli.surgery.inherit.fitted import fit_sites, install
from augment_cli.surgery.inherit.heads import fit_heads
from augment_cli.surgery.inherit.moments import Moments
from augment_cli.surgery.inherit.polish import polish
from augment_cli.surgery.inherit.sampling import head_maps, observe


def calibration(count: int = 40, size: int = 32, seed: int = 0) -> Calibration:
    """Smooth images: noise made small and enlarged."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, size // 4, size // 4, generator=generator)
    images = nn.functional.interpolate(small, scale_factor=4, mode="bilinear")
    return Calibration((images * 255).byte(), (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    """Two convolutions behind normalisations; `feature_info` and `num_classes` as timm's models have them."""

    num_classes = 5

    def __init__(self, bias: bool = False, norm: type[nn.Module] = nn.BatchNorm2d, **options) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=bias, **options), norm(32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def planned(model: nn.Module, *overrides: str, recipe: str = "aa"):
    graph = analyze(model, (3, 32, 32))
    settings = load_recipe(recipe, ("select.names=conv2", "budget.params=free", *overrides))
    return make_plan("resnet18", graph, settings)[0], graph


RATIOS = ("aa.key_ratio=1.0", "aa.value_ratio=0.25", "aa.heads=4")


def test_streamed_moments_are_those_of_all_positions_at_once():
    y, t = torch.randn(90, 3, 4), torch.randn(90, 5)
    moments = Moments()
    for rows in torch.arange(60).split(17):
        moments.add(y[rows], t[rows])
    other = Moments(like=moments)
    other.add(y[60:], t[60:])
    both = (moments + other).covariance(centred=True)
    flat, y0, t0 = y.flatten(1), y.flatten(1) - y.flatten(1).mean(0), t - t.mean(0)
    torch.testing.assert_close(both.yy.flatten(2).flatten(0, 1), y0.T @ y0 / 90, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.ty.flatten(1), t0.T @ y0 / 90, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.tt, t0.T @ t0 / 90, atol=1e-5, rtol=1e-4)
    raw = (moments + other).covariance(centred=False)
    torch.testing.assert_close(raw.ty.flatten(1), t.T @ flat / 90, atol=1e-5, rtol=1e-4)


def _data(heads: int, rank: int, channels: int = 5, targets: int = 6, count: int = 500):
    """Heads' features (count, heads, channels), and targets that projections of this rank compute exactly."""
    features = torch.randn(count, heads, channels)
    out, value = torch.randn(targets, heads, rank), torch.randn(heads, rank, channels)
    return features, torch.einsum("fhr,hrc,nhc->nf", out, value, features)


def _covariance(features: torch.Tensor, targets: torch.Tensor):
    moments = Moments()
    moments.add(features, targets)
    return moments.covariance(centred=False)


def test_one_head_is_the_reduced_rank_regression_that_a_search_finds():
    x, t = torch.randn(300, 1, 4), torch.randn(300, 3)
    t = t + x[:, 0] @ torch.randn(4, 3)
    moments = _covariance(x, t)
    heads = fit_heads(moments, rank=1, ridge=1e-9)
    angles = torch.linspace(0, torch.pi, 60)
    directions = torch.stack([torch.cat([torch.cos(a) * torch.ones(1), torch.sin(a) * torch.tensor([b.cos(), b.sin()])])
                              for a in angles for b in 2 * angles])  # fmt: skip
    best = min(_error_of_direction(x[:, 0], t, u) for u in directions)
    assert heads.errors(moments).sum() <= best + 1e-6
    assert heads.errors(moments).sum() > 0.97 * best
    predicted = torch.einsum("fhr,hrc,nhc->nf", heads.out.float(), heads.value.float(), x)
    torch.testing.assert_close(heads.errors(moments).float(), (t - predicted).square().mean(0), atol=1e-4, rtol=1e-4)


def _error_of_direction(x: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> float:
    fitted = torch.linalg.lstsq(x, t @ u).solution
    return float((t - (x @ fitted).outer(u)).square().mean(0).sum())


def test_projections_that_exist_are_found_again():
    features, targets = _data(heads=3, rank=2)
    moments = _covariance(features, targets)
    errors = fit_heads(moments, rank=2, ridge=1e-9, sweeps=200).errors(moments)
    assert (errors < 1e-2 * moments.tt.diagonal()).all()


def silent(*_) -> None:
    pass


def test_observed_sums_are_those_of_every_position():
    model, images = Net().eval(), calibration(24)
    layer = AAConv2d(16, 32, 3, padding=1, heads=4, key_channels=32, value_channels=8, resolution=16).eval()
    batches = list(images.fitting())
    seen = observe(model, {"conv2": layer}, batches, sum(map(len, batches)))[0]["conv2"].total()
    with torch.no_grad():
        x = torch.cat([model.bn1(model.conv1(batch)).relu() for batch in batches])
        features = head_maps(layer, x).permute(0, 3, 4, 1, 2).flatten(0, 2)
        targets = model.conv2(x).movedim(1, -1).flatten(0, 2)
    whole = _covariance(features, targets)
    assert seen.count == len(targets)
    torch.testing.assert_close(seen.covariance(centred=False).yy, whole.yy, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(seen.covariance(centred=False).ty, whole.ty, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def outputs_on(model: nn.Module, images: Calibration) -> torch.Tensor:
    return torch.cat([model.eval()(batch) for batch in images.fitting()])


def divergence(source: nn.Module, model: nn.Module, images: Calibration) -> float:
    """Mean KL(source || model) on the fitting images, nats."""
    p, q = (outputs_on(m, images).log_softmax(1) for m in (source, model))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_each_step_of_a_fit_brings_the_model_nearer_to_its_source():
    torch.manual_seed(0)
    source, images = Net(), calibration(60)
    nn.init.normal_(source.fc.weight)
    models = [copy.deepcopy(source) for _ in range(2)]
    plan, graph = planned(source, *RATIOS)
    carry(models[0], plan, graph)
    fits, targets = fit_sites(models[1], plan, graph, images, silent)
    install(models[1], plan, graph, fits)
    carried, fitted = (divergence(source, model, images) for model in models)
    torch.testing.assert_close(targets, outputs_on(source, images))
    polish(models[1], plan, images, targets, silent)
    assert divergence(source, models[1], images) < 0.7 * fitted < 0.7 * carried


def test_polishing_changes_attention_alone_and_leaves_no_trace():
    model, images = Net(), calibration()
    plan, graph = planned(model, *RATIOS, recipe="aa-aw")
    fits, targets = fit_sites(model, plan, graph, images, silent)
    install(model, plan, graph, fits)
    model.bn1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    polish(model, plan, images, targets, silent)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    attention = (
        "conv2.qkv.",
        "conv2.proj.",
        "conv2.rel_",
        "conv2.conv.expand.",
        "conv2.conv.reduce.",
        "conv2.conv.mix.",
    )
    assert changed
    assert all(name.startswith(attention) for name in changed), changed
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["bn1.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_kept_filters_stay_bit_for_bit_and_nothing_else_changes_but_running_means():
    torch.manual_seed(1)
    model = Net(bias=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan, graph = planned(model, *RATIOS)
    fit(model, plan, graph, calibration())
    after, order = model.state_dict(), model.conv2.channel_order
    kept = (order < 24).nonzero().flatten()
    assert torch.equal(after["conv2.conv.weight"], before["conv2.weight"][kept])
    assert torch.equal(after["conv2.conv.bias"], before["conv2.bias"][kept])
    changed = [k for k in before if k in after and not torch.equal(before[k], after[k])]
    assert changed == ["bn2.running_mean"]
    assert torch.equal(after["bn2.running_mean"][kept], before["bn2.running_mean"][kept])
    assert model.training


def test_the_number_of_a_site_is_its_error_on_images_that_it_was_not_fitted_to():
    torch.manual_seed(2)
    source, images = Net(), calibration(60)
    model = copy.deepcopy(source)
    plan, graph = planned(model, *RATIOS)
    (record,) = fit(model, plan, graph, images)
    for net in (model, source):
        net.eval().requires_grad_(False)
    x = torch.cat([source.bn1(source.conv1(batch)).relu() for batch in images.held_out()])
    given_up = (model.conv2.channel_order >= 24).nonzero().flatten()
    wanted = source.bn2(source.conv2(x))[:, given_up]
    missed = (model.bn2(model.conv2(x))[:, given_up] - wanted).square().mean((0, 2, 3))
    assert record.error == pytest.approx(float((missed / wanted.var((0, 2, 3), correction=0)).mean()), abs=1e-3)
    assert 0 < record.error < 1.2


def test_the_mean_behind_the_normalisation_is_the_sources():
    torch.manual_seed(3)
    source, images = Net(), calibration(60)
    model = copy.deepcopy(source)
    plan, graph = planned(model, *RATIOS)
    install(model, plan, graph, fit_sites(model, plan, graph, images, silent)[0])
    for net in (model, source):
        net.eval().requires_grad_(False)
    x = torch.cat([source.bn1(source.conv1(batch)).relu() for batch in images.fitting()])
    outputs = [m.bn2(m.conv2(x)).mean((0, 2, 3)) for m in (model, source)]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=0)


ALL = ("aa.key_ratio=1.0", "aa.value_ratio=1.0", "aa.heads=4")


@pytest.mark.parametrize(
    ("options", "overrides", "recipe"),
    [
        ({"stride": 2}, RATIOS, "aa"),
        ({"dilation": 2}, RATIOS, "aa"),
        ({}, (*RATIOS, "aa.attention_pool=2"), "aa"),
        ({"groups": 2}, (*RATIOS, "select.kinds=grouped"), "aa"),
        ({"norm": nn.Identity}, RATIOS, "aa"),
        ({}, ALL, "aa"),
        ({}, RATIOS, "aa-aw"),
    ],
    ids=["strided", "dilated", "pooled", "grouped", "without normalisation", "all channels", "with attended kernel"],
)
def test_sites_of_every_kind_are_fitted(options, overrides, recipe):
    model = Net(**options)
    plan, graph = planned(model, *overrides, recipe=recipe)
    (record,) = fit(model, plan, graph, calibration())
    assert record.kind == "fitted"
    assert record.error < 1.5
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_aw_is_exact_and_needs_no_fit():
    model = Net()
    plan, graph = planned(model, recipe="aw")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (record,) = fit(model, plan, graph, calibration())
    assert (record.kind, record.error) == ("exact", None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert not model.conv2.expand.weight.any()


def test_the_same_seed_gives_the_same_weights():
    def fitted() -> dict[str, torch.Tensor]:
        torch.manual_seed(4)
        model = Net()
        plan, graph = planned(model, *RATIOS)
        fit(model, plan, graph, calibration(24))
        return model.state_dict()

    first, second = fitted(), fitted()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_scale_is_the_root_of_the_fisher_informations_diagonal():
    """Against the exact sum over classes, for channels that are one position wide."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten())
    model.num_classes = 3
    model.requires_grad_(False)
    images = torch.randn(128, 2, 1, 1)
    found = fisher_roots(model, ["0"], iter([images]))["0"]
    probabilities = model(images).softmax(1)
    exact = (probabilities * (1 - probabilities)).mean(0).sqrt()  # logits are the channels: F = diag(p) - p p^T
    torch.testing.assert_close(found, exact / exact.mean(), atol=0.15, rtol=0)


def test_a_scale_sees_through_activations_in_place():
    torch.manual_seed(1)
    plain, inplace = (nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(kind), nn.Flatten()) for kind in (False, True))
    inplace.load_state_dict(plain.state_dict())
    images = torch.randn(16, 2, 3, 3)
    found = [fisher_roots(model, ["0"], [images.clone()])["0"] for model in (plain, inplace)]
    assert torch.equal(*found)


def test_channels_that_nothing_depends_on_are_given_up_first():
    torch.manual_seed(1)
    model = Net()
    unused = torch.tensor([1, 4, 9, 10, 17, 20, 25, 31])
    with torch.no_grad():
        model.fc.weight[:, unused] = 0
    plan, graph = planned(model, *RATIOS)
    fit(model, plan, graph, calibration())
    assert (model.conv2.channel_order >= 24).nonzero().flatten().tolist() == unused.tolist()


def test_activations_that_are_not_finite_are_an_error_that_names_the_site():
    model = Net()
    with torch.no_grad():
        model.conv1.weight[0] = torch.inf
    plan, graph = planned(model, *RATIOS)
    with pytest.raises(AugmentError, match="conv2: activations on the calibration images are not finite"):
        fit(model, plan, graph, calibration())
