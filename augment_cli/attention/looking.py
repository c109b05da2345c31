"""Images through converted models: what each attends to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from augment_cli.analysis.functions import resolve
from augment_cli.attention.drawing import Observed, Seen, to_page, write_png
from augment_cli.attention.maps import KINDS, HeadMaps, KernelMaps, choose, layers_of, observe
from augment_cli.attention.rollout import Rollout, roll_out
from augment_cli.checkpoint.files import load
from augment_cli.checkpoint.metadata import metadata_of
from augment_cli.errors import InputError, boundary
from augment_cli.files import write_file
from augment_cli.reporting.sheet import Column, Sheet, Sheets
from augment_cli.reporting.text import cell
from augment_cli.reporting.units import share, size
from augment_cli.specs import ImageSize, height_width
from augment_cli.surgery.calibration import eval_transform

SCHEMA = 1

_HEAD_COLUMNS = (
    Column("Layer", is_text=True),
    *map(Column, ("Map", "Head", "Outside 3x3", "Entropy", "of at most", "Position")),
)
_HEAD_NOTE = (
    "Outside is the weight outside the 3x3 window around the position that looks; entropy, in nats, is at most that of "
    "looking everywhere alike; position is the share of the logits' variance that relative positions make."
)
_KERNEL_COLUMNS = (Column("Layer", is_text=True), *map(Column, ("Mean |A|", "Largest", "Scales at 0")))
_KERNEL_NOTE = (
    "The kernel is multiplied by 1 + A for this image. A is computed from scales, of which a ReLU sets some to 0. As "
    "converted, A is 0."
)
_SHARE_COLUMNS = (Column("Layer", is_text=True), Column("Share"))


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Sheets):
    """What converted models attend to on images, model by model.

    `str` gives the numbers that `augment attention` shows; `to("html")` the page in which pointing at an image chooses
    the query.
    """

    seen: list[Seen]

    @property
    def heading(self) -> str:
        return ", ".join(dict.fromkeys(one.model for one in self.seen))

    def sheets(self, full: bool = False) -> Iterator[Sheet]:
        for one in self.seen:
            heads = [layer for layer in one.layers if isinstance(layer, HeadMaps)]
            kernels = [layer for layer in one.layers if isinstance(layer, KernelMaps)]
            if heads:
                rows = tuple(row for layer in heads for row in _head_rows(layer))
                yield Sheet(f"{one.model} on {one.image}", _HEAD_COLUMNS, rows, _HEAD_NOTE)
            if kernels:
                rows = tuple((k.name, f"{k.magnitude:.3g}", f"{k.largest:.3g}", share(k.idle)) for k in kernels)
                yield Sheet(f"{one.model} on {one.image}: kernels", _KERNEL_COLUMNS, rows, _KERNEL_NOTE)
            for layer in one.layers:
                if isinstance(layer, Rollout):
                    shares = tuple((name, share(moved)) for name, moved in layer.shares.items())
                    yield Sheet(f"{one.model} on {one.image}: rollout", _SHARE_COLUMNS, shares, _about_shares(layer))

    def data(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "units": {"entropy": "nats"}, "seen": [one.to_dict() for one in self.seen]}

    def rows(self) -> list[dict[str, Any]]:
        keys = ["model", "image", "layer", "head", "outside", "entropy", "position", "magnitude", "largest", "idle"]
        keys += ["share", "moved"]
        found = []
        for one in self.seen:
            names = {"model": cell(one.model), "image": cell(one.image)}
            for name, own in (row for layer in one.layers for row in _flat(layer)):
                values = {key: value for key, value in own.items() if key in keys}
                found.append(dict.fromkeys(keys) | values | names | {"layer": cell(name)})
        return found

    def _html(self) -> str:
        return to_page(self.seen)

    def write_png(self, path: str | Path, at: tuple[float, float] = (0.5, 0.5), kind: str = "weights") -> None:
        """Draw the heads' maps for one query.

        Args:
            at: (x, y) of the query in the image, each from 0 to 1.
            kind: "weights", "content" alone or "position" alone.

        Raises:
            AugmentError: no such place or kind, or the file cannot be written.
        """
        if kind not in KINDS or not all(0 <= side <= 1 for side in at):
            raise InputError(f"`kind` is one of {', '.join(KINDS)}, and `at` is from 0 to 1 in both directions")
        write_file(Path(path), lambda temporary: write_png(self.seen, temporary, at, kind))


def _flat(layer: Observed) -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers of what was found, row by row, each with its layer's name."""
    numbers = layer.to_dict()
    if isinstance(layer, Rollout):
        yield "rollout", numbers
        yield from ((name, {"share": moved}) for name, moved in layer.shares.items())
    else:
        yield from ((layer.name, own) for own in numbers.get("heads", [numbers]))


def _about_shares(layer: Rollout) -> str:
    return (
        "Share is how far the output moves when each position of the layer attends to itself alone, over that and the "
        f"output then. In all, {layer.summary}."
    )


def _head_rows(layer: HeadMaps) -> Iterator[tuple[str, ...]]:
    found = layer.to_dict()
    for head in found["heads"]:
        numbers = share(head["outside"]), f"{head['entropy']:.2f}", f"{found['uniform']:.2f}", share(head["position"])
        yield layer.name, size(layer.map_size), str(head["head"]), *numbers


def attention_maps(
    models: "str | Path | nn.Module | Sequence[str | Path | nn.Module]",
    images: "str | Path | Image.Image | Sequence[str | Path | Image.Image]",
    layers: str | Sequence[str] = (),
    heads: int | Sequence[int] = (),
    input_size: ImageSize | None = None,
    base: str | None = None,
    rollout: bool = False,
) -> Attention:
    """Where the attention of converted models looks on images: maps and numbers by head; for AW the map A.

    Args:
        models: converted models, their files or folders, such as one before and one after fine-tuning.
        images: images or their files.
        layers: names or globs of layers. None takes one of each map size and the last of AW.
        heads: their numbers, from 0. None takes all.
        input_size: to look at, as for `convert`. None takes the size that each model was converted for.
        base: `package.module:function` that makes the source of a converted model that timm does not know.
        rollout: find also where positions draw from through all layers of AA together, or those that `layers` names.

    Raises:
        AugmentError: not a converted model, an image that cannot be read, or no such layer or head.
    """
    several = [models] if isinstance(models, (str, Path, nn.Module)) else models
    files = [images] if isinstance(images, (str, Path, Image.Image)) else images
    if not several or not files:
        raise InputError("nothing to look at: give a model and an image")
    sides = height_width(input_size)
    opened = [_open(model, base) for model in several]
    globs = (layers,) if isinstance(layers, str) else tuple(layers)
    numbers = (heads,) if isinstance(heads, int) else tuple(heads)
    chosen = [choose(model, globs) for _, model in opened]
    rolled = [
        list(layers_of(model) if not globs else names) if rollout else []
        for (_, model), names in zip(opened, chosen, strict=True)
    ]
    pictures = [_read(image, i) for i, image in enumerate(files)]
    seen = []
    for name, picture in pictures:
        for (label, model), names, along in zip(opened, chosen, rolled, strict=True):
            seen.append(_look(label, model, names, along, name, picture, numbers, sides))
    return Attention(seen)


def _open(model: str | Path | nn.Module, base: str | None) -> tuple[str, nn.Module]:
    if isinstance(model, nn.Module):
        if metadata_of(model) is None:
            raise InputError(f"{type(model).__name__} is not a converted model: take one from augment_cli.load")
        return type(model).__name__, model
    return str(model), load(model, resolve(base) if base else None).eval()


def _read(image: str | Path | Image.Image, index: int) -> tuple[str, Image.Image]:
    if isinstance(image, Image.Image):
        return f"image {index + 1}", image
    with boundary(f"image {image} cannot be read"), Image.open(image) as opened:
        return str(image), ImageOps.exif_transpose(opened).convert("RGB")


def _look(
    label: str,
    model: nn.Module,
    names: list[str],
    along: list[str],
    image: str,
    picture: Image.Image,
    heads: tuple[int, ...],
    input_size: tuple[int, int] | None,
) -> Seen:
    metadata = metadata_of(model)
    assert metadata is not None  # _open
    channels, *own = metadata.plan.input_size
    height, width = input_size or own
    transform, mean, std = eval_transform(model, (channels, height, width))
    pixels: Tensor = transform(picture.convert("L" if channels == 1 else "RGB"))
    if len(pixels) != channels:
        raise InputError(f"{label} takes images of {channels} channels: only 1 and 3 can be looked at")
    normal = [(p.float() / 255 - m) / s for p, m, s in zip(pixels, mean, std, strict=True)]
    batch = torch.stack(normal).unsqueeze(0).to(next(model.parameters()).dtype)
    found: list[Observed] = list(observe(model, batch, names))
    if heads:
        found = [layer.only(heads) if isinstance(layer, HeadMaps) else layer for layer in found]
        if not any(layer.numbers for layer in found if isinstance(layer, HeadMaps)):
            raise InputError(f"{label}: none of its layers has a head {', '.join(map(str, heads))}; they count from 0")
        found = [layer for layer in found if not isinstance(layer, HeadMaps) or layer.numbers]
    if along:
        found.append(roll_out(model, batch, along))
    shown = pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Seen(label, image, shown, found)
