"""A converted model from its plan alone: built by timm's own machinery, whole or as a feature extractor."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import Tensor, nn

from augment_cli import hub
from augment_cli.analysis.guard import Limit, limited
from augment_cli.checkpoint.metadata import WEIGHTS, parse_metadata
from augment_cli.compat import pretrained_cfg, set_pretrained_cfg, update_model_args
from augment_cli.errors import FileError, InputError, boundary, first_line
from augment_cli.formats import ARCHITECTURE, METADATA_KEY, read_tensor_metadata
from augment_cli.planning.plan import Plan
from augment_cli.planning.reading import validate_plan
from augment_cli.seeds import seeded
from augment_cli.surgery.replace import apply_plan, keep_unfolded

# Where a pretrained configuration says that weights come from.
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")

_FEATURE_ARGUMENTS = ("out_indices", "feature_cls", "feature_cfg", "output_fmt")


Base = nn.Module | Callable[..., nn.Module]
"""A model that timm does not know, or a function that makes it from the arguments that the plan has."""


def build(plan: Plan, base: Base | None = None) -> nn.Module:
    """A plan's model, its weights random; of a timm model one of the architecture `augmented`.

    Args:
        base: for a plan whose base is not timm's: the source's architecture, which is left as it is.

    Raises:
        AugmentError: the base is not a model of timm's registry and none is given, or the plan does not fit it.
    """
    if plan.base == "other":
        return _on_base(plan, base)
    if base is not None:
        raise InputError(f"{plan.model} is a model of timm, which makes it again: leave out `base`")
    with boundary(f"{plan.model} cannot be built by its plan"):
        return timm.create_model(ARCHITECTURE, **_arguments(plan))


def _on_base(plan: Plan, base: Base | None) -> nn.Module:
    if base is None:
        raise InputError(
            f"{plan.model} is not a model of timm: give the model, or a function that makes it, as `base=`"
        )
    with boundary(f"the base of {plan.model}"):
        model = copy.deepcopy(base) if isinstance(base, nn.Module) else base(**dict(plan.model_args))
        apply_plan(model, plan)
    return model


def _arguments(plan: Plan) -> dict[str, Any]:
    """Arguments of timm.create_model for a plan's model."""
    return {"plan": plan.model_dump(mode="json", by_alias=True), **dict(plan.model_args)}


def check_fit(file: Path, arguments: dict[str, Any]) -> None:
    """Hold the model that timm creates with `arguments` against the tensors of a file, without memory for either.

    The model is built on the meta device, and no further than the file's tensors account for.

    Raises:
        AugmentError: the model cannot be built, or has other tensors than the file.
    """
    found = shapes_in(file)
    try:
        with limited("the model", Limit.of(found.values())), seeded("shapes"), torch.device("meta"):
            state = timm.create_model(ARCHITECTURE, **arguments).state_dict()
    except Exception as error:  # timm's, of its constructors and of a configuration that it cannot read
        raise FileError(f"{file}: {first_line(error)}") from error
    _compare(file, found, state)


def check_tensors(model: nn.Module, file: Path) -> None:
    """Hold a model against the tensors of a file.

    Raises:
        AugmentError: it has others than the file.
    """
    _compare(file, shapes_in(file), model.state_dict())


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name."""
    from safetensors import safe_open

    with boundary(f"{file} cannot be read"), safe_open(file, "numpy") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _compare(file: Path, found: dict[str, tuple[int, ...]], state: dict[str, Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in sorted(expected.keys() | found) if expected.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise FileError(
            f"{file}: {len(wrong)} tensors do not fit its plan, such as {name}: "
            f"{found.get(name, 'none')} in the file, {expected.get(name, 'none')} by the plan"
        )


def check_weights(plan: Plan, file: Path) -> None:
    """Hold the plan of a timm model against the tensors of its file, as `check_fit` does."""
    check_fit(file, _arguments(plan))


def adopt(model: nn.Module, plan: Plan) -> None:
    """Make a timm model that was converted in memory the same to timm as one built from its plan."""
    if plan.base == "other":
        return
    set_pretrained_cfg(model, {**pretrained_cfg(model), "architecture": ARCHITECTURE})
    update_model_args(model, plan=plan.model_dump(mode="json", by_alias=True))


def create(pretrained: bool, plan: dict[str, Any] | None, **kwargs: Any) -> nn.Module:
    """The model of timm's entry point `augmented`: `plan` is a plan's JSON object, `kwargs` as for any timm model."""
    checked = _checked(plan)
    with limited(checked.model):
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or _own_cfg(checked)
        file = _weights_beside(kwargs["pretrained_cfg"], pretrained, kwargs.get("cache_dir"))
        _check_folder(checked, kwargs["pretrained_cfg"], kwargs.get("pretrained_model_args"), file)
        if kwargs.pop("features_only", False):
            return _features(checked, pretrained, kwargs)
        return build_model_with_cfg(partial(_construct, checked), ARCHITECTURE, pretrained, **kwargs)


def _weights_beside(cfg: Any, pretrained: bool, cache_dir: str | None) -> Path | None:
    """The weights beside the config.json that timm took cfg from, in a folder or, if it will load them, on the hub."""
    source = cfg.get("source") if isinstance(cfg, dict) else None
    if source == "local-dir":
        file = Path(cfg["file"]) / WEIGHTS
        return file if file.is_file() else None
    if source == "hf-hub" and pretrained:
        try:
            return hub.fetch(cfg["hf_hub_id"], WEIGHTS, cache_dir)
        except FileError:  # weights in another form, which timm finds
            return None
    return None


def _check_folder(plan: Plan, cfg: Any, arguments: dict[str, Any] | None, file: Path | None) -> None:
    """Hold config.json of a folder, out of which timm took plan, cfg and arguments, against the weights beside it."""
    if arguments is None or file is None:
        return
    text = read_tensor_metadata(file).get(METADATA_KEY)  # none where timm saved the folder
    if text is not None and parse_metadata(text, file).plan != plan:
        raise FileError(f"{file.parent}: config.json and {WEIGHTS} hold two plans: one was changed or replaced")
    own_cfg = {key: value for key, value in cfg.items() if key not in _SOURCES}
    check_fit(file, {**arguments, "pretrained_cfg": own_cfg})


def _checked(plan: dict[str, Any] | None) -> Plan:
    """A plan from outside may name nothing but a model of timm's own registry."""
    if plan is None:
        raise InputError(f"{ARCHITECTURE} is the architecture of converted models: load one, or give its plan")
    checked = validate_plan(plan, "the plan")
    base = checked.model.partition(".")[0]
    if checked.base != "timm" or not timm.is_model(base) or base == ARCHITECTURE:
        raise InputError(f"the plan's base {checked.model!r} is not in timm's registry")
    return checked


def _own_cfg(plan: Plan) -> dict[str, Any]:
    """The base's configuration without the places that its weights come from."""
    with boundary(f"the plan's base {plan.model}"):
        base = get_pretrained_cfg(plan.model)
    cfg = base.to_dict() if base else {}
    return {k: v for k, v in cfg.items() if k not in _SOURCES} | {"architecture": ARCHITECTURE}


def _construct(plan: Plan, **kwargs: Any) -> nn.Module:
    arguments = {**dict(plan.model_args), **kwargs}
    with boundary(f"{plan.model} cannot be created with {str(arguments)[:300]}"):
        model = timm.create_model(plan.model, **arguments)
    apply_plan(model, plan)
    return model


def _features(plan: Plan, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """timm's own feature extractor of the base, the converted model's modules and weights put into it."""
    features = {k: kwargs.pop(k) for k in _FEATURE_ARGUMENTS if k in kwargs}
    full = timm.create_model(ARCHITECTURE, pretrained, plan=plan.model_dump(mode="json", by_alias=True), **kwargs)
    arguments = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    extractor = timm.create_model(plan.model, features_only=True, **{**dict(plan.model_args), **arguments, **features})
    transplant(full, extractor, {site.name for site in plan.sites})
    set_pretrained_cfg(extractor, pretrained_cfg(full))
    return extractor


def transplant(model: nn.Module, extractor: nn.Module, sites: set[str]) -> None:
    """Put a model's modules at `sites`, and all its weights, into a feature extractor of the same architecture.

    The extractor may hold a part of the model, under timm's names for it: `model.` or `graph_module.` before, or the
    first levels joined by underscores.
    """
    modules = dict(model.named_modules())
    owned = {name: own_name(modules, name) for name, _ in extractor.named_modules()}
    moved = {name: own for name, own in owned.items() if own is not None and own in sites}
    _check_called(extractor, moved)
    for name, own in moved.items():
        extractor.set_submodule(name, modules[own])
        keep_unfolded(extractor, name)
    state = model.state_dict()
    extractor.load_state_dict({key: state[own_name(state, key) or key] for key in extractor.state_dict()})


def _check_called(extractor: nn.Module, names: dict[str, str]) -> None:
    graph = getattr(getattr(extractor, "graph_module", None), "graph", None)
    if graph is None:
        return
    called = {f"graph_module.{node.target}" for node in graph.nodes if node.op == "call_module"}
    if missed := sorted(names.keys() - called):
        raise InputError(
            f"timm's graph feature extractor looks inside {names[missed[0]]}, so that it cannot be replaced there; "
            f"use feature_cls='hook' or forward_intermediates"
        )


def own_name(known: dict[str, Any], name: str) -> str | None:
    """The name in a model, among the known ones, of a part of its feature extractor; None where it has no such part."""
    return next((candidate for candidate in _candidates(name) if candidate in known), None)


def _candidates(name: str) -> Iterator[str]:
    yield name
    for prefix in ("model.", "graph_module."):
        if name.startswith(prefix):
            yield name.removeprefix(prefix)
    head, dot, rest = name.partition(".")
    parts = head.split("_")
    for i in range(1, len(parts)):
        yield "_".join(parts[:i]) + "." + "_".join(parts[i:]) + dot + rest
