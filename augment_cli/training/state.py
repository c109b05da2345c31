"""A run's checkpoint: one safetensors file, whose metadata hold everything that is no tensor, as JSON.

One file is written under a temporary name and renamed: tensors and numbers are of the same moment, or the file is the
one before. Nothing is unpickled.
"""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from augment_cli.errors import AugmentError, boundary
from augment_cli.files import write_file

SCHEMA = 2
KEY = "run"


def write_state(path: Path, tree: dict[str, Any]) -> None:
    """Write dicts, lists, tuples, tensors, strings, numbers and None, nested at will.

    Raises:
        AugmentError: the disk is full or refuses; the checkpoint before stays.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps({"schema": SCHEMA, "tree": _pack(tree, tensors)})
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={KEY: text}))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, its tensors on the CPU.

    Raises:
        AugmentError: no checkpoint, not whole, or of a newer version.
    """
    from safetensors import safe_open

    with boundary(f"{path} is no checkpoint of a run"):
        with safe_open(path, "pt") as opened:
            data = json.loads((opened.metadata() or {})[KEY])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        schema, tree = data.get("schema"), data.get("tree")
        if schema != SCHEMA:
            raise AugmentError(f"{path} has schema {schema}, and this version reads {SCHEMA}")
        try:
            return dict(_unpack(tree, tensors))
        except Exception as error:  # another shape than `_pack` gives
            raise ValueError("its contents are not whole") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value, its tensors put aside under numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_unpack(item, tensors) for item in content)


def pack_scaler(accelerator: Accelerator) -> dict[str, Any] | None:
    """The loss scale of float16 training; None in other precisions."""
    return None if accelerator.scaler is None else accelerator.scaler.state_dict()
