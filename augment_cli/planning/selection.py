"""Which sites a recipe takes, and the reason for every one it does not."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from augment_cli.analysis.site import ConvSite
from augment_cli.errors import InputError, nearest
from augment_cli.operators import Operator, Split, get_operator
from augment_cli.planning.recipe import Recipe, Select, builtin_recipes, load_recipe


@dataclass(frozen=True)
class Selection:
    """The chosen sites with the split that the recipe asks for, and the others with their reasons."""

    chosen: tuple[tuple[ConvSite, Split], ...]
    skipped: tuple[tuple[str, str], ...]


def select(sites: tuple[ConvSite, ...], recipe: Recipe) -> Selection:
    """Sort a model's convolutions by a recipe.

    Raises:
        AugmentError: a selector that matches nothing, or no site left.
    """
    _check_selectors(sites, recipe.select)
    found = _sort(sites, recipe)
    if not found.chosen:
        raise InputError(f"no convolution to replace: {_summary(found.skipped)}. {_way_out(sites, recipe)}")
    return found


def _sort(sites: tuple[ConvSite, ...], recipe: Recipe) -> Selection:
    settings, operator = recipe.select, get_operator(recipe.operator)
    chosen, skipped = [], []
    for site in sites:
        reason = _not_selected(site, sites, settings) or obstacle(site, operator) or _out_of_range(site, settings)
        split = None if reason else operator.written(site, recipe)
        if split is None:
            reason = reason or operator.refusal(site, recipe)
        else:
            reason = operator.idle(site, split)
            if reason is None:
                chosen.append((site, split))
        if reason:
            skipped.append((site.name, reason))
    return Selection(tuple(chosen), tuple(skipped))


def obstacle(site: ConvSite, operator: Operator) -> str | None:
    """Why an operator cannot take this convolution's place under any settings; None where it can."""
    return site.obstacle or operator.obstacle(site)


def _check_selectors(sites: tuple[ConvSite, ...], settings: Select) -> None:
    names = [site.name for site in sites]
    for key in ("names", "exclude"):
        for pattern in getattr(settings, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(f"select.{key}: {pattern!r} matches no convolution{_nearest_names(pattern, names)}")
    if settings.regex and not any(re.search(settings.regex, name) for name in names):
        raise InputError(f"select.regex: {settings.regex!r} matches no convolution{_nearest_names('', names)}")
    of_kernel = [site for site in sites if _is_kernel(site, settings)]
    if not of_kernel:
        found = Counter("x".join(map(str, site.kernel_size)) for site in sites)
        kinds = _listed(f"{count} of {size}" for size, count in found.most_common()) or "none at all"
        raise InputError(
            f"select.kernel: no {_squares(settings.kernel)} convolution here; there are {kinds}. {_recipes_for(sites)}"
        )
    stages = sorted({site.stage for site in sites})
    for stage in settings.stages:
        if stage not in stages:
            raise InputError(f"select.stages: no stage {stage}; the convolutions are in stages {_listed(stages)}")
    for index in settings.block_indices:
        if not any(_at(site, sites, index) for site in of_kernel):
            most = max(site.block_index for site in of_kernel)
            raise InputError(f"select.block_indices: no block has an index {index}; there are 0 to {most}")


def _nearest_names(pattern: str, names: list[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; {pattern} is a module, write {pattern}.* for the convolutions in it"
    return nearest(pattern, names) or f"; the names are like {_listed(names[:: max(1, len(names) // 4)])}"


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


def _squares(kernels: tuple[int, ...]) -> str:
    return " or ".join(f"{k}x{k}" for k in kernels)


def missing_kernels(sites: tuple[ConvSite, ...], settings: Select) -> list[int]:
    """Kernel sizes of the recipe that no convolution of the model has. Where it has none of them, `select` raises."""
    return [k for k in settings.kernel if not any(site.kernel_size == (k, k) for site in sites)]


def _is_kernel(site: ConvSite, settings: Select) -> bool:
    return site.kernel_size in {(k, k) for k in settings.kernel}


def _at(site: ConvSite, sites: tuple[ConvSite, ...], index: int) -> bool:
    if index >= 0:
        return site.block_index == index
    mates = (s for s in sites if s.block == site.block and s.kernel_size == site.kernel_size)
    return site.block_index == max(s.block_index for s in mates) + 1 + index


def _not_selected(site: ConvSite, sites: tuple[ConvSite, ...], settings: Select) -> str | None:
    if not _is_kernel(site, settings):
        return f"{'x'.join(map(str, site.kernel_size))} kernel, the recipe takes {_squares(settings.kernel)}"
    if site.reads_image:
        return "stem: reads the image"
    if site.stem and not settings.include_stem:
        return "stem (select.include_stem=true takes it)"
    if site.pyramid and not settings.include_pyramid:
        return "feature pyramid (select.include_pyramid=true takes it)"
    if max(site.stride) > 1 and not settings.include_strided:
        return "strided (select.include_strided=true takes it)"
    if site.kind not in settings.kinds:
        return f"{site.kind} (select.kinds={site.kind} takes it)"
    if settings.names and not any(fnmatchcase(site.name, pattern) for pattern in settings.names):
        return "not selected by select.names"
    if settings.regex and not re.search(settings.regex, site.name):
        return "not selected by select.regex"
    if settings.stages and site.stage not in settings.stages:
        return f"not selected by select.stages: in stage {site.stage}"
    if settings.block_indices and not any(_at(site, sites, index) for index in settings.block_indices):
        return f"not selected by select.block_indices: index {site.block_index} in its block"
    if any(fnmatchcase(site.name, pattern) for pattern in settings.exclude):
        return "excluded by select.exclude"
    return None


def _out_of_range(site: ConvSite, settings: Select) -> str | None:
    map_size = "x".join(map(str, site.resolution))
    if settings.largest_map and site.positions > settings.largest_map:
        return f"map too large: {map_size}, over select.largest_map={settings.largest_map} positions"
    if site.out_channels < settings.smallest_width:
        return f"too few channels: {site.out_channels}, under select.smallest_width={settings.smallest_width}"
    return None


def _summary(skipped: Iterable[tuple[str, str]]) -> str:
    reasons = Counter(re.split(r":|,| \(", reason)[0] for _, reason in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


def _way_out(sites: tuple[ConvSite, ...], recipe: Recipe) -> str:
    """A setting that would select some convolutions, or else the recipes that replace some in this model."""
    settings, operator = recipe.select, get_operator(recipe.operator)
    replaceable = [
        site for site in sites if _is_kernel(site, settings) and not site.reads_image and not obstacle(site, operator)
    ]
    wanted = [site for site in replaceable if site.kind in settings.kinds]
    size = _squares(settings.kernel)
    if wanted and all(site.stem for site in wanted) and not settings.include_stem:
        kinds = " or ".join(settings.kinds)
        return f"Every {kinds} {size} convolution belongs to the stem: select.include_stem=true takes those"
    if others := sorted({site.kind for site in replaceable} - set(settings.kinds)):
        return f"The {size} convolutions are {' or '.join(others)}: select.kinds={others[0]} takes those"
    return _recipes_for(sites)


def _recipes_for(sites: tuple[ConvSite, ...]) -> str:
    """The built-in recipes that replace some of these convolutions, as a sentence."""
    counts = {name: len(_sort(sites, load_recipe(name)).chosen) for name in builtin_recipes()}
    working = [f"{name} ({count} convolutions)" for name, count in counts.items() if count]
    if not working:
        return "No built-in recipe finds a convolution to replace in this model"
    return f"Recipes that do on this model: {', '.join(working)}"
