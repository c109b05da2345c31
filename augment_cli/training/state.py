"""A run's checkpoint: one safetensors file. Its metadata holds everything that is not a tensor, as JSON.

The file is written under a temporary name and renamed, so that tensors and numbers always come from the same moment.
Nothing is unpickled.
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
        AugmentError: the file cannot be written; the previous checkpoint stays.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    text = json.dumps({"schema": SCHEMA, "tree": _pack(tree, tensors)})
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={KEY: text}))


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, tensors on the CPU.

    Raises:
        AugmentError: the file is not a checkpoint, is damaged, or has another schema.
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
        except Exception as error:  # not a structure that `_pack` makes
            raise ValueError("its contents are not whole") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Convert a value to JSON; its tensors go to `tensors`, under numbers."""
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
