"""A model with weights and a verified plan in, the converted model and its metadata out."""

from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph
from augment_cli.checkpoint import rebuild
from augment_cli.checkpoint.files import versions
from augment_cli.checkpoint.metadata import Metadata, attach
from augment_cli.errors import InputError, enough_memory
from augment_cli.operators import get_operator
from augment_cli.planning.plan import Plan
from augment_cli.seeds import seeded
from augment_cli.surgery.calibration import LESS_MEMORY, Calibration, compare, predictions
from augment_cli.surgery.inherit import carry, fit
from augment_cli.surgery.inherit.fitted import Progress


def check_fittable(plan: Plan) -> None:
    """Refuse to fit a plan in which no operator can be fitted.

    Raises:
        AugmentError: no site of the plan has attention in the place of filters.
    """
    if not any(get_operator(site.operator).fittable for site in plan.sites):
        operators = ", ".join(sorted({site.operator for site in plan.sites}))
        raise InputError(
            f"the plan for {plan.model} has only operator {operators}, so that there is nothing to fit: no "
            f"attention takes a filter's place; leave out `calibrate`"
        )


def operate(
    model: nn.Module,
    plan: Plan,
    graph: ModelGraph,
    weights: str,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Metadata:
    """Convert a model with weights in place, by a verified plan, and say what its file will say of it.

    With calibration images attention is fitted, and the whole model held against its source.

    Args:
        weights: where the model's weights come from, for its file.
        seed: of what attention adds; the caller's random state stays as it is.

    Raises:
        AugmentError: weights that are not finite.
    """
    source.check_finite(model, f"weights of {plan.model} ({weights})")
    with seeded(seed, "attention"):
        return _operate(model, plan, graph, weights, calibration, progress)


def _operate(
    model: nn.Module,
    plan: Plan,
    graph: ModelGraph,
    weights: str,
    calibration: Calibration | None,
    progress: Progress | None,
) -> Metadata:
    digest = source.weights_digest(model)
    fidelity = None
    if calibration is None:
        inheritance = carry(model, plan, graph)
    else:
        with enough_memory(f"fitting {plan.model}", LESS_MEMORY):
            before = predictions(model, calibration)
            inheritance = fit(model, plan, graph, calibration, progress)
            fidelity = compare(before, predictions(model, calibration), calibration)
    rebuild.adopt(model, plan)
    metadata = Metadata(
        plan=plan,
        weights=weights,
        source_sha256=digest,
        inheritance=inheritance,
        fidelity=fidelity,
        versions=versions(),
    )
    attach(model, metadata)
    return metadata
