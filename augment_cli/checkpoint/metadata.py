"""The metadata of a converted model's file, read and validated without torch.

Metadata of a safetensors file are strings: `format` is pt, and `augment` is one JSON with schema, plan, what was
inherited, versions, and the SHA-256 of the source weights.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from augment_cli import hub
from augment_cli.bounds import MOST_CONVOLUTIONS, Name, Sha256, Text
from augment_cli.errors import FileError, boundary
from augment_cli.files import read_text
from augment_cli.formats import ARCHITECTURE, METADATA_KEY, read_tensor_metadata
from augment_cli.planning.plan import Plan
from augment_cli.planning.reading import check_schema
from augment_cli.planning.recipe import describe_errors
from augment_cli.surgery.records import Fidelity, Inheritance

WEIGHTS = "model.safetensors"


class Metadata(BaseModel):
    """Everything but the tensors.

    fresh: parameters that began at random in fine-tuning, such as those of a classifier for other classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    plan: Plan
    weights: Text
    source_sha256: Sha256
    inheritance: Annotated[tuple[Inheritance, ...], Field(max_length=MOST_CONVOLUTIONS)] = ()
    fidelity: Fidelity | None = None
    fresh: Annotated[tuple[Name, ...], Field(max_length=MOST_CONVOLUTIONS)] = ()
    versions: Annotated[dict[Name, Name], Field(max_length=100)] = {}

    def to_metadata(self) -> dict[str, str]:
        text = json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
        return {"format": "pt", METADATA_KEY: text}


def metadata_of(model: object) -> Metadata | None:
    """The metadata that hang on a converted model; None for any other object."""
    found = getattr(model, "augment_metadata", None)
    return found if isinstance(found, Metadata) else None


def attach(model: object, metadata: Metadata) -> None:
    """Hang metadata on a converted model; copies and pickles of it keep them."""
    model.__dict__["augment_metadata"] = metadata


def weights_file(path: Path) -> Path:
    """The safetensors file of a converted model, given it, its folder, or hf-hub:NAME, from which it is downloaded.

    Raises:
        AugmentError: there is none.
    """
    if hub.is_hub_name(path):
        return hub.fetch(path, WEIGHTS)
    file = path / WEIGHTS if path.is_dir() else path
    if not file.is_file() and path.is_dir():
        inside = [name for name in ("best", "last") if (path / name / WEIGHTS).is_file()]
        hint = f"; its folders {' and '.join(inside)} have one" if inside else ""
        raise FileError(f"{path}: no {WEIGHTS} in this folder{hint}")
    if not file.is_file():
        raise FileError(f"{path}: no such file")
    return file


def locate(model: str | Path) -> Path:
    """Where a converted model lies: a path as it is, and of hf-hub:NAME what was downloaded to the hub's cache.

    The name of a model on the hub that is not converted comes back as it is, which is no path that exists.

    Raises:
        AugmentError: the hub has no such model, or cannot be reached.
    """
    if not hub.is_hub_name(model):
        return Path(model)
    try:
        folder = hub.fetch(model, "config.json").parent
    except FileError:  # timm does not know the model
        return weights_file(Path(model))
    return weights_file(Path(model)).parent if architecture_of(folder) == ARCHITECTURE else Path(model)


def architecture_of(folder: Path) -> str | None:
    """The architecture that timm's config.json in a folder names; None without one."""
    try:
        return json.loads(read_text(folder / "config.json", "config", 2**25))["architecture"]
    except Exception:  # no file, or not a config of timm's: opening the model reports it
        return None


def read_metadata(path: Path) -> Metadata:
    """The validated metadata of a converted model's file or folder.

    Raises:
        AugmentError: not a safetensors file, cut short, not ours, of a newer schema, or not valid.
    """
    file = weights_file(path)
    text = read_tensor_metadata(file).get(METADATA_KEY)
    if text is None:
        raise FileError(f"{file} is a safetensors file, but no converted model: its metadata have no {METADATA_KEY!r}")
    return parse_metadata(text, file)


def parse_metadata(text: str, file: Path) -> Metadata:
    """The validated metadata out of the metadata of `file`.

    Raises:
        AugmentError: not JSON, of a newer schema, or not valid.
    """
    with boundary(f"{file}: its {METADATA_KEY!r} metadata are not JSON"):
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("no object")
    check_schema(data, str(file))
    wrong = f"{file}: its {METADATA_KEY!r} metadata are not valid"
    with boundary(wrong):
        try:
            return Metadata.model_validate(data)
        except ValidationError as error:
            raise FileError(f"{wrong}: {describe_errors(error, Metadata)}") from error
