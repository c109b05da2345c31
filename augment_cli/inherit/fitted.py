"""Attention fitted to what the filters that it replaces used to compute, on unlabelled images.

Sites are taken in the order in which the model calls them, each on the activations of the model as converted so far. At
a site (heads.py has the mathematics):

1. From moments of the window's taps, heads' patterns and projections are fitted to all filters; those that cost most to
   lose are kept, half of the others at a time, until as many as the plan gives up are left.
2. The patterns go into queries and tables (tables.py).
3. Projections are fitted again, to the attention maps that the layer then has.
4. A batch normalisation that follows takes up what the projections, which have no bias, leave of the mean: its running
   mean is estimated again for the fitted channels. Its running variance stays, and so does all else outside the site.

A filter's cost is its mean squared error times the Fisher information of the answer at its channel (fisher.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from augment_cli.calibration import Calibration
from augment_cli.graph import ModelGraph
from augment_cli.header import Inheritance
from augment_cli.inherit.carried import importance, record
from augment_cli.inherit.fisher import fisher_roots
from augment_cli.inherit.heads import Heads, alternate, choose_ridge, first_patterns, fit_heads
from augment_cli.inherit.moments import Covariance, Moments
from augment_cli.inherit.sampling import Sample, bring_to, positions, sample_site, window_maps
from augment_cli.inherit.tables import constant_direction, install_patterns
from augment_cli.layers import AAConv2d
from augment_cli.layers.attention import attention
from augment_cli.plan import Plan, SitePlan
from augment_cli.surgery import apply_plan, find_conv, keep_highest, replacement

_POSITIONS = 2**15
_ROUNDS, _LAST_SWEEPS = 4, 16

Progress = Callable[[str, int, int], None]
"""Told a site's name, how many sites are done, and how many there are."""


def fit(
    model: nn.Module,
    plan: Plan,
    graph: ModelGraph,
    calibration: Calibration,
    progress: Progress | None = None,
    scales: dict[str, Tensor] | None = None,
) -> tuple[Inheritance, ...]:
    """Apply a plan to a model with weights, in place, its attention fitted on calibration images.

    Draws what is not fitted from torch's generator, as `carry` does; draws the rest from seeds of its own.

    Args:
        scales: of the sites' filters, as `filter_scales` finds them, where that was done before.

    Raises:
        AugmentError: activations on the calibration images are not finite.
    """
    training, order = model.training, {site.name: i for i, site in enumerate(graph.sites)}
    norms = {site.name: site.norm for site in graph.sites}
    model.eval()
    scales = filter_scales(model, plan, calibration) if scales is None else scales
    records = {}
    for i, site in enumerate(sorted(plan.sites, key=lambda site: order[site.name])):
        if progress:
            progress(site.name, i, len(plan.sites))
        norm = model.get_submodule(norms[site.name]) if norms[site.name] else None
        records[site.name] = _fit_site(model, plan, site, norm, calibration, scales.get(site.name))
    model.train(training)
    return tuple(records[site.name] for site in plan.sites)


def filter_scales(model: nn.Module, plan: Plan, calibration: Calibration) -> dict[str, Tensor]:
    """What filters' errors are multiplied by, for each site that gives up some. Shape of each: (out_channels,)."""
    model.eval()
    names = [site.name for site in plan.sites if site.value_channels]
    return fisher_roots(model, names, calibration.fitting()) if names else {}


def _fit_site(
    model: nn.Module,
    plan: Plan,
    site: SitePlan,
    norm: nn.Module | None,
    calibration: Calibration,
    scale: Tensor | None,
) -> Inheritance:
    alone, conv = plan.model_copy(update={"sites": (site,)}), find_conv(model, site)
    score = importance(conv, norm)
    if not site.value_channels:
        apply_plan(model, alone)
        return record(site, score, list(range(site.out_channels)))
    fitting, held_out = _samples(model, site, calibration)
    task = _Task.of(site, conv, norm, fitting, scale)
    given_up, patterns = task.choose()
    kept = sorted(set(range(site.out_channels)) - set(given_up.tolist()))
    apply_plan(model, alone, lambda *_: kept)
    layer = model.get_submodule(site.name)
    task.install(layer, given_up, patterns)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
        norm.running_mean[given_up] -= _shortfall(layer, fitting, given_up).to(norm.running_mean)
    return record(site, score, kept, _error(layer, norm, held_out, fitting, given_up))


def _samples(model: nn.Module, site: SitePlan, calibration: Calibration) -> tuple[Sample, Sample]:
    """The site's data for the fit and for its number."""
    with torch.random.fork_rng(devices=[]):
        layer = replacement(find_conv(model, site), site).eval()
    parts = (calibration.fitting, 1 - calibration.held_out_share), (calibration.held_out, calibration.held_out_share)
    fitting, held_out = (sample_site(model, site.name, layer, batches(), share) for batches, share in parts)
    return fitting, held_out


@dataclass(frozen=True)
class _Task:
    """What is to be fitted at a site; `scale` is what a filter's error is multiplied by to make its cost."""

    site: SitePlan
    conv: nn.Conv2d
    fitting: Sample
    window: tuple[int, int]
    step: tuple[int, int]
    centred: bool
    scale: Tensor
    moments: Covariance
    ridge: float

    @classmethod
    def of(cls, site: SitePlan, conv: nn.Conv2d, norm: nn.Module | None, fitting: Sample, scale: Tensor) -> "_Task":
        # On a smaller map than the input's, a tap of the window covers several of the kernel's.
        whole = fitting.seen.shape[-2:] == fitting.computed.shape[-2:] and conv.stride == (1, 1)
        step = tuple(conv.dilation) if whole else (1, 1)
        window = tuple(min(size, 3) for size in conv.kernel_size)
        centred = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        halves: list[Moments] = []
        for part in fitting.split((len(fitting.seen) + 1) // 2):
            sums = Moments(like=halves[0] if halves else None)
            halves.append(_add_up(sums, part, lambda seen: window_maps(seen, window, step), _POSITIONS // 2))
        fitted, unseen = (half.covariance(centred) for half in halves)
        moments = (halves[0] + halves[1]).covariance(centred)
        every = torch.arange(site.out_channels)
        first, rank = first_patterns(site.heads, window), site.value_channels // site.heads
        weighed = [part.mixed(first).targets(every, scale) for part in (fitted, unseen)]
        ridge = choose_ridge(*weighed, rank)
        return cls(site, conv, fitting, window, step, centred, scale, moments, ridge)

    @property
    def rank(self) -> int:
        return self.site.value_channels // self.site.heads

    def choose(self) -> tuple[Tensor, Tensor]:
        """The filters to give up, and the heads' patterns for them. Shapes: (given up,), (heads, taps)."""
        chosen, patterns = torch.arange(self.site.out_channels), first_patterns(self.site.heads, self.window)
        while len(chosen) > self.site.value_channels:
            patterns, heads = self._alternate(chosen, patterns, rounds=1, sweeps=2)
            costs = torch.full((self.site.out_channels,), torch.inf)
            costs[chosen] = heads.errors(self.moments.mixed(patterns).targets(chosen, self.scale[chosen]))
            count = max(self.site.value_channels, len(chosen) // 2 // self.conv.groups * self.conv.groups)
            kept = keep_highest(costs.tolist(), self.conv, self.site.out_channels - count)
            chosen = torch.tensor(sorted(set(range(self.site.out_channels)) - set(kept)))
        return chosen, self._alternate(chosen, patterns, _ROUNDS, sweeps=4)[0]

    def _alternate(self, chosen: Tensor, patterns: Tensor, rounds: int, sweeps: int) -> tuple[Tensor, Heads]:
        moments = self.moments.targets(chosen, self.scale[chosen])
        return alternate(moments, patterns, self.window, self.rank, self.ridge, rounds, sweeps)

    def install(self, layer: AAConv2d, given_up: Tensor, patterns: Tensor) -> None:
        """Set a layer's attention."""
        x = self.fitting.seen.movedim(1, -1).flatten(0, 2)
        scale = constant_direction(x[:: -(-len(x) // _POSITIONS)])
        install_patterns(layer, patterns, self.window, self.step, scale)
        fitting = Sample(self.fitting.seen, self.fitting.computed[:, given_up])
        sums = _add_up(Moments(), fitting, lambda seen: head_maps(layer, seen), _POSITIONS)
        moments = sums.covariance(self.centred)
        every, scale = torch.arange(len(given_up)), self.scale[given_up]
        heads = fit_heads(moments.targets(every, scale), self.rank, self.ridge, _LAST_SWEEPS)
        install_projections(layer, heads, scale)


def _add_up(moments: Moments, sample: Sample, features: Callable[[Tensor], Tensor], most: int) -> Moments:
    """Add features against outputs to moments, at no more than about `most` positions, drawn at random."""
    size = sample.computed.shape[-2:]
    share = min(1.0, most / (len(sample.computed) * size.numel()))
    generator = torch.Generator().manual_seed(0)
    for part in sample.parts():
        y, t = positions(features(part.seen), size), positions(part.computed.unsqueeze(1), size).squeeze(1)
        drawn = torch.randperm(len(y), generator=generator)[: max(1, round(share * len(y)))] if share < 1 else ...
        moments.add(y[drawn], t[drawn])
    return moments


@torch.no_grad()
def head_maps(layer: AAConv2d, seen: Tensor) -> Tensor:
    """A_h X of every head. Shapes: (N, in_channels, h, w) to (N, heads, in_channels, h, w)."""
    query, key, _ = layer.qkv(seen).split([layer.key_channels, layer.key_channels, layer.value_channels], dim=1)
    query, key = (t.unflatten(1, (layer.heads, -1)).movedim(2, -1) for t in (query, key))
    value = seen.movedim(1, -1).unsqueeze(1).expand(-1, layer.heads, -1, -1, -1)
    return attention(query, key, value, layer.rel_height, layer.rel_width).movedim(-1, 2)


@torch.no_grad()
def install_projections(layer: AAConv2d, heads: Heads, scale: Tensor) -> None:
    """Set a layer's value and output projections; `scale` is what the targets were multiplied by."""
    value, out = heads.value.flatten(0, 1), heads.out.flatten(1) / scale.unsqueeze(1)
    # The same size on both sides, for the training that follows.
    balance = (out.norm() / value.norm().clamp_min(1e-12)).sqrt().clamp_min(1e-6)
    layer.qkv.weight[2 * layer.key_channels :, :, 0, 0] = (value * balance).to(layer.qkv.weight)
    layer.proj.weight[:, :, 0, 0] = (out / balance).to(layer.proj.weight)


@torch.no_grad()
def respond(layer: AAConv2d, seen: Tensor, size: tuple[int, int]) -> Tensor:
    """What a layer's attention makes of what it sees. Shapes: (N, in_channels, h, w) to (N, value_channels, H, W)."""
    value = layer.qkv.weight[2 * layer.key_channels :, :, 0, 0].unflatten(0, (layer.heads, -1))
    values = torch.einsum("hrc,nhcyx->nhryx", value, head_maps(layer, seen))
    return bring_to(layer.proj(values.flatten(1, 2)), size)


def _shortfall(layer: AAConv2d, sample: Sample, given_up: Tensor) -> Tensor:
    """Mean of what the filters computed less what attention computes. Shape: (given up,)."""
    total, count = 0.0, 0
    for part in sample.parts():
        missed = part.computed[:, given_up] - respond(layer, part.seen, part.computed.shape[-2:])
        total, count = total + missed.double().sum((0, 2, 3)), count + missed[:, 0].numel()
    return total / count


def _error(layer: AAConv2d, norm: nn.Module | None, held_out: Sample, fitting: Sample, given_up: Tensor) -> float:
    """Normalised mean squared error of the given-up filters, on average: 0 is exact, 1 no better than their means."""
    centred = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    shortfall = _shortfall(layer, fitting, given_up).view(-1, 1, 1) if centred else 0.0
    mean = held_out.computed[:, given_up].double().mean((0, 2, 3)).view(-1, 1, 1)
    missed = energy = 0.0
    for part in held_out.parts():
        target = part.computed[:, given_up].double()
        answer = respond(layer, part.seen, target.shape[-2:]).double() + shortfall
        missed = missed + (target - answer).square().sum((0, 2, 3))
        energy = energy + (target - mean).square().sum((0, 2, 3))
    return float((missed / energy.clamp_min(1e-6 * energy.mean().clamp_min(1e-12))).mean())
