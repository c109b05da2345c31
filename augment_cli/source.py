"""The source: a model of timm's, by name, with or without weights."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from augment_cli.errors import AugmentError, nearest
from augment_cli.plan import FORBIDDEN_ARGUMENTS
from augment_cli.timm_plugin import NAME


@dataclass(frozen=True)
class Source:
    """A timm model by its registry name, what it is created with, and the images it is converted for.

    `input_size` is (channels, height, width).
    """

    name: str
    args: dict[str, Any]
    input_size: tuple[int, int, int]


def describe(
    name: str, args: dict[str, Any] | None = None, image_size: tuple[int, int] | None = None
) -> tuple[Source, nn.Module]:
    """A source and its model on the meta device: architecture and shapes without weights.

    Args:
        name: timm's registry name, with or without a tag, or hf-hub:... or local-dir:... of a plain timm model.
        args: keyword arguments for timm.create_model, JSON values.
        image_size: (height, width) to convert for; None takes the model's own.

    Raises:
        AugmentError: unknown name, or arguments that the model does not take.
    """
    args = dict(args or {})
    with torch.device("meta"):
        model = _create(name, args)
        if image_size and model.pretrained_cfg.get("fixed_input_size"):
            args["img_size"] = image_size
            model = _create(name, args)
    channels, *own_size = model.pretrained_cfg["input_size"]
    channels = args.get("in_chans", channels)
    size = image_size or args.get("img_size") or own_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    return Source(_registry_name(name, model), args, (channels, *size)), model


def create(source: Source, seed: int = 0, origin: str | None = None) -> nn.Module:
    """The source's model on the CPU, its weights random from the seed.

    With `origin`, the name that the user gave, the weights are timm's pretrained ones, fetched in timm's own way.

    Raises:
        AugmentError: pretrained weights that do not exist or cannot be fetched.
    """
    torch.manual_seed(seed)
    if origin is None:
        return _create(source.name, source.args)
    try:
        return timm.create_model(origin, pretrained=True, **source.args)
    except Exception as error:  # a dozen exceptions of hub, network, cache and file say the same thing
        raise AugmentError(
            f"the pretrained weights of {origin} cannot be had: {first_line(error)}. "
            f"Give a file with --checkpoint, or leave out --pretrained for random weights"
        ) from error


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """The source's weights from a file: safetensors, or a torch file without code in it.

    Wrappers around the state dict and prefixes that training scripts add are taken off, as timm does.

    Raises:
        AugmentError: a missing or corrupt file, or weights of another architecture.
    """
    from timm.models import clean_state_dict

    if not path.is_file():
        raise AugmentError(f"checkpoint {path}: no such file")
    state_dict = clean_state_dict(_read_state_dict(path))
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise AugmentError(
            f"checkpoint {path} does not fit {type(model).__name__}: {_misfit(model, state_dict)}"
        ) from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise AugmentError(f"checkpoint {path} cannot be read: {first_line(error)}") from error
    wrapped = checkpoint if isinstance(checkpoint, dict) else {}
    state_dict = next((wrapped[key] for key in ("state_dict_ema", "state_dict", "model") if key in wrapped), wrapped)
    if not isinstance(state_dict, dict) or not any(isinstance(v, Tensor) for v in state_dict.values()):
        raise AugmentError(f"checkpoint {path} holds no state dict")
    return state_dict


def _misfit(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    shapes = [k for k in own if k in state_dict and getattr(state_dict[k], "shape", None) != own[k].shape]
    parts = []
    for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} {label} ({', '.join(map(str, keys[:3]))}{', ...' if len(keys) > 3 else ''})")
    return "; ".join(parts) or "its values are not tensors"


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_origin(pretrained: bool, checkpoint: Path | None, seed: int) -> str:
    """What a file says of where its source weights came from."""
    if checkpoint:
        return f"checkpoint {checkpoint.name}"
    return "pretrained" if pretrained else f"random, seed {seed}"


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    _check(name, args)
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        return timm.create_model(name, **args)
    except TypeError as error:
        raise AugmentError(f"{name} does not take these arguments ({args}): {first_line(error)}") from error
    except (RuntimeError, ValueError, AssertionError, OSError, KeyError, NotImplementedError) as error:
        given = f" with {args}" if args else ""
        raise AugmentError(f"{name} cannot be created{given}: {first_line(error)}") from error


def _check(name: str, args: dict[str, Any]) -> None:
    if refused := sorted(FORBIDDEN_ARGUMENTS & args.keys()):
        raise AugmentError(f"model argument {refused[0]} cannot be set here")
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        raise AugmentError(f"timm has no model {name}{nearest(architecture, timm.list_models())}")
    if ":" not in name and "." in name and name not in timm.list_pretrained(f"{architecture}.*"):
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{architecture}.*")]
        raise AugmentError(f"timm has no weights {name}{nearest(name.partition('.')[2], tags)}")


def _registry_name(name: str, model: nn.Module) -> str:
    """What timm's registry knows the model by: a hub or folder name is resolved."""
    architecture = model.pretrained_cfg.get("architecture") or name
    if architecture == NAME:
        raise AugmentError(f"{name} is a converted model already: convert its source, or edit its plan")
    return name if ":" not in name else architecture
