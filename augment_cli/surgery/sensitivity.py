"""Measure how much replacing one site alone changes a model's output, so that a budget can prefer other sites."""

import copy

from torch import nn

from augment_cli.analysis.graph import ModelGraph
from augment_cli.errors import InputError, enough_memory
from augment_cli.planning.plan import Plan, Sensitivity
from augment_cli.seeds import seeded
from augment_cli.surgery.calibration import LESS_MEMORY, Calibration, compare, predictions
from augment_cli.surgery.inherit.fitted import Progress, fit_sites, install


def measure_sensitivity(
    model: nn.Module, plan: Plan, graph: ModelGraph, calibration: Calibration, progress: Progress | None = None
) -> dict[str, Sensitivity]:
    """For each site of a plan: the model with that site alone replaced and fitted, held against the model as it is.

    Agreement and divergence are measured on the calibration's held-out images. The model is not changed.

    Raises:
        AugmentError: the model has no classes whose predictions could be compared.
    """
    with enough_memory(f"measuring {plan.model}", LESS_MEMORY):
        return _measure(model, plan, graph, calibration, progress)


def _measure(
    model: nn.Module, plan: Plan, graph: ModelGraph, calibration: Calibration, progress: Progress | None
) -> dict[str, Sensitivity]:
    before = predictions(model, calibration)
    if before is None:
        raise InputError(f"{plan.model} has no classifier: there are no predictions to compare")
    training, found = model.training, dict[str, Sensitivity]()
    with seeded("sensitivity"):
        fits, _ = fit_sites(model, plan, graph, calibration, progress or (lambda *_: None))
    model.train(training)
    for i, site in enumerate(plan.sites):
        if progress:
            progress(f"measuring {site.name}", i, len(plan.sites))
        alone, trial = plan.model_copy(update={"sites": (site,)}), copy.deepcopy(model)
        with seeded("sensitivity"):
            install(trial, alone, graph, fits)
        after = predictions(trial, calibration)
        if (compared := compare(before, after, calibration)) is None:
            raise InputError(f"{plan.model} has no predictions with {site.name} replaced")
        found[site.name] = Sensitivity(
            agreement=compared.agreement, divergence=compared.divergence, given_up=site.given_up
        )
    return found
