"""Which sites a recipe takes, and the reason for every one it does not."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase

from augment_cli.analysis.site import ConvSite
from augment_cli.errors import AugmentError, nearest
from augment_cli.planning.choices import value_step, written
from augment_cli.planning.cost import Choice, Variant, attention_size
from augment_cli.planning.recipe import Sites

# Convolution classes whose kernel AWConv2d knows how to form.
ATTENDABLE = ("Conv2d", "Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


@dataclass(frozen=True)
class Selection:
    """The chosen sites with the split that the recipe's ratios ask for, and the others with their reasons."""

    chosen: tuple[tuple[ConvSite, Choice], ...]
    skipped: tuple[tuple[str, str], ...]


def select(sites: tuple[ConvSite, ...], settings: Sites) -> Selection:
    """Sort a model's convolutions by a recipe.

    Raises:
        AugmentError: a selector that matches nothing, or no site left.
    """
    _check_selectors(sites, settings)
    chosen, skipped = [], []
    for site in sites:
        reason = (
            _not_selected(site, sites, settings)
            or structural_obstacle(site, settings.variant)
            or _out_of_range(site, settings)
        )
        target = None if reason else written(site, settings)
        reason = reason or (one_position(site, target) if target else _too_narrow(site, settings))
        if reason:
            skipped.append((site.name, reason))
        else:
            chosen.append((site, target))
    if not chosen:
        raise AugmentError(f"no convolution to replace: {_summary(skipped)}. {_way_out(sites, settings)}")
    return Selection(tuple(chosen), tuple(skipped))


def _check_selectors(sites: tuple[ConvSite, ...], settings: Sites) -> None:
    names = [site.name for site in sites]
    for key in ("names", "exclude"):
        for pattern in getattr(settings, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise AugmentError(f"sites.{key}: {pattern!r} matches no convolution{_nearest_names(pattern, names)}")
    if settings.regex and not any(re.search(settings.regex, name) for name in names):
        raise AugmentError(f"sites.regex: {settings.regex!r} matches no convolution{_nearest_names('', names)}")
    of_kernel = [site for site in sites if _is_kernel(site, settings)]
    if not of_kernel:
        found = Counter("x".join(map(str, site.kernel_size)) for site in sites)
        kinds = _listed(f"{count} of {size}" for size, count in found.most_common()) or "none at all"
        raise AugmentError(f"sites.kernel: no {_squares(settings.kernel)} convolution here; there are {kinds}")
    stages = sorted({site.stage for site in sites})
    for stage in settings.stages:
        if stage not in stages:
            raise AugmentError(f"sites.stages: no stage {stage}; the convolutions are in stages {_listed(stages)}")
    for position in settings.positions:
        if not any(_at(site, sites, position) for site in of_kernel):
            most = max(site.position for site in of_kernel)
            raise AugmentError(f"sites.positions: no block has a position {position}; there are 0 to {most}")


def _nearest_names(pattern: str, names: list[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; {pattern} is a module, write {pattern}.* for the convolutions in it"
    return nearest(pattern, names) or f"; the names are like {_listed(names[:: max(1, len(names) // 4)])}"


def _listed(items) -> str:
    return ", ".join(map(str, items))


def _squares(kernels: tuple[int, ...]) -> str:
    return " or ".join(f"{k}x{k}" for k in kernels)


def missing_kernels(sites: tuple[ConvSite, ...], settings: Sites) -> list[int]:
    """Those of several kernel sizes that no convolution has; where none has any, `select` raises."""
    return [k for k in settings.kernel if not any(site.kernel_size == (k, k) for site in sites)]


def _is_kernel(site: ConvSite, settings: Sites) -> bool:
    return site.kernel_size in {(k, k) for k in settings.kernel}


def _at(site: ConvSite, sites: tuple[ConvSite, ...], position: int) -> bool:
    if position >= 0:
        return site.position == position
    mates = (s for s in sites if s.block == site.block and s.kernel_size == site.kernel_size)
    return site.position == max(s.position for s in mates) + 1 + position


def _not_selected(site: ConvSite, sites: tuple[ConvSite, ...], settings: Sites) -> str | None:
    if not _is_kernel(site, settings):
        return f"{'x'.join(map(str, site.kernel_size))} kernel, the recipe takes {_squares(settings.kernel)}"
    if site.reads_image:
        return "stem: reads the image"
    if site.stem and not settings.include_stem:
        return "stem (sites.include_stem=true takes it)"
    if site.kind not in settings.groups:
        return f"{site.kind} (sites.groups={site.kind} takes it)"
    if settings.names and not any(fnmatchcase(site.name, pattern) for pattern in settings.names):
        return "not selected by sites.names"
    if settings.regex and not re.search(settings.regex, site.name):
        return "not selected by sites.regex"
    if settings.stages and site.stage not in settings.stages:
        return f"not selected by sites.stages: in stage {site.stage}"
    if settings.positions and not any(_at(site, sites, position) for position in settings.positions):
        return f"not selected by sites.positions: position {site.position} in its block"
    if any(fnmatchcase(site.name, pattern) for pattern in settings.exclude):
        return "excluded by sites.exclude"
    return None


def structural_obstacle(site: ConvSite, variant: Variant) -> str | None:
    """Why a variant cannot stand in for this convolution under any settings; None where it can."""
    if site.obstacle:
        return site.obstacle
    if "aa" in variant and site.kind == "depthwise":
        return "depthwise: every channel is a group of its own, and AA gives up channels of whole groups only"
    if "aw" in variant and site.conv_class not in ATTENDABLE:
        return f"{site.conv_class} forms its kernel in a way that AW does not know"
    if "aa" in variant and any(k % 2 == 0 for k in site.kernel_size):
        return "even kernel: its windows have no centre to attend from"
    if "aa" in variant and site.padding != "same":
        widest = (d * (k - 1) // 2 for k, d in zip(site.kernel_size, site.dilation, strict=True))
        if any(p > most for p, most in zip(site.padding, widest, strict=True)):
            return "padded beyond its kernel: its border has no input to attend to"
    return None


def one_position(site: ConvSite, choice: Choice) -> str | None:
    """Why attention is of no use under this choice; None where its map has more than one position to attend to."""
    if not choice.value_channels or math.prod(attention_size(site.resolution, choice.attention_pool)) > 1:
        return None
    pooled = f" pooled by {choice.attention_pool}" if choice.attention_pool > 1 else ""
    return f"one position: attention on a map of {'x'.join(map(str, site.resolution))}{pooled} can do nothing"


def _out_of_range(site: ConvSite, settings: Sites) -> str | None:
    map_size = "x".join(map(str, site.resolution))
    if settings.largest_map and site.positions > settings.largest_map:
        return f"map too large: {map_size}, over sites.largest_map={settings.largest_map} positions"
    if site.out_channels < settings.smallest_width:
        return f"too few channels: {site.out_channels}, under sites.smallest_width={settings.smallest_width}"
    return None


def _too_narrow(site: ConvSite, settings: Sites) -> str:
    if site.groups > 1:
        step = value_step(site, settings.heads)
        return (
            f"grouped ({site.groups} groups): value channels come in multiples of {step}, so that groups and heads "
            f"stay whole, and value_ratio {settings.value_ratio:g} of {site.out_channels} is less"
        )
    return (
        f"too few channels: value_ratio {settings.value_ratio:g} of {site.out_channels} "
        f"gives {settings.heads} heads no value channel each"
    )


def _summary(skipped: list[tuple[str, str]]) -> str:
    reasons = Counter(re.split(r":|,| \(", reason)[0] for _, reason in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _way_out(sites: tuple[ConvSite, ...], settings: Sites) -> str:
    """What would take some, where something simple would."""
    replaceable = [
        site
        for site in sites
        if _is_kernel(site, settings) and not site.reads_image and not structural_obstacle(site, settings.variant)
    ]
    wanted = [site for site in replaceable if site.kind in settings.groups]
    size = _squares(settings.kernel)
    if wanted and all(site.stem for site in wanted) and not settings.include_stem:
        kinds = " or ".join(settings.groups)
        return f"Every {kinds} {size} convolution belongs to the stem: --set sites.include_stem=true takes those"
    if others := sorted({site.kind for site in replaceable} - set(settings.groups)):
        return f"The {size} convolutions are {' or '.join(others)}: --set sites.groups={others[0]} takes those"
    return "`augment plan --recipe aw` on this model, or sites.kernel, names and stages, show what there is"
