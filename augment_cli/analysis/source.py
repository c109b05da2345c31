"""The source: a model by a timm name, by the function that makes it, or as an object; with or without weights."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_args
from torch import nn

from augment_cli.analysis.arguments import freeze_arguments
from augment_cli.analysis.facts import Source
from augment_cli.analysis.functions import is_function, resolve
from augment_cli.analysis.graph import meta_copy
from augment_cli.analysis.guard import limited
from augment_cli.analysis.weights import find_weights, misfit, read_checkpoint
from augment_cli.bounds import MOST_SIDE
from augment_cli.compat import pretrained_cfg
from augment_cli.errors import AugmentError, InputError, boundary, first_line, nearest
from augment_cli.formats import ARCHITECTURE, METADATA_KEY, read_tensor_metadata
from augment_cli.seeds import preserved, seeded


def describe(
    name: str, args: dict[str, Any] | None = None, image_size: tuple[int, int] | None = None
) -> tuple[Source, nn.Module]:
    """A source and its model on the meta device: architecture and shapes without weights.

    Args:
        name: timm's registry name, with or without a tag, hf-hub:... or local-dir:... of a plain timm model, or
            `package.module:function`.
        args: keyword arguments for timm.create_model or the function, JSON values.
        image_size: (height, width) to convert for; None takes the model's own.

    Raises:
        AugmentError: unknown name, or arguments that the model does not take.
    """
    args = dict(args or {})
    if image_size and not all(1 <= side <= MOST_SIDE for side in image_size):
        raise InputError(f"image size {'x'.join(map(str, image_size))}: a side is from 1 to {MOST_SIDE} pixels long")
    if is_function(name):
        with torch.device("meta"), seeded("shapes"):
            model = _call(name, args)
        return Source(name, args, _input_size(model, name, image_size), "other"), model
    with torch.device("meta"), seeded("shapes"):
        model = _create(name, args)
        if image_size and pretrained_cfg(model).get("fixed_input_size"):
            args["img_size"] = image_size
            model = _create(name, args)
    channels, *own_size = pretrained_cfg(model)["input_size"]
    channels = args.get("in_chans", channels)
    size = image_size or args.get("img_size") or own_size
    height, width = (size, size) if isinstance(size, int) else size
    return Source(_registry_name(name, model), args, (channels, height, width)), model


def describe_module(model: nn.Module, image_size: tuple[int, int] | None = None) -> tuple[Source, nn.Module]:
    """A source that exists as an object, and its copy on the meta device.

    A timm model whose architecture and arguments timm can make again keeps its name in timm's registry.

    Raises:
        AugmentError: a converted model, or one that does not say its image size, where none is given.
    """
    if hasattr(model, "augment_metadata"):
        raise InputError(f"{type(model).__name__} is a converted model already: convert its source, or edit its plan")
    meta_model, found = meta_copy(model), _as_timm(model)
    if found is not None:
        name, args = found
        return Source(name, args, _input_size(model, name, image_size)), meta_model
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    return Source(name, {}, _input_size(model, name, image_size), "other"), meta_model


def _as_timm(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """The name and arguments under which timm makes a model with the same tensors; None where it does not."""
    cfg = pretrained_cfg(model)
    if not timm.is_model(cfg.get("architecture") or ""):
        return None
    name = ".".join(filter(None, (cfg["architecture"], cfg.get("tag"))))
    args = dict(get_model_args(model)) | {"num_classes": model.num_classes}
    try:
        freeze_arguments(args)
        with torch.device("meta"), seeded("shapes"):
            again = _create(name, args)
    except (AugmentError, ValueError):
        return None
    shapes = ({key: tensor.shape for key, tensor in m.state_dict().items()} for m in (model, again))
    return (name, args) if next(shapes) == next(shapes) else None


def _input_size(model: nn.Module, name: str, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(channels, height, width) of one image; the channels are those of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    size = image_size or pretrained_cfg(model).get("input_size", ())[1:]
    if not size:
        raise InputError(f"{name} does not say how large its images are: give their size, such as `input_size=224`")
    height, width = size
    return (first.in_channels if first is not None else 3), height, width


def _call(name: str, args: dict[str, Any]) -> nn.Module:
    function = resolve(name)
    given = f" with {str(args)[:300]}" if args else ""
    with boundary(f"{name} makes no model{given}"):
        model = function(**args)
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returns a {type(model).__name__}")
    return model


def create(
    source: Source,
    seed: int = 0,
    origin: str | None = None,
    instead: str = "Give a file as `checkpoint`, or leave out `pretrained` for random weights",
) -> nn.Module:
    """The source's model on the CPU, its weights random from the seed.

    With `origin`, the name that the user gave, the weights are timm's pretrained ones, fetched in timm's own way.
    `instead` says what to do where they cannot be had.

    Raises:
        AugmentError: pretrained weights that do not exist or cannot be fetched.
    """
    with preserved():
        torch.default_generator.manual_seed(seed)
        if source.base == "other":
            if origin is not None:
                raise InputError(f"`pretrained` is for timm's models: give the arguments that {origin} takes")
            return _call(source.name, source.args)
        if origin is None:
            return _create(source.name, source.args)
        try:
            return timm.create_model(origin, pretrained=True, **source.args)
        except Exception as error:  # a dozen exceptions of hub, network, cache and file say the same thing
            raise InputError(
                f"the pretrained weights of {origin} cannot be had: {first_line(error)}. {instead}"
            ) from error


def load_checkpoint(model: nn.Module, path: Path, ema: bool | None = None) -> str:
    """The source's weights from a file: safetensors, or a torch file without code in it. Returns what they are.

    Wrappers around the state dict, and the names that wrappers put before a model's own, are taken off: those of
    timm's train.py, Lightning, DataParallel, AveragedModel and torch.compile.

    Args:
        ema: take the moving average of the weights (True) or the weights themselves (False), where the file has both;
            None takes the average where there is one.

    Raises:
        AugmentError: a missing or corrupt file, weights of another architecture, or weights that are not finite.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    contents = read_checkpoint(path)
    if path.suffix == ".safetensors" and METADATA_KEY in read_tensor_metadata(path):
        raise InputError(f"checkpoint {path} is a converted model already: give its source's weights")
    found = find_weights(contents, model, path, ema)
    try:
        model.load_state_dict(found.state_dict)
    except Exception as error:  # other names or shapes; tensors that are sparse, quantised or on no device
        reason = misfit(model, found.state_dict)
        raise InputError(f"checkpoint {path} does not fit {type(model).__name__}: {reason}") from error
    check_finite(model, f"checkpoint {path}")
    return ", ".join([f"checkpoint {path.name}", *found.notes])


def check_finite(model: nn.Module, origin: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        AugmentError: names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not (finite := tensor.isfinite()).all():
            bad = finite.numel() - int(finite.sum())
            raise InputError(f"{origin}: {name} is not finite in {bad:,} of its {finite.numel():,} values")


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_origin(pretrained: bool, seed: int) -> str:
    """The origin of source weights that are not a checkpoint's, as a file's metadata say it."""
    return "pretrained" if pretrained else f"random, seed {seed}"


@contextmanager
def quiet_timm() -> Iterator[None]:
    """Within, timm logs errors only; afterwards what it did before."""
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    _check(name, args)
    given = f" with {str(args)[:300]}" if args else ""
    with boundary(f"{name} cannot be created{given}"), limited(name), quiet_timm():
        return timm.create_model(name, **args)


def _check(name: str, args: dict[str, Any]) -> None:
    try:
        freeze_arguments(args)
    except ValueError as error:
        raise InputError(f"the arguments of {name}: {error}") from error
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        raise InputError(f"timm has no model {name}{nearest(architecture, timm.list_models())}")
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if ":" not in name and "." in name and name not in tagged:
        tags = [known.partition(".")[2] for known in tagged]
        raise InputError(f"timm has no weights {name}{nearest(name.partition('.')[2], tags)}")


def _registry_name(name: str, model: nn.Module) -> str:
    """The model's name in timm's registry: a hub or folder name is resolved."""
    architecture = pretrained_cfg(model).get("architecture") or name
    if architecture == ARCHITECTURE:
        raise InputError(f"{name} is a converted model already: convert its source, or edit its plan")
    return name if ":" not in name else architecture
