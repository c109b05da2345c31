"""What a converted model's file says of itself: the header's metadata, read and validated without torch.

Metadata of a safetensors file are strings: `format` is pt, and `augment` is one JSON with schema, plan, what was
inherited, versions, and the SHA-256 of the source weights.
"""

import json
import struct
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from augment_cli.bounds import MOST_CONVOLUTIONS, CountOfChannels, Name, Sha256, Text, Total
from augment_cli.errors import AugmentError, boundary
from augment_cli.plan import SCHEMA, Plan, check_schema
from augment_cli.recipe import describe_errors

KEY = "augment"
WEIGHTS = "model.safetensors"

# The plan of the largest timm model, its tensors' names and shapes beside it, takes a few megabytes.
_LARGEST_HEADER = 32 * 2**20


class Inheritance(BaseModel):
    """What one site kept of its source.

    exact: the source's function; carried: some filters bit for bit, with `share` of the importance of all; fitted: as
    carried, and attention computes what the other filters did, with a normalised mean squared error of `error` on
    images that were held out of the fit; new: nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Name
    kind: Literal["exact", "carried", "fitted", "new"]
    kept: CountOfChannels
    given_up: CountOfChannels
    share: Annotated[float, Field(ge=0, le=1)]
    error: Annotated[float, Field(ge=0)] | None = None


class Fidelity(BaseModel):
    """A converted model beside its source on `images` calibration images, held out of a fit on `fitted_on` others.

    agreement: on how many both have the same first class, as a share; divergence: KL of the source's probabilities from
    the converted model's, in nats, on average.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images: Total
    fitted_on: Total
    agreement: Annotated[float, Field(ge=0, le=1)]
    divergence: Annotated[float, Field(ge=0)]


class Header(BaseModel):
    """Everything but the tensors.

    fresh: parameters that began at random in fine-tuning, such as those of a classifier for other classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    schema_number: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    plan: Plan
    weights: Text
    source_sha256: Sha256
    inheritance: Annotated[tuple[Inheritance, ...], Field(max_length=MOST_CONVOLUTIONS)] = ()
    fidelity: Fidelity | None = None
    fresh: Annotated[tuple[Name, ...], Field(max_length=MOST_CONVOLUTIONS)] = ()
    versions: Annotated[dict[Name, Name], Field(max_length=100)] = {}

    def to_metadata(self) -> dict[str, str]:
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        return {"format": "pt", KEY: text}


def weights_file(path: Path) -> Path:
    """The safetensors file of a converted model, given it or its folder.

    Raises:
        AugmentError: there is none.
    """
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise AugmentError(f"{path}: no {WEIGHTS} in this folder" if path.is_dir() else f"{path}: no such file")
    return file


def read_header(path: Path) -> Header:
    """The validated header of a converted model's file or folder.

    Raises:
        AugmentError: not a safetensors file, cut short, not ours, of a newer schema, or not valid.
    """
    file = weights_file(path)
    text = read_metadata(file).get(KEY)
    if text is None:
        raise AugmentError(f"{file} is a safetensors file, but no converted model: its metadata have no {KEY!r}")
    return parse_header(text, file)


def parse_header(text: str, file: Path) -> Header:
    """The validated header out of the metadata of `file`.

    Raises:
        AugmentError: not JSON, of a newer schema, or not valid.
    """
    with boundary(f"{file}: its {KEY!r} metadata are not JSON"):
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("no object")
    check_schema(data, str(file))
    wrong = f"{file}: its {KEY!r} metadata are not valid"
    with boundary(wrong):
        try:
            return Header.model_validate(data)
        except ValidationError as error:
            raise AugmentError(f"{wrong}: {describe_errors(error, Header)}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which is held against its own length first.

    Raises:
        AugmentError: not a safetensors file, cut short, or with a header of absurd size.
    """
    from safetensors import safe_open

    with boundary(f"{file} cannot be read"), file.open("rb") as stream:
        start = stream.read(8)
    if len(start) < 8:
        raise AugmentError(f"{file} is no safetensors file: it has {len(start)} bytes")
    size = struct.unpack("<Q", start)[0]
    if size > file.stat().st_size - 8:
        raise AugmentError(f"{file} is no safetensors file, or cut short: its header should be {size:,} bytes long")
    if size > _LARGEST_HEADER:
        raise AugmentError(f"{file}: a header of {size:,} bytes is refused; the most is {_LARGEST_HEADER:,}")
    with boundary(f"{file} is no whole safetensors file"), safe_open(file, "numpy") as opened:
        return opened.metadata() or {}
