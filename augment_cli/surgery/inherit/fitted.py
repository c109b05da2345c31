"""Attention that starts near what the filters that it replaces compute, and stays free to learn; no labels are needed.

Queries, keys and relative tables stay random, so that attention maps reach over the image and depend on its content:
maps fitted to the filters' windows agree with the source, too, and learn nothing afterwards (docs/fitting.md). In three
steps:

1. Queries and keys are whitened and scaled by the input that they get, so that logits are spread alike in every model
   (spread.py).
2. One pass of the source over the images sums up, at every site, moments of what the heads then see (sampling.py).
   Value and output projections are a ridge regression on the filters' outputs (heads.py). The filters that cost most to
   lose are kept, half of the others at a time, until as many as the plan gives up are left. A filter's cost is its mean
   squared error times the Fisher information of the answer at its channel (fisher.py). A batch normalisation that
   follows takes up what the projections, which have no bias, leave of the mean.
3. The whole converted model is brought nearer to its source's predictions by a few steps of gradient descent on the
   attention alone (polish.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from augment_cli.analysis.graph import ModelGraph
from augment_cli.compat import BatchNorm
from augment_cli.layers import AAConv2d
from augment_cli.operators import get_operator
from augment_cli.planning.plan import Plan, SitePlan
from augment_cli.surgery.calibration import Calibration
from augment_cli.surgery.inherit.carried import importance, record
from augment_cli.surgery.inherit.fisher import fisher_roots
from augment_cli.surgery.inherit.heads import Heads, choose_ridge, fit_heads
from augment_cli.surgery.inherit.polish import polish
from augment_cli.surgery.inherit.sampling import Seen, observe, outputs
from augment_cli.surgery.inherit.spread import spread
from augment_cli.surgery.records import Inheritance
from augment_cli.surgery.replace import apply_plan, find_conv, keep_highest, replacement

_LAST_SWEEPS = 16
_MOST_BYTES = 3 * 2**29
"""Sums of all sites that are fitted in one pass, as many as ResNet-50 has. More sites take more passes."""

Progress = Callable[[str, int, int], None]
"""Told what is done now, how much of it is done, and how much there is."""


def fit(
    model: nn.Module,
    plan: Plan,
    graph: ModelGraph,
    calibration: Calibration,
    progress: Progress | None = None,
) -> tuple[Inheritance, ...]:
    """Apply a plan to a model with weights, in place, its attention fitted on calibration images.

    Draws queries, keys and tables from torch's generator, as `carry` does; draws the rest from seeds of its own.

    Raises:
        AugmentError: activations on the calibration images are not finite.
    """
    progress = progress or (lambda *_: None)
    training = model.training
    fits, targets = fit_sites(model, plan, graph, calibration, progress)
    given_up = {name: found.given_up for name, found in fits.items()}
    wanted = outputs(model, given_up, calibration.held_out())
    records = install(model, plan, graph, fits)
    if targets is not None:
        polish(model, plan, calibration, targets, progress)
    got = outputs(model, given_up, calibration.held_out())
    errors = {name: _error(got[name], wanted[name], found.shortfall) for name, found in fits.items()}
    model.train(training)
    return tuple(r.model_copy(update={"error": errors[r.name]}) if r.name in errors else r for r in records)


def install(model: nn.Module, plan: Plan, graph: ModelGraph, fits: dict[str, "Fit"]) -> tuple[Inheritance, ...]:
    """Apply a plan to a model, in place, with a fit for each site that gives up filters."""
    norms = {site.name: site.norm for site in graph.sites}
    scores = {site.name: importance(find_conv(model, site), _norm(model, norms[site.name])) for site in plan.sites}
    kept: dict[str, list[int]] = {}

    def keep(name: str, conv: nn.Conv2d, count: int) -> list[int]:
        kept[name] = fits[name].kept if name in fits else keep_highest(scores[name].tolist(), conv, count)
        return kept[name]

    apply_plan(model, plan, keep)
    for site in plan.sites:
        layer = model.get_submodule(site.name)
        if site.name in fits and isinstance(layer, AAConv2d):
            fits[site.name].install(layer, _norm(model, norms[site.name]))
    return tuple(_record(site, scores[site.name], kept.get(site.name), site.name in fits) for site in plan.sites)


def _norm(model: nn.Module, name: str | None) -> nn.Module | None:
    return model.get_submodule(name) if name else None


def _record(site: SitePlan, score: Tensor, kept: list[int] | None, fitted: bool) -> Inheritance:
    made = record(site, score, list(range(site.out_channels)) if kept is None else kept)
    return made.model_copy(update={"kind": "fitted"}) if fitted else made


@dataclass(frozen=True)
class Fit:
    """A site's fit.

    probe: a layer with the queries, keys and tables. kept, given_up: output channels. heads: projections to the
    outputs of the given-up filters, multiplied by `scale` (given up,). shortfall: mean of what is left (given up,),
    zero where no normalisation takes it up.
    """

    probe: AAConv2d
    kept: list[int]
    given_up: Tensor
    heads: Heads
    scale: Tensor
    shortfall: Tensor

    @torch.no_grad()
    def install(self, layer: AAConv2d, norm: nn.Module | None) -> None:
        """Set a layer's attention, and move the running mean of the batch normalisation that follows."""
        layer.qkv.weight.copy_(self.probe.qkv.weight)
        layer.rel_height.copy_(self.probe.rel_height)
        layer.rel_width.copy_(self.probe.rel_width)
        value, out = self.heads.value.flatten(0, 1), self.heads.out.flatten(1) / self.scale.unsqueeze(1)
        # The same size on both sides, for the training that follows.
        balance = (out.norm() / value.norm().clamp_min(1e-12)).sqrt().clamp_min(1e-6)
        layer.qkv.weight[2 * layer.key_channels :, :, 0, 0] = (value * balance).to(layer.qkv.weight)
        layer.proj.weight[:, :, 0, 0] = (out / balance).to(layer.proj.weight)
        mean = _running_mean(norm)
        if mean is not None:
            mean[self.given_up] -= self.shortfall.to(mean)


def _running_mean(norm: nn.Module | None) -> Tensor | None:
    """The mean that a normalisation takes off, where it was estimated before."""
    return norm.running_mean if isinstance(norm, BatchNorm) else None


def fit_sites(
    model: nn.Module, plan: Plan, graph: ModelGraph, calibration: Calibration, progress: Progress
) -> tuple[dict[str, Fit], Tensor | None]:
    """Fit each site that gives up filters; the model is put into evaluation mode and not changed.

    Returns the fits by the sites' names, and the model's outputs on the fitting images, or None where they are not one
    tensor or nothing is fitted.

    Raises:
        AugmentError: activations on the calibration images are not finite.
    """
    norms = {site.name: site.norm for site in graph.sites}
    model.eval()
    built = {site.name: replacement(find_conv(model, site), site).eval() for site in plan.sites}
    fittable = {site.name for site in plan.sites if get_operator(site.operator).fittable}
    probes = {name: layer for name, layer in built.items() if name in fittable and isinstance(layer, AAConv2d)}
    sites = [site for site in plan.sites if site.name in probes]
    if not sites:
        return {}, None
    spread(model, probes, next(iter(calibration.fitting())))
    scales = fisher_roots(model, [site.name for site in sites], calibration.fitting())
    passes, fits = _passes(sites, probes), dict[str, Fit]()
    count, answers = len(calibration.images) - calibration.held, None
    for number, part in enumerate(passes):
        layers = {site.name: probes[site.name] for site in part}
        before, total = number * count, len(passes) * count
        advance = partial(_advance, progress, before, total)
        seen, answers = observe(model, layers, calibration.fitting(), count, advance)
        for site in part:
            conv, norm = find_conv(model, site), _norm(model, norms[site.name])
            own = seen.pop(site.name), scales[site.name]
            fits[site.name] = _fit_site(site, conv, probes[site.name], _running_mean(norm) is not None, *own)
            progress("fitting", len(fits), len(sites))
    return fits, answers


def _advance(progress: Progress, before: int, total: int, done: int) -> None:
    progress("observing", before + done, total)


def _passes(sites: list[SitePlan], probes: dict[str, AAConv2d]) -> list[list[SitePlan]]:
    """Sites in parts whose sums fit _MOST_BYTES."""
    parts, size = [list[SitePlan]()], 0
    for site in sites:
        features = probes[site.name].heads * site.in_channels
        own = 2 * 8 * (features**2 + features * site.out_channels + site.out_channels**2)
        if parts[-1] and size + own > _MOST_BYTES:
            parts, size = [*parts, []], 0
        parts[-1].append(site)
        size += own
    return parts


def _fit_site(site: SitePlan, conv: nn.Conv2d, probe: AAConv2d, centred: bool, fitting: Seen, scale: Tensor) -> Fit:
    """Projections for the filters that attention replaces best, from sums over images."""
    rank, every = probe.value_channels // probe.heads, torch.arange(site.out_channels)
    first, second = (half.targets(every, scale) for half in fitting.covariances(centred))
    ridge = choose_ridge(first, second, rank)
    sums = fitting.total()
    moments = sums.covariance(centred)
    given_up = every
    while len(given_up) > site.given_up:
        heads = fit_heads(moments.targets(given_up, scale[given_up]), rank, ridge, sweeps=2)
        costs = torch.full((site.out_channels,), torch.inf)
        costs[given_up] = heads.errors(moments.targets(given_up, scale[given_up]))
        count = max(site.given_up, len(given_up) // 2 // conv.groups * conv.groups)
        kept = keep_highest(costs.tolist(), conv, site.out_channels - count)
        given_up = torch.tensor(sorted(set(range(site.out_channels)) - set(kept)))
    kept = sorted(set(range(site.out_channels)) - set(given_up.tolist()))
    own = scale[given_up]
    heads = fit_heads(moments.targets(given_up, own), rank, ridge, _LAST_SWEEPS)
    features, targets = sums.means()
    shortfall = targets[given_up] - heads.predict(features) / own if centred else torch.zeros_like(own)
    return Fit(probe, kept, given_up, heads, own, shortfall)


def _error(got: Tensor, wanted: Tensor, shortfall: Tensor) -> float:
    """Normalised mean squared error of attention against the filters that it replaces, on average over the channels.

    0 is exact, 1 no better than the filters' means. Shapes: got, wanted (N, channels, H, W), shortfall (channels,).
    """
    missed = (got.double() + shortfall.view(-1, 1, 1) - wanted).square().mean((0, 2, 3))
    energy = wanted.double().var((0, 2, 3), correction=0)
    return round(float((missed / energy.clamp_min(1e-6 * energy.mean().clamp_min(1e-12))).mean()), 6)
