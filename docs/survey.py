"""Try the built-in recipes on a model of timm: planned and converted on the meta device, without weights.

A trial converts the architecture, counts it, and runs it forward and backward at the model's own input size. Nothing
is computed, so that it takes seconds; numbers are tested elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze, count_parameters, meta_copy
from augment_cli.analysis.support import RECIPES, Outcome, Support
from augment_cli.errors import AugmentError, first_line
from augment_cli.planning.budget import Counts, attainable
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.planning.selection import select
from augment_cli.surgery import replace


@dataclass(frozen=True)
class TrialError(Exception):
    """A converted model that is not as planned."""

    what: str

    def __str__(self) -> str:
        return self.what


def survey(name: str) -> Support:
    """A model of timm under the recipes aa, aw and aa-aw: what they replace and cost, or why they do not."""
    try:
        described, model = source.describe(name)
        graph = analyze(model, described.input_size)
    except AugmentError as error:
        return Support(model=name, reason=str(error))
    dense = [s for s in graph.sites if s.kernel_size == (3, 3) and s.kind == "dense" and not s.reads_image and s.calls]
    return Support(
        model=name,
        family=type(model).__module__.rpartition(".")[2],
        input_size=described.input_size,
        params=graph.params,
        macs=graph.macs,
        dense=len(dense),
        behind_stem=sum(not s.stem for s in dense),
        outcomes={recipe: outcome(name, model, graph, recipe) for recipe in RECIPES},
    )


def outcome(name: str, model: nn.Module, graph: ModelGraph, recipe_name: str) -> Outcome:
    """Plan one recipe for a model, convert it and run it."""
    recipe = load_recipe(recipe_name)
    try:
        plan, _ = make_plan(name, graph, recipe)
    except AugmentError as error:
        return Outcome(reason=str(error))
    chosen = select(graph.sites, recipe).chosen
    least, most = attainable(chosen, recipe, Counts(graph.params, graph.macs))["params"]
    found = Outcome(
        sites=len(plan.sites), params=plan.params_after, macs=plan.macs_after, least_params=least, most_params=most
    )
    try:
        replace.verify(model, plan, graph)
        try_converted(model, plan, graph)
    except Exception as error:  # whatever goes wrong is the survey's result
        return found.model_copy(update={"failure": f"{type(error).__name__}: {first_line(error)}"})
    return found


def try_converted(model: nn.Module, plan: Plan, graph: ModelGraph) -> None:
    """Convert a model on the meta device, count it and run it.

    Raises:
        TrialError: other counts than the plan's, another output shape, or a parameter without a gradient that has one
            in the source.
    """
    converted = meta_copy(model)
    replace.apply_plan(converted, plan)
    _equal("parameters", count_parameters(converted), plan.params_after)
    images = torch.empty(2, *plan.input_size, device="meta", dtype=next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        shapes = _shapes(converted.eval()(images[:1]))
    _equal("multiply-adds", flops.get_total_flops() // 2, plan.macs_after)
    _equal("output shape", shapes, _shapes(meta_copy(model).eval()(images[:1])))
    without = _without_gradient(converted, images) - _without_gradient(meta_copy(model), images)
    if without:
        raise TrialError(f"no gradient reaches {', '.join(sorted(without)[:3])}")


def _equal(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise TrialError(f"{what}: {found}, and not {expected}")


def _shapes(outputs: object) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def _without_gradient(model: nn.Module, images: Tensor) -> set[str]:
    model.train().requires_grad_()
    outputs = torch.utils._pytree.tree_leaves(model(images))
    sum(t.sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad).backward()
    return {name for name, p in model.named_parameters() if p.grad is None}
