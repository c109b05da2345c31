"""The format of a converted model: the names by which timm and a file know it, and a safetensors file's metadata."""

import struct
from pathlib import Path

from augment_cli.errors import FileError, boundary

ARCHITECTURE = "augmented"
"""The architecture of converted models in timm's registry."""

METADATA_KEY = "augment"
"""The entry of a safetensors file's metadata that makes it a converted model."""

DETECTOR_KEY = "augment_detector"
"""The entry of a safetensors file's metadata that makes it a detector."""

# The plan of the largest timm model, its tensors' names and shapes beside it, takes a few megabytes.
_LARGEST_HEADER = 32 * 2**20


def read_tensor_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which is held against its own length first.

    Raises:
        AugmentError: not a safetensors file, cut short, or with a header of absurd size.
    """
    from safetensors import safe_open

    with boundary(f"{file} cannot be read"), file.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8:
        raise FileError(f"{file} is no safetensors file: it has {len(start)} bytes")
    size = struct.unpack("<Q", start)[0]
    if size > file.stat().st_size - 8:
        raise FileError(f"{file} is no safetensors file, or cut short: its header should be {size:,} bytes long")
    if size > _LARGEST_HEADER:
        raise FileError(f"{file}: a header of {size:,} bytes is refused; the most is {_LARGEST_HEADER:,}")
    with boundary(f"{file} is no whole safetensors file"), safe_open(file, "numpy") as opened:
        return opened.metadata() or {}
