"""The whole way in one call, for the library's users; the command line walks it step by step in cli/convert.py."""

from typing import Any

from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.checkpoint import rebuild
from augment_cli.checkpoint.files import versions
from augment_cli.checkpoint.metadata import Metadata
from augment_cli.errors import AugmentError
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.recipe import load_recipe
from augment_cli.seeds import seeded
from augment_cli.surgery import replace
from augment_cli.surgery.calibration import Calibration, compare, load_images, predictions
from augment_cli.surgery.inherit import carry, fit
from augment_cli.surgery.inherit.fitted import Progress


def convert(
    name: str,
    recipe: str = "aa",
    *overrides: str,
    pretrained: bool = False,
    seed: int = 0,
    image_size: tuple[int, int] | None = None,
    calibrate: str | None = None,
    calibrate_images: int = 512,
    **args: Any,
) -> nn.Module:
    """A converted timm model.

    Args:
        name: the model's name, as for timm.create_model.
        recipe: a built-in recipe's name, or the path of a TOML file.
        overrides: recipe values, such as "budget.params=keep".
        pretrained: carry timm's pretrained weights over; otherwise weights are random from the seed.
        image_size: (height, width) to convert for; None takes the model's own.
        calibrate: unlabelled images, a folder or another data set, to fit attention on; None leaves it untrained.
        calibrate_images: how many of them at most.
        args: further arguments for timm.create_model.

    Example:
        >>> model = convert("resnet18", "aa", "select.names=layer4.*")
        >>> type(model).__name__, type(model.layer4[0].conv1).__name__
        ('ResNet', 'AAConv2d')
    """
    described, meta_model = source.describe(name, args, image_size)
    graph = analyze(meta_model, described.input_size)
    plan, _ = make_plan(described.name, graph, load_recipe(recipe, overrides), described.args)
    replace.verify(meta_model, plan, graph)
    calibration = None
    if calibrate is not None:
        check_fittable(plan)
        calibration = load_images(calibrate, meta_model, plan.input_size, calibrate_images, seed)
    model = source.create(described, seed, origin=name if pretrained else None)
    operate(model, plan, graph, source.weights_origin(pretrained, seed), calibration, seed=seed)
    return model


def check_fittable(plan: Plan) -> None:
    """Refuse to fit a plan without AA.

    Raises:
        AugmentError: no site of the plan gives up a filter.
    """
    if not any(site.given_up for site in plan.sites):
        raise AugmentError(
            f"no site of the plan for {plan.model} is AA, so that there is nothing to fit: AW computes what its source "
            f"does as it is; leave out --init fit and --calibrate"
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
        before = predictions(model, calibration)
        inheritance = fit(model, plan, graph, calibration, progress)
        fidelity = compare(before, predictions(model, calibration), calibration)
    rebuild.adopt(model, plan)
    model.augment_metadata = Metadata(
        plan=plan,
        weights=weights,
        source_sha256=digest,
        inheritance=inheritance,
        fidelity=fidelity,
        versions=versions(),
    )
    return model.augment_metadata
