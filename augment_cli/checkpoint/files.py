"""Save a converted model as one safetensors file that rebuilds itself, and load it.

Loading runs no code from the file: the base is looked up in timm's registry, the plan and the shapes of the tensors are
held against it on the meta device, and only then are weights read, strictly.
"""

import json
import platform
import struct
from importlib.metadata import version
from pathlib import Path

from torch import nn

from augment_cli.checkpoint import rebuild
from augment_cli.checkpoint.metadata import Metadata, attach, read_metadata, weights_file
from augment_cli.errors import FileError, boundary
from augment_cli.formats import DETECTOR_KEY, read_tensor_metadata
from augment_cli.seeds import seeded


def versions() -> dict[str, str]:
    packages = ("augment-cli", "torch", "timm", "safetensors")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def save_weights(model: nn.Module, metadata: Metadata, path: Path) -> None:
    """Write the state dict and the metadata; the same model and metadata give the same bytes."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata=metadata.to_metadata())
    sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """safetensors writes metadata in the random order of a hash map: put them in order, in place."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise AssertionError(f"{path.name}: the sorted header takes {len(text)} bytes, and {size} are there")
        file.seek(8)
        file.write(text.ljust(size))


def load(path: str | Path, base: rebuild.Base | None = None) -> nn.Module:
    """The converted model of a file, or of a folder with `model.safetensors` in it, in train mode.

    A converted timm model comes back as a timm model. Of any other the file holds no code: `base` makes it.

    Args:
        base: the source's architecture, for a model that timm does not know: a module, which is left as it is, or a
            function that makes one, called with the plan's `model_args`. Its weights do not matter.

    Raises:
        AugmentError: not a converted model's file, cut short, of a newer schema, or a plan or weights that do not fit.
    """
    from safetensors.torch import load_file

    file = weights_file(Path(path))
    metadata = read_metadata(file)
    if DETECTOR_KEY in read_tensor_metadata(file):
        raise FileError(f"{file} holds a detector, and a model is asked for here: augment_cli.load gives the detector")
    if metadata.plan.base == "timm":
        rebuild.check_weights(metadata.plan, file)
    with boundary(f"{file} cannot be loaded"), seeded("load"):
        model = rebuild.build(metadata.plan, base)
        if metadata.plan.base == "other":
            rebuild.check_tensors(model, file)
        model.load_state_dict(load_file(file))
    attach(model, metadata)
    return model
