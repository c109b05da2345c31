"""The frontier of a recipe on a model: for a range of budgets, the plan that costs least of what the recipe wants."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from augment_cli.analysis.facts import Analysis, Source
from augment_cli.errors import BudgetError
from augment_cli.operators import get_operator
from augment_cli.planning.budget import Counts, attainable
from augment_cli.planning.plan import Plan, Sensitivity, make_plan
from augment_cli.planning.recipe import Recipe
from augment_cli.planning.selection import select

Unit = Literal["params", "macs"]


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
) -> list[Point]:
    """The Pareto front of a count against the loss: points, smallest first, none of which another one beats in both.

    Budgets are spread evenly from the least that the sites can have to what the recipe's own splits have; the recipe's
    budget for the other count holds throughout.

    Args:
        points: how many budgets, 2 or more; equal plans are one point.
        sensitivity: of every chosen site, by name, where it was measured.

    Raises:
        AugmentError: no site, or a budget that cannot be met.
    """
    measured = dict(sensitivity or {})
    free = recipe.model_copy(update={"budget": recipe.budget.model_copy(update={unit: "free"})})
    chosen = select(analysis.sites, recipe).chosen
    widest = _point(source, analysis, free, measured)
    least, _ = attainable(chosen, recipe, Counts(analysis.params, analysis.macs))[unit]
    most = count(widest, unit)
    found = [widest]
    for i in range(points - 1):
        limit = least + (most - least) * i // (points - 1)
        budget = recipe.budget.model_copy(update={unit: str(limit)})
        try:
            found.append(_point(source, analysis, recipe.model_copy(update={"budget": budget}), measured))
        except (
            BudgetError
        ):  # out of reach together with the budget for the other count, or with the recipe's mean ratio
            continue
    return _front(found, unit)


def count(point: Point, unit: Unit) -> int:
    """A point's parameters or multiply-adds."""
    return point.plan.params_after if unit == "params" else point.plan.macs_after


def _point(source: Source, analysis: Analysis, recipe: Recipe, measured: dict[str, Sensitivity]) -> Point:
    plan, _ = make_plan(source.name, analysis, recipe, source.args, measured or None, source.base)
    predicted = plan.predicted_divergence
    return Point(plan, _distance(plan, analysis, recipe) if predicted is None else predicted)


def _distance(plan: Plan, analysis: Analysis, recipe: Recipe) -> float:
    operator, splits = get_operator(recipe.operator), {site.name: site.split for site in plan.sites}
    return sum(operator.distance(site, splits[site.name], s) for site, s in select(analysis.sites, recipe).chosen)


def _front(points: list[Point], unit: Unit) -> list[Point]:
    """The points that no other beats, by count."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (count(point, unit), point.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front
