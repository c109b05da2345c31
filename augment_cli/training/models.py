"""The model of a run: a converted model's file or folder, or a timm model, with a classifier for the data."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models import get_model_args
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.functions import resolve
from augment_cli.analysis.graph import analyze, count_classes
from augment_cli.analysis.weights import classifier_prefixes
from augment_cli.checkpoint import rebuild
from augment_cli.checkpoint.files import load
from augment_cli.checkpoint.metadata import WEIGHTS, Metadata, architecture_of, locate, read_metadata
from augment_cli.compat import pretrained_cfg, set_pretrained_cfg
from augment_cli.errors import AugmentError
from augment_cli.files import read_text, write_folder
from augment_cli.formats import ARCHITECTURE
from augment_cli.planning.plan import Plan
from augment_cli.planning.reading import fit_plan
from augment_cli.reporting.output import write_config, write_model
from augment_cli.seeds import seed_all

FINETUNED = "fine-tuned on"


@dataclass(frozen=True)
class Opened:
    """An opened model with its name and origin.

    metadata: None for a plain timm model. input_size: (channels, height, width). fresh: names of parameters that began
    at random in this run or an earlier one, such as a new classifier's. weights: which of a checkpoint's weights were
    taken, or None.
    """

    model: nn.Module
    name: str
    metadata: Metadata | None
    input_size: tuple[int, int, int]
    fresh: frozenset[str] = frozenset()
    weights: str | None = None

    @property
    def num_classes(self) -> int:
        return count_classes(self.model)


def open_model(
    spec: str | Path,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    ema: bool | None = None,
    base: str | None = None,
    args: dict[str, Any] | None = None,
    seed: int = 0,
) -> Opened:
    """Open a model by its file, its folder, or its name in timm.

    Args:
        spec: a converted model's file or folder or its hf-hub:NAME, a folder that timm's `local-dir:` loads, or a timm
            model's name.
        pretrained, weights, args: for a name: timm's weights, a file's, and arguments of timm.create_model.
        ema: as in `source.load_checkpoint`.
        base: `package.module:function` that makes the source of a converted model that timm does not know.
        seed: for random weights.

    Raises:
        AugmentError: there is no such model, the weights do not fit, or an option is for names alone.
    """
    path, spec = locate(spec), str(spec)
    if not path.exists():
        if path.suffix == ".safetensors" or spec.startswith((".", "/")):
            raise AugmentError(f"{spec}: no such file or folder")
        return _by_name(spec, pretrained, weights, ema, args or {}, seed)
    if given := [name for name, value in (("pretrained", pretrained), ("checkpoint", weights)) if value]:
        raise AugmentError(f"{spec} has its own weights: leave out `{given[0]}`")
    if args:
        raise AugmentError(f"{spec} knows its own arguments: leave out `model_args`")
    if path.is_dir() and architecture_of(path) not in (None, ARCHITECTURE):
        return _by_name(f"local-dir:{spec}", True, None, None, {}, seed)
    metadata = read_metadata(path)
    fresh = frozenset(metadata.fresh)
    return Opened(
        load(path, resolve(base) if base else None), metadata.plan.model, metadata, metadata.plan.input_size, fresh
    )


def open_companion(spec: str, weights: str | Path | None) -> Opened:
    """Open a teacher or a model to compare with: a name gets timm's weights unless a file of weights is given."""
    return open_model(spec, pretrained=not (Path(spec).exists() or weights), weights=weights)


def _by_name(
    name: str, pretrained: bool, weights: str | Path | None, ema: bool | None, args: dict[str, Any], seed: int
) -> Opened:
    if pretrained and weights:
        raise AugmentError("`pretrained` and `checkpoint` both name weights: give one of them")
    described, _ = source.describe(name, args)
    model = source.create(described, seed, origin=name if pretrained else None)
    taken = source.load_checkpoint(model, Path(weights), ema) if weights else None
    fresh = frozenset() if pretrained or weights else frozenset(n for n, _ in model.named_parameters())
    return Opened(model, described.name, None, described.input_size, fresh, taken)


def with_classes(opened: Opened, num_classes: int, seed: int) -> Opened:
    """The model with a classifier for `num_classes`: its own if it fits, else a new one, drawn from the seed.

    The returned metadata describes the model with its new classifier.
    """
    if num_classes == opened.num_classes:
        return opened
    metadata = opened.metadata
    if metadata is not None and metadata.plan.base == "other":
        raise AugmentError(
            f"{opened.name} has {opened.num_classes} classes and the data have {num_classes}: only its own code can "
            f"make it with others, so convert a source with {num_classes}"
        )
    seed_all(seed, "classifier")
    if metadata is not None:
        metadata = metadata.model_copy(update={"plan": plan_for_classes(metadata.plan, num_classes)})
        other = rebuild.build(metadata.plan)
    else:
        args = {**get_model_args(opened.model), "num_classes": num_classes}
        other = timm.create_model(opened.name, **args)
        set_pretrained_cfg(other, pretrained_cfg(opened.model))
    fresh = opened.fresh | transfer(opened.model, other)
    if metadata is not None:
        metadata = metadata.model_copy(update={"fresh": tuple(sorted(fresh))})
    return Opened(other, opened.name, metadata, opened.input_size, fresh, opened.weights)


def with_drop_path(opened: Opened, rate: float) -> Opened:
    """The model with stochastic depth in training. The rate rises over the blocks, from 0 to `rate`.

    Raises:
        AugmentError: the architecture has no stochastic depth.
    """
    if opened.metadata is not None and opened.metadata.plan.base == "other":
        raise AugmentError(f"`drop_path`: {opened.name} is not a model of timm, which makes blocks that can be skipped")
    args = {**get_model_args(opened.model), "drop_path_rate": rate}
    name = ARCHITECTURE if opened.metadata is not None else opened.name
    try:
        other = timm.create_model(name, **args)
    except (TypeError, AugmentError) as error:
        raise AugmentError(f"`drop_path`: {opened.name} has no stochastic depth: {error}") from error
    if not any(isinstance(module, DropPath) for module in other.modules()):
        raise AugmentError(f"`drop_path`: {opened.name} has no stochastic depth")
    other.load_state_dict(opened.model.state_dict())
    set_pretrained_cfg(other, pretrained_cfg(opened.model))
    return replace(opened, model=other)


def plan_for_classes(plan: Plan, num_classes: int) -> Plan:
    """The plan of the same model with another classifier, its totals recounted."""
    args = {**dict(plan.model_args), "num_classes": num_classes}
    _, height, width = plan.input_size
    _, meta_model = source.describe(plan.model, args, (height, width))
    other = Plan.model_validate({**plan.model_dump(mode="json", by_alias=True), "model_args": args})
    return fit_plan(other, analyze(meta_model, plan.input_size), f"a plan for {num_classes} classes")


def transfer(model: nn.Module, other: nn.Module) -> frozenset[str]:
    """Load all weights but the classifier's into another model of the same architecture.

    Returns the names of the other model's parameters that were not loaded.
    """
    prefixes = classifier_prefixes(other)
    state, own = model.state_dict(), other.state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith(prefixes) and k in own and own[k].shape == v.shape}
    other.load_state_dict(kept, strict=False)
    return frozenset(name for name, _ in other.named_parameters() if name not in kept)


def set_label_names(model: nn.Module, classes: dict[str, int] | None) -> None:
    """Write the classes' names into the configuration that timm saves with the model, where timm has one."""
    if not pretrained_cfg(model):
        return
    cfg = {k: v for k, v in pretrained_cfg(model).items() if k not in ("label_names", "label_descriptions")}
    cfg["num_classes"] = count_classes(model)
    if classes is not None and len(classes) == cfg["num_classes"]:
        cfg["label_names"] = sorted(classes, key=classes.__getitem__)
    set_pretrained_cfg(model, cfg)


def label_names(spec: str | Path) -> dict[str, int] | None:
    """Class names to labels, from config.json in a model's folder; None where it names no classes."""
    try:
        config = json.loads(read_text(Path(spec) / "config.json", "config", 2**25))
        names = config["pretrained_cfg"]["label_names"]
    except Exception:  # no file, no JSON, or none of timm's
        return None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {name: index for index, name in enumerate(names)} if known else None


def write_trained(model: nn.Module, opened: Opened, folder: Path) -> None:
    """Write a model of `opened`'s architecture to a folder that `open_model` reads.

    Raises:
        AugmentError: the folder cannot be written.
    """
    if opened.metadata is not None:
        write_model(model, opened.metadata, folder)
    else:
        write_folder(folder, lambda temporary: _fill_plain(temporary, model, opened))


def _fill_plain(folder: Path, model: nn.Module, opened: Opened) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(model, opened.input_size, folder)


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) in float32 for images (N, C, H, W); the first head's, where a model has several."""
    out = model(images)
    return (out[0] if isinstance(out, (tuple, list)) else out).float()
