"""Two converted models, or one and its source, held against each other tensor by tensor."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from augment_cli import specs
from augment_cli.analysis import source
from augment_cli.analysis.functions import resolve
from augment_cli.analysis.graph import count_classes
from augment_cli.checkpoint.files import load
from augment_cli.checkpoint.metadata import Metadata, locate, metadata_of, read_metadata
from augment_cli.errors import InputError
from augment_cli.formats import METADATA_KEY, read_tensor_metadata
from augment_cli.planning.plan import Plan
from augment_cli.reporting.comparison import Candidate, Comparison
from augment_cli.reporting.difference import Agreement, Difference, Kind, State, TensorChange
from augment_cli.reporting.numbers import Change
from augment_cli.surgery.calibration import compare, load_images, predictions
from augment_cli.surgery.replace import apply_plan
from augment_cli.training.parameters import Provenance, provenance_of_sites

Model = str | Path | nn.Module


@dataclass(frozen=True)
class _Side:
    """A model with its metadata, which a source has none of."""

    label: str
    model: nn.Module
    metadata: Metadata | None


def diff(
    first: Model, second: Model, base: str | None = None, images: str | None = None, count: int = 512
) -> Difference:
    """Compare two converted models, or a converted model and its source, before or after fine-tuning.

    A source is held against a converted model as the plan converts it: its kept filters against those that the
    converted model kept.

    Args:
        first, second: converted models, their files or folders; one may be the source: a module, a file of its
            weights, or its name, which stands for timm's pretrained weights.
        base: `package.module:function` that makes the source of a converted model that timm does not know.
        images: unlabelled images to compare predictions on, as of `augment convert --calibrate`.
        count: how many of them at most.

    Raises:
        AugmentError: neither is a converted model, the source is another architecture, or there are no such images.
    """
    converted = [_converted(model, base) for model in (first, second)]
    known = next((side for side in converted if side), None)
    if known is None or known.metadata is None:
        named = f"{_label(first)} nor {_label(second)}"
        raise InputError(f"neither {named} is a converted model, and one must be; `augment compare` shows plans")
    sides = [
        side or _source(model, known.metadata.plan, base)
        for side, model in zip(converted, (first, second), strict=True)
    ]
    left, right = sides
    plans = Comparison(tuple(_candidate(side, known.metadata.plan) for side in sides))
    agreement = _agreement(left, right, known.metadata.plan, images, count) if images else None
    tensors = tuple(_tensors(_as_converted(left, right), _as_converted(right, left)))
    return Difference(left.label, right.label, plans, tensors, agreement)


def _label(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)


def _converted(model: Model, base: str | None) -> _Side | None:
    """A converted model; None where this is none."""
    if isinstance(model, nn.Module):
        metadata = metadata_of(model)
        return _Side(_label(model), model, metadata) if metadata else None
    path = locate(model)
    if not path.exists() or not (path.is_dir() or _says_plan(path)):
        return None
    return _Side(str(model), load(path, resolve(base) if base else None), read_metadata(path))


def _says_plan(path: Path) -> bool:
    return path.suffix == ".safetensors" and METADATA_KEY in read_tensor_metadata(path)


def _source(model: Model, plan: Plan, base: str | None) -> _Side:
    """The source of a plan, with weights."""
    if isinstance(model, nn.Module):
        return _Side(_label(model), model, None)
    name = (base or plan.model) if plan.base == "other" else plan.model
    is_file = Path(model).exists()
    if not is_file:
        specs.check_model(str(model))
        if plan.base == "other" or str(model).partition(".")[0] != plan.model.partition(".")[0]:
            raise InputError(f"{model} is not the source of the plan, which is {plan.model}")
    described, _ = source.describe(name, dict(plan.model_args), plan.input_size[1:])
    instead = f"Give a file of weights in place of {model}"
    weights = source.create(described, origin=None if is_file else str(model), instead=instead)
    if is_file:
        source.load_checkpoint(weights, Path(model))
    return _Side(str(model), weights, None)


def _as_converted(side: _Side, other: _Side) -> _Side:
    """A source as the other's plan converts it, with the filters that the other kept; a converted model as it is."""
    if side.metadata or other.metadata is None:
        return side

    def keep(name: str, conv: nn.Conv2d, count: int) -> list[int]:
        order = getattr(other.model.get_submodule(name), "channel_order", None)
        places = list(range(conv.out_channels)) if order is None else order.tolist()
        return [channel for channel, place in enumerate(places) if place < count]

    model = copy.deepcopy(side.model)
    apply_plan(model, other.metadata.plan, keep)
    return _Side(side.label, model, None)


def _tensors(first: _Side, second: _Side) -> Iterator[TensorChange]:
    """Every tensor of two models, in the order of the second's."""
    kinds = _kinds(first) | _kinds(second) | _added(first) | _added(second)
    left, right = _state(first, second), _state(second, first)
    for name in dict.fromkeys((*right, *left)):
        a, b = left.get(name), right.get(name)
        if a is None or b is None:
            values = sum(tensor.numel() for tensor in (a, b) if tensor is not None)
            yield TensorChange(name, kinds[name], values, "only there" if a is None else "only here")
        elif a.shape != b.shape:
            yield TensorChange(name, kinds[name], b.numel(), "another shape")
        else:
            state: State = "equal" if torch.equal(a, b) else "moved"
            far = (a, b.double() - a.double()) if a.is_floating_point() else ()
            norms = (float(t.double().square().sum()) for t in far)
            yield TensorChange(name, kinds[name], b.numel(), state, *norms)


def _state(side: _Side, other: _Side) -> dict[str, Tensor]:
    """The tensors of a model; of a source without those that the other's plan adds."""
    added = _added(other) if side.metadata is None else {}
    return {name: tensor for name, tensor in side.model.state_dict().items() if name not in added}


def _kinds(side: _Side) -> dict[str, Kind]:
    kinds: dict[str, Kind] = dict.fromkeys(side.model.state_dict(), "buffer")
    kinds |= dict.fromkeys((name for name, _ in side.model.named_parameters()), "carried")
    fresh = side.metadata.fresh if side.metadata else ()
    return kinds | _added(side) | dict.fromkeys(fresh, "new")


def _added(side: _Side) -> dict[str, Provenance]:
    return provenance_of_sites(side.model, side.metadata) if side.metadata else {}


def _candidate(side: _Side, plan: Plan) -> Candidate:
    if side.metadata:
        return Candidate.of(side.label, side.metadata.plan, side.metadata.fidelity)
    params, macs = (Change(count, count) for count in (plan.params_before, plan.macs_before))
    return Candidate(side.label, plan.model, plan.input_size, params, macs)


def _agreement(first: _Side, second: _Side, plan: Plan, images: str, count: int) -> Agreement:
    calibration = load_images(images, first.model, plan.input_size, count)
    compared = None
    if count_classes(first.model) == count_classes(second.model):
        one, other = (predictions(side.model, calibration, of_all=True) for side in (first, second))
        compared = compare(one, other, calibration)
    if compared is None:
        raise InputError(f"{first.label} and {second.label} do not have the same classes: leave out `images`")
    return Agreement(compared.images, compared.agreement, compared.divergence)
