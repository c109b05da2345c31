"""Save a detector as one safetensors file that rebuilds itself, and load it.

The metadata hold the detector's settings and, where its backbone is converted, the plan. Loading runs no code from the
file: settings and tensors are held against each other on the meta device before memory is taken.
"""

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from augment_cli.analysis import source
from augment_cli.analysis.guard import Limit, limited
from augment_cli.checkpoint import rebuild
from augment_cli.checkpoint.files import sort_metadata
from augment_cli.checkpoint.metadata import Metadata, metadata_of, parse_metadata, weights_file
from augment_cli.detection.build import assemble, settings_of
from augment_cli.detection.pyramid import Body, extract
from augment_cli.detection.settings import DetectorSettings
from augment_cli.errors import FileError, InputError, boundary
from augment_cli.files import write_file
from augment_cli.formats import DETECTOR_KEY, METADATA_KEY, read_tensor_metadata
from augment_cli.planning.reading import check_schema
from augment_cli.planning.recipe import describe_errors
from augment_cli.seeds import seeded


def save_detector(model: nn.Module, path: Path) -> None:
    """Write a detector with its weights as they are now.

    Raises:
        AugmentError: not a detector of `detection`, a name that does not end in .safetensors, or the disk refuses.
    """
    from safetensors.torch import save_file

    settings = settings_of(model)
    if settings is None:
        raise InputError(f"{type(model).__name__} is no detector of augment_cli.detection")
    if path.suffix != ".safetensors":
        raise FileError(f"{path}: a detector is one file: give a name that ends in .safetensors")
    entries = {"format": "pt", DETECTOR_KEY: settings.to_json()}
    if (metadata := metadata_of(model)) is not None:
        entries |= metadata.to_metadata()
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=entries)
        sort_metadata(temporary)

    write_file(path, write)


def load_detector(path: Path) -> nn.Module:
    """The detector of a file, in train mode.

    Raises:
        AugmentError: not a detector's file, cut short, of a newer schema, or settings or weights that do not fit.
    """
    from safetensors.torch import load_file

    file = weights_file(path)
    settings, metadata = read_detector(file)
    limit = Limit.of(rebuild.shapes_in(file).values())
    with limited("the detector", limit), torch.device("meta"):
        rebuild.check_tensors(build(settings, metadata), file)
    with boundary(f"{file} cannot be loaded"):
        model = build(settings, metadata)
        model.load_state_dict(load_file(file))
    return model


def read_detector(file: Path) -> tuple[DetectorSettings, Metadata | None]:
    """The settings of a detector's file, and its backbone's metadata where that is converted.

    Raises:
        AugmentError: no detector, of a newer schema, or not valid.
    """
    entries = read_tensor_metadata(file)
    if DETECTOR_KEY not in entries:
        raise FileError(f"{file} holds no detector: its metadata have no {DETECTOR_KEY!r}")
    wrong = f"{file}: its {DETECTOR_KEY!r} metadata are not valid"
    with boundary(wrong):
        data = json.loads(entries[DETECTOR_KEY])
    check_schema(data, str(file))
    with boundary(wrong):
        try:
            settings = DetectorSettings.model_validate(data)
        except ValidationError as error:
            raise FileError(f"{wrong}: {describe_errors(error, DetectorSettings)}") from error
    text = entries.get(METADATA_KEY)
    metadata = None if text is None else parse_metadata(text, file)
    if metadata is not None and (metadata.plan.base, metadata.plan.model) != ("timm", settings.model):
        raise FileError(f"{wrong}: the backbone is {settings.model}, and the plan is for {metadata.plan.model}")
    return settings, metadata


def build(settings: DetectorSettings, metadata: Metadata | None) -> nn.Module:
    """A detector by its settings and its backbone's metadata, with random weights."""
    args, sites = dict(settings.model_args), frozenset[str]()
    with seeded("load"):
        if metadata is None:
            described = source.Source(settings.model, args, (3, 224, 224))
            model = source.create(described)
        else:
            args, sites = dict(metadata.plan.model_args), frozenset(site.name for site in metadata.plan.sites)
            model = rebuild.build(metadata.plan)
        found = extract(model, settings.model, args, sites, settings.levels, ())
    body = Body(found.module, settings.model, args, settings.levels, found.widths, metadata)
    built: nn.Module = assemble(settings, body)
    return built
