"""The frontier of a recipe on a model: for a range of budgets, the plan that costs least of what the recipe wants."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from augment_cli.analysis.facts import Analysis, Source
from augment_cli.errors import BudgetError
from augment_cli.operators import get_operator
from augment_cli.planning.budget import Counts, attainable
from augment_cli.planning.latency import Times
from augment_cli.planning.plan import Plan, Sensitivity, make_plan
from augment_cli.planning.recipe import Recipe
from augment_cli.planning.selection import select

Unit = Literal["params", "macs", "latency"]


@dataclass(frozen=True)
class Point:
    """A plan and its loss: the predicted divergence, nats, where sites were measured; else its distance.

    The distance from the recipe is the sum over the sites of their operator's, which the budget's program minimises.
    """

    plan: Plan
    loss: float


def frontier(
    source: Source,
    analysis: Analysis,
    recipe: Recipe,
    unit: Unit,
    points: int,
    sensitivity: Mapping[str, Sensitivity] | None = None,
    times: Times | None = None,
) -> list[Point]:
    """The Pareto front of a count against the loss: points, smallest first, none of which another one beats in both.

    Budgets are spread evenly from the least that the sites can have to what the recipe's own splits have; the recipe's
    budget for the other counts holds throughout.

    Args:
        points: how many budgets, 2 or more; equal plans are one point.
        sensitivity: of every chosen site, by name, where it was measured.
        times: of the model and its sites, for the latency.

    Raises:
        AugmentError: no site, or a budget that cannot be met.
    """
    measured = dict(sensitivity or {})
    point = partial(_point, source, analysis, measured, times)
    free = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={unit: "free"})})
    chosen = select(analysis.sites, recipe).chosen
    widest = point(free)
    least, _ = attainable(chosen, recipe, Counts(analysis.params, analysis.macs), times if unit == "latency" else None)[
        unit
    ]
    most = count(widest, unit)
    found = [widest]
    for i in range(points - 1):
        limit = least + (most - least) * i // (points - 1)
        budget = recipe.budget.model_copy(update={unit: f"{limit}ns" if unit == "latency" else str(limit)})
        try:
            found.append(point(recipe.model_copy(update={"budget": budget})))
        except BudgetError:  # out of reach together with the other budgets, or with the recipe's mean ratio
            continue
    return _front(found, unit)


def count(point: Point, unit: Unit) -> int:
    """A point's parameters, multiply-adds or predicted nanoseconds."""
    if unit == "latency":
        return point.plan.latency.predicted if point.plan.latency else 0
    return point.plan.params_after if unit == "params" else point.plan.macs_after


def _point(
    source: Source, analysis: Analysis, measured: dict[str, Sensitivity], times: Times | None, recipe: Recipe
) -> Point:
    plan, _ = make_plan(source.name, analysis, recipe, source.args, measured or None, source.base, times)
    predicted = plan.predicted_divergence
    return Point(plan, _distance(plan, analysis, recipe) if predicted is None else predicted)


def _distance(plan: Plan, analysis: Analysis, recipe: Recipe) -> float:
    operator, splits = get_operator(recipe.operator), {site.name: site.split for site in plan.sites}
    return sum(
        operator.distance(site, splits[site.name], written)
        if site.name in splits
        else operator.distance_left(site, written) or 0.0
        for site, written in select(analysis.sites, recipe).chosen
    )


def _front(points: list[Point], unit: Unit) -> list[Point]:
    """The points that no other beats, by count."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (count(point, unit), point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front
