"""Converted models, plans and models of timm, opened side by side; one analysis a model, however many plans."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from augment_cli import specs
from augment_cli.analysis.cache import look
from augment_cli.analysis.facts import Analysis, Source
from augment_cli.checkpoint.metadata import locate, metadata_of, read_metadata
from augment_cli.errors import AugmentError, InputError
from augment_cli.planning.frontier import Unit
from augment_cli.planning.frontier import frontier as plans_along
from augment_cli.planning.latency import LatencySettings
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.reading import read_plan
from augment_cli.planning.recipe import UNITS, Recipe, as_recipe
from augment_cli.reporting.comparison import Candidate, Comparison
from augment_cli.reporting.frontier import Frontier
from augment_cli.reporting.numbers import Change

if TYPE_CHECKING:
    from torch import nn

    from augment_cli.latency.timer import Timer

    Model = str | Path | Plan | nn.Module
    OneRecipe = str | Path | Recipe


def compare(
    *models: "Model",
    recipe: "OneRecipe | Sequence[OneRecipe]" = (),
    overrides: str | Sequence[str] = (),
    input_size: specs.ImageSize | None = None,
    cached: bool = True,
    latency: bool = False,
    **args: Any,
) -> Comparison:
    """Compare converted models, plans and models as they are, or one model under several recipes and budgets.

    Args:
        models: converted models, their files or folders, plans or their JSON files, modules, names of timm's models,
            and `package.module:function`.
        recipe: one or several for every module and name, each by name, path or as an object.
        overrides: one or several values of the recipes; "budget.params=keep,-5%" asks for a plan with each.
        input_size: of an image for names and modules, as for `convert`. None takes the model's own.
        cached: keep what is found of timm's models in the user's cache folder.
        latency: measure the time of each plan's model beside its source on this machine, as the first recipe says.
        args: arguments for timm.create_model or the function.

    Raises:
        AugmentError: no such model or recipe, or not one of the plans is possible.

    Example:
        >>> found = compare("test_resnet", recipe=("aa", "aw"), overrides=("budget.params=keep,-5%",))
        >>> [candidate.label for candidate in found.candidates]
        ['test_resnet', 'test_resnet aa budget.params=keep', 'test_resnet aa budget.params=-5%']
        >>> len(found.impossible)
        2
    """
    if not models:
        raise InputError("nothing to compare: name a model")
    recipes = list(_recipes(recipe, overrides))
    named = [model for model in models if not _is_planned(model)]
    if recipes and not named:
        raise InputError("recipes and their values are for models by name: every model here has its plan")
    candidates: list[Candidate] = []
    impossible: list[tuple[str, str]] = []
    for model in models:
        if _is_planned(model):
            opened = _open(model)
            candidates.append(_timed(opened, recipes, cached) if latency else opened)
            continue
        source, analysis = _look(model, args, input_size, cached)
        name = model if isinstance(model, str) else source.name
        candidates.append(_as_it_is(name, source, analysis))
        for words, settings in recipes:
            label = (
                " ".join((candidates[-1].model, *words)) if not isinstance(model, str) else " ".join((model, *words))
            )
            try:
                plan = _plan(model, source, analysis, settings, cached, latency)
            except AugmentError as error:
                impossible.append((label, str(error)))
            else:
                candidates.append(Candidate.of(label, plan))
    if recipes and len(impossible) == len(recipes) * len(named):
        raise InputError(f"{impossible[0][0]}: {impossible[0][1]}")
    return Comparison(tuple(candidates), tuple(impossible))


def frontier(
    model: "str | nn.Module",
    recipe: "OneRecipe" = "aa",
    *overrides: str,
    unit: Unit = "params",
    points: int = 9,
    input_size: specs.ImageSize | None = None,
    cached: bool = True,
    **args: Any,
) -> Frontier:
    """Plans for a range of budgets: the Pareto front of a count against the distance from the recipe.

    Args:
        model, recipe, overrides: as for `plan`.
        unit: "params", "macs" or "latency", which is measured on this machine.
        points: how many budgets, 2 or more; equal plans are one point.
        input_size, cached, args: as for `compare`.

    Raises:
        AugmentError: bad input, or nothing to replace.

    Example:
        >>> front = frontier("test_resnet", points=3)
        >>> [point.plan.params_after < front.points[-1].plan.params_after for point in front.points]
        [True, True, False]
    """
    if unit not in UNITS or points < 2:
        raise InputError(f"`unit` is one of {', '.join(UNITS)}, and `points` at least 2")
    source, analysis = _look(model, args, input_size, cached)
    settings = as_recipe(recipe, overrides)
    if unit != "latency" and settings.budget.latency == "free":
        return Frontier(tuple(plans_along(source, analysis, settings, unit, points)), unit)
    from augment_cli.latency.timer import frontier_within

    timer = _timer(model, source, analysis, settings, cached)
    return Frontier(tuple(frontier_within(source, analysis, settings, unit, points, timer)), unit)


def _plan(
    model: "Model", source: Source, analysis: Analysis, recipe: Recipe, cached: bool, latency: bool = False
) -> Plan:
    """A recipe's plan; its latency is measured on this machine for a budget of it, or where it is asked for."""
    if recipe.budget.latency == "free" and not latency:
        return make_plan(source.name, analysis, recipe, source.args, base=source.base)[0]
    from augment_cli.latency.timer import plan_within

    return plan_within(source, analysis, recipe, _timer(model, source, analysis, recipe, cached))[0]


def _timer(model: "Model", source: Source, analysis: Analysis, recipe: Recipe, cached: bool) -> "Timer":
    from augment_cli.analysis.source import create
    from augment_cli.latency.timer import Timer

    named = isinstance(model, (str, Path))

    def make() -> "nn.Module":
        return create(source) if named else cast("nn.Module", model)

    return Timer(source, analysis, recipe.latency, make, cached=cached and named)


def _timed(candidate: Candidate, recipes: list[tuple[list[str], Recipe]], cached: bool) -> Candidate:
    """A candidate that was opened, with its latency on this machine, measured as the first recipe says."""
    from augment_cli.latency.timer import measure_latency

    assert candidate.plan is not None  # _open
    settings = recipes[0][1].latency if recipes else LatencySettings()
    return replace(candidate, plan=measure_latency(candidate.plan, settings, cached=cached))


def check_models(models: Iterable[str]) -> None:
    """Refuse models that are neither files, folders nor names that timm knows, before anything is read.

    Raises:
        AugmentError: names the first.
    """
    for model in models:
        if Path(model).suffix == ".json" and not Path(model).exists():
            raise InputError(f"{model}: no such file")
        specs.check_model(model)


def _recipes(
    given: "OneRecipe | Sequence[OneRecipe]", overrides: str | Sequence[str]
) -> Iterator[tuple[list[str], Recipe]]:
    """Every recipe under every combination of the overrides' values, each with the words that tell it from others."""
    chosen = (given,) if isinstance(given, (str, Path, Recipe)) else tuple(given) or (("aa",) if overrides else ())
    given_values = map(alternatives, (overrides,) if isinstance(overrides, str) else overrides)
    for recipe, values in product(chosen, product(*given_values)):
        name = recipe.name if isinstance(recipe, Recipe) else str(recipe)
        yield [name, *values], as_recipe(recipe, values)


def alternatives(override: str) -> list[str]:
    """KEY=A,B as KEY=A and KEY=B; a comma within brackets or quotes belongs to a value.

    >>> alternatives("budget.params=keep,-5%"), alternatives("select.stages=[3,4],[4]")
    (['budget.params=keep', 'budget.params=-5%'], ['select.stages=[3,4]', 'select.stages=[4]'])
    """
    key, separator, text = override.partition("=")
    values, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "\"'":
            quote = "" if letter == quote else quote or letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += letter
    return [f"{key}{separator}{value.strip()}" for value in values]


def _is_planned(model: "Model") -> bool:
    """Whether a model is a plan or a converted model."""
    if isinstance(model, (str, Path)):
        return locate(model).exists() or Path(model).suffix in (".json", ".safetensors")
    return isinstance(model, Plan) or metadata_of(model) is not None


def _open(model: "Model") -> Candidate:
    if isinstance(model, Plan):
        return Candidate.of(f"{model.model} {model.recipe}", model)
    if not isinstance(model, (str, Path)):
        metadata = metadata_of(model)
        assert metadata is not None  # _is_planned
        return Candidate.of(f"{metadata.plan.model} {metadata.plan.recipe}", metadata.plan, metadata.fidelity)
    if Path(model).suffix == ".json":
        return Candidate.of(str(model), read_plan(Path(model)))
    metadata = read_metadata(Path(model))
    return Candidate.of(str(model), metadata.plan, metadata.fidelity)


def _look(
    model: "Model", args: dict[str, Any], input_size: specs.ImageSize | None, cached: bool
) -> tuple[Source, Analysis]:
    size = specs.height_width(input_size)
    if isinstance(model, (str, Path)):
        found = look(str(model), args, size, cached)
        specs.check_channels(input_size, found[0].input_size[0])
        return found
    from augment_cli.analysis.graph import analyze
    from augment_cli.analysis.source import describe_module

    if args:
        raise InputError(f"a module knows its own arguments: leave out {', '.join(args)}")
    source, meta_model = describe_module(model, size)  # type: ignore[arg-type]  # _is_planned: a Plan is opened
    return source, analyze(meta_model, source.input_size)


def _as_it_is(label: str, source: Source, analysis: Analysis) -> Candidate:
    params, macs = (Change(count, count) for count in (analysis.params, analysis.macs))
    return Candidate(label, source.name, source.input_size, params, macs)
