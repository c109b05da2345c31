"""Find a model's weights in a checkpoint, and rename them as the model names its own."""

import argparse
import pickle
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from augment_cli.analysis.graph import count_classes
from augment_cli.compat import pretrained_cfg
from augment_cli.errors import AugmentError, boundary

# Keys under which training scripts store a moving average of the weights, and the weights.
_AVERAGES = ("state_dict_ema", "model_ema")
_WEIGHTS = ("state_dict", "model", "model_state_dict")


@dataclass(frozen=True)
class Weights:
    """A model's state dict, and notes for people on where in the checkpoint it comes from."""

    state_dict: dict[str, Tensor]
    notes: tuple[str, ...]


def read_checkpoint(path: Path) -> Any:
    """The contents of a safetensors file, or of a torch file with tensors, plain values and argparse.Namespace.

    Raises:
        AugmentError: the file cannot be read, or only by running code that it names.
    """
    from safetensors.torch import load_file

    # timm's train.py saves its arguments, a Namespace, with the weights.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with boundary(f"checkpoint {path} cannot be read"), allowed, warnings.catch_warnings():
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            warnings.simplefilter("ignore")  # they give the advice below
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch's message advises to load the file nevertheless: do not pass it on.
            if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                raise AugmentError(_refusal(path)) from None
            raise


def _refusal(path: Path) -> str:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip archive, or without a pickle
        names = []
    which = f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    return (
        f"checkpoint {path} cannot be read: it holds more than tensors and plain values{which}, and reading those "
        f"would run code. Save the model's state_dict() alone where the file was made, best as safetensors"
    )


def find_weights(contents: Any, model: nn.Module, path: Path, ema: bool | None = None) -> Weights:
    """Find the model's weights among the contents of a checkpoint.

    Args:
        ema: take the moving average (True) or the weights (False); None takes the average if there is one.

    Raises:
        AugmentError: the checkpoint has no state dict, or not the one asked for.
    """
    contents = contents if isinstance(contents, Mapping) else {}
    found = {key: tensors for key in (*_AVERAGES, *_WEIGHTS) if (tensors := _tensors(contents.get(key)))}
    found = found or {"": _tensors(contents)}
    own = model.state_dict().keys()
    candidates = {
        (key, prefix): key in _AVERAGES or "ema" in re.split(r"[._]", prefix)
        for key, tensors in found.items()
        for prefix in (_prefixes(tensors, own) if tensors else ())
    }
    wanted = any(candidates.values()) if ema is None else ema
    place = next((place for place, average in candidates.items() if average is wanted), None)
    if place is None:
        raise AugmentError(f"checkpoint {path} holds no {_kind(candidates, wanted)}")
    key, prefix = place
    tensors = {name.removeprefix(prefix): t for name, t in found[key].items() if name.startswith(prefix)}
    return Weights(tensors, tuple(_notes(tensors, found[key], wanted, candidates)))


def _kind(candidates: Mapping[Any, bool], average: bool) -> str:
    if not candidates:
        return "state dict"
    return "moving average of the weights: leave out `ema`" if average else "weights but their moving average"


def _tensors(value: Any) -> dict[str, Tensor]:
    items = value.items() if isinstance(value, Mapping) else ()
    return {name: tensor for name, tensor in items if isinstance(name, str) and isinstance(tensor, Tensor)}


def _prefixes(tensors: Mapping[str, Tensor], own: Collection[str]) -> list[str]:
    """The prefixes of a model's own names in a checkpoint, shortest first.

    Wrappers add them: DataParallel `module.`, Lightning `model.` or another attribute, torch.compile `_orig_mod.`.
    """
    anchor = next((name for name in own if any(_ends(key, name) for key in tensors)), None)
    if anchor is None:
        return [""]
    prefixes = {key.removesuffix(anchor) for key in tensors if _ends(key, anchor)}
    fitting = {prefix: sum(prefix + name in tensors for name in own) for prefix in prefixes}
    return sorted((prefix for prefix in fitting if fitting[prefix] == max(fitting.values())), key=len)


def _ends(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _notes(
    tensors: dict[str, Tensor], beside: dict[str, Tensor], average: bool, candidates: Mapping[Any, bool]
) -> Iterator[str]:
    if average:
        yield "the moving average of its weights"
    elif any(candidates.values()):
        yield "not the moving average of its weights"
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()} - {torch.float32}
    if dtypes:
        yield f"{' and '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))} made float32"
    if others := len(beside) - len(tensors):
        yield f"{others} other tensors left out"


def misfit(model: nn.Module, state_dict: dict[str, Tensor]) -> str:
    """The difference between a state dict and a model's own, as the end of a sentence."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state_dict), sorted(state_dict.keys() - own)
    shapes = [k for k in own if k in state_dict and state_dict[k].shape != own[k].shape]
    if not unexpected and (reason := _other_classes(model, missing, shapes, state_dict)):
        return reason
    parts = []
    for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} {label} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    return "; ".join(parts) or "its tensors cannot be copied"


def _other_classes(model: nn.Module, missing: list[str], shapes: list[str], state_dict: dict[str, Tensor]) -> str:
    """The reason and the way out if only the classifier differs; else empty."""
    prefixes = classifier_prefixes(model)
    differing = missing + shapes
    if not prefixes or not differing or not all(name.startswith(prefixes) for name in differing):
        return ""
    if missing:
        return "it has no classifier: the argument `num_classes=0` makes a model without one"
    classes = state_dict[shapes[0]].shape[0]
    return f"it has {classes} classes, and the model {count_classes(model)}: add the argument `num_classes={classes}`"


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the classifier's tensors in a timm model, such as `fc.`; empty for other models."""
    classifier = pretrained_cfg(model).get("classifier") or ()
    return tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
