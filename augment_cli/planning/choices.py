"""What a site may become: the split a recipe's ratios ask for, and the splits a budget may choose from."""

import math
from itertools import product

from augment_cli.analysis.site import ConvSite
from augment_cli.planning.cost import Choice, attention_size
from augment_cli.planning.recipe import Sites

# How far from the written split a budget may look, in heads' worth of channels to either side. Close ones matter most:
# equal sites mix them; far ones are for budgets that ask for a lot.
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def written(site: ConvSite, settings: Sites) -> Choice | None:
    """The split that the recipe's ratios ask for; None where the site is too narrow for it."""
    reduction = _fitting_reduction(site, settings.reduction) if "aw" in settings.variant else 0
    if settings.variant == "aw":
        return Choice(reduction=reduction)
    heads = _heads(site, settings)
    keys = max(_multiple(settings.key_ratio * site.out_channels, heads), _least_keys(heads, settings))
    least_values = 0 if settings.narrow == "more-keys" or site.groups > 1 else heads
    values = max(_multiple(settings.value_ratio * site.out_channels, value_step(site, heads)), least_values)
    if values == 0 or (reduction and values == site.out_channels):
        return None
    return Choice(heads, keys, values, attention_pool(site, settings), reduction)


def attention_pool(site: ConvSite, settings: Sites) -> int:
    """The smallest of 1, 2, 4, ... that brings the map within the recipe's number of positions, or the largest."""
    if settings.attention_pool != "auto":
        return settings.attention_pool
    pools = [2**octave for octave in range(settings.max_attention_pool.bit_length())]
    sizes = (math.prod(attention_size(site.resolution, pool)) for pool in pools)
    return next((p for p, size in zip(pools, sizes, strict=True) if size <= settings.attention_positions), pools[-1])


def value_step(site: ConvSite, heads: int) -> int:
    """What value channels are a multiple of: as many for each head, and given up by each group, which stay whole."""
    return heads if site.groups == 1 else math.lcm(heads, site.groups)


def options(site: ConvSite, settings: Sites, target: Choice) -> tuple[Choice, ...]:
    """The admissible choices of a site, the written one among them. Heads and pool are the written ones.

    The reduction bends together with the value channels only: the whole product would be slow to search and offers
    hardly another count.
    """
    reductions = [0] if not target.reduction else _reductions(site, target.reduction)
    if not target.value_channels:
        return tuple(Choice(reduction=r) for r in reductions)
    heads = target.heads
    most_keys = max(2 * target.key_channels, site.out_channels // heads * heads)
    most_values = site.out_channels if target.value_channels == site.out_channels else site.out_channels - 1
    keys = _around(target.key_channels, heads, _least_keys(heads, settings), most_keys)
    step = value_step(site, heads)
    values = _around(target.value_channels, step, step, most_values)
    splits = {(k, v, target.reduction) for k, v in product(keys, values)}
    splits |= {(target.key_channels, v, r) for v, r in product(values, reductions)}
    return tuple(Choice(heads, k, v, target.attention_pool, r) for k, v, r in sorted(splits))


def distance(site: ConvSite, choice: Choice, target: Choice) -> float:
    """How far a choice is from the written one: the squared changes of kappa and upsilon, and of r in octaves."""
    keys = (choice.key_channels - target.key_channels) / site.out_channels
    values = (choice.value_channels - target.value_channels) / site.out_channels
    octaves = math.log2(choice.reduction / target.reduction) if target.reduction else 0
    return keys**2 + values**2 + (0.1 * octaves) ** 2


def _heads(site: ConvSite, settings: Sites) -> int:
    if settings.narrow == "more-keys":
        return settings.heads
    fitting = (
        heads
        for heads in range(settings.heads, 0, -1)
        if settings.heads % heads == 0
        and settings.key_ratio * site.out_channels >= heads * settings.min_key_channels
        and settings.value_ratio * site.out_channels >= heads
    )
    return next(fitting, 1)


def _least_keys(heads: int, settings: Sites) -> int:
    """A layer too narrow even for one head of the recipe's least keeps its ratio, where fewer heads are what gives."""
    return 1 if heads == 1 and settings.narrow == "fewer-heads" else heads * settings.min_key_channels


def _multiple(value: float, of: int) -> int:
    """Rounded down to a multiple, float noise aside: 0.1 x 80 is 8."""
    return math.floor(value / of + 1e-9) * of


def _around(center: int, step: int, least: int, most: int) -> list[int]:
    steps = (0, *_STEPS, *(-s for s in _STEPS))
    return sorted({v for v in (center + step * s for s in steps) if least <= v <= most} | {center})


def _fitting_reduction(site: ConvSite, reduction: int) -> int:
    return next(r for r in range(min(reduction, site.in_channels), 0, -1) if site.admits(r))


def _reductions(site: ConvSite, center: int) -> list[int]:
    return sorted({r for r in (center // 2, center, center * 2, center * 4) if r and site.admits(r)})
