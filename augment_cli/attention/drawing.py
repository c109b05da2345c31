"""Attention as pictures: a page in which a position is chosen by pointing at it, and a PNG."""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from augment_cli.attention.maps import KINDS, Grid, HeadMaps, KernelMaps
from augment_cli.attention.rollout import Rollout
from augment_cli.reporting.html import page
from augment_cli.reporting.markup import Markup, tag
from augment_cli.reporting.style import SIGNED, WEIGHTS, picture
from augment_cli.reporting.units import counted, share, size

_TEXTS = {"weights": "all logits", "content": "content alone", "position": "position alone"}
Observed = HeadMaps | KernelMaps | Rollout
_CANVAS = 130  # pixels, as in _STYLE
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


@dataclass(frozen=True, eq=False)
class Seen:
    """A model's attention on one image, which is shown as the model sees it: bytes (H, W, 3)."""

    model: str
    image: str
    pixels: np.ndarray
    layers: list[Observed]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model, "image": self.image, "heads": [], "kernels": [], "rollout": None}
        for layer in self.layers:
            if isinstance(layer, Rollout):
                found["rollout"] = layer.to_dict()
            else:
                found["heads" if isinstance(layer, HeadMaps) else "kernels"].append(layer.to_dict())
        return found


def to_page(seen: list[Seen]) -> str:
    """One HTML page that needs nothing else. Pointing at an image chooses the query in all maps of that image."""
    title = ", ".join(dict.fromkeys(one.model for one in seen))
    heads = any(isinstance(layer, HeadMaps) for one in seen for layer in one.layers)
    header = tag("header", tag("p", "augment-cli attention", class_="eyebrow"), tag("h1", title), *_lead(heads))
    by_image: dict[str, list[Seen]] = {}
    for one in seen:
        by_image.setdefault(one.image, []).append(one)
    main = tag("main", (_of_image(i, name, members) for i, (name, members) in enumerate(by_image.items())))
    script = [tag("script", Markup(_SCRIPT))] if heads else []
    return page(title, header, main, *script, policy=_POLICY, style=_STYLE)


def _lead(heads: bool) -> Iterator[Markup]:
    """How to read the page, and the choice of logits where it shows heads."""
    if not heads:
        yield tag("p", "AW multiplies the kernel by 1 + A, which it computes for each image.", class_="lead")
        return
    yield tag("p", _LEAD, class_="lead")
    yield tag("p", *(_choice(kind) for kind in KINDS), class_="lead")


_LEAD = (
    "Point at an image to choose the position that looks; away from it, the maps show the mean over all positions. "
    "Each map is scaled to its own maximum. Under each head: the weight outside the 3x3 window around the position, "
    "the entropy of the weights, and the share of the logits' variance that relative positions make."
)


def _choice(kind: str) -> Markup:
    checked = "checked" if kind == "weights" else None
    return tag("label", tag("input", type="radio", name="kind", value=kind, checked=checked), f" {_TEXTS[kind]}")


def _of_image(index: int, name: str, members: list[Seen]) -> Markup:
    height, width = members[0].pixels.shape[:2]
    picture = tag("img", src=_data(_jpeg(members[0].pixels), "jpeg"), alt=name, width=width, height=height)
    parts = (_layer(one, layer, len(members) > 1) for one in members for layer in one.layers)
    chooser = tag("div", picture, tag("i"), class_="chooser")
    return tag("section", tag("h2", name), chooser, *parts, class_="looked", data_image=index)


def _layer(one: Seen, layer: Observed, several: bool) -> Markup:
    model = f"{one.model}: " if several else ""
    if isinstance(layer, KernelMaps):
        return _kernel(model, layer)
    if isinstance(layer, Rollout):
        about = f"{model}rollout over {counted(len(layer.shares), 'layer')}: {layer.summary}"
        return _canvases(one, layer, about, {"rollout": layer.maps[None]}, ("moved",) if layer.moved else ())
    uniform = layer.to_dict()["uniform"]
    about = (
        f"{model}{layer.name}: {counted(layer.heads, 'head')} on a map of {size(layer.map_size)}; looking everywhere "
        f"alike has an entropy of {uniform:.2f} nats"
    )
    rows_of = (layer.numbers, layer.outside.tolist(), layer.entropy.tolist(), layer.position.tolist())
    captions = (
        f"head {number}: {share(outside, 0)} outside, {entropy:.2f} nats, {share(position, 0)} position"
        for number, outside, entropy, position in zip(*rows_of, strict=True)
    )
    return _canvases(one, layer, about, layer.maps, captions)


def _canvases(one: Seen, layer: Grid, about: str, maps: Mapping[str, Tensor], captions: Iterable[str]) -> Markup:
    """A canvas for each caption, which draws of the maps (captions, n, h, w) the chosen kind or the only one."""
    sprites = (tag("img", src=_data(_sprite(m), "png"), alt="", hidden="", data_kind=kind) for kind, m in maps.items())
    canvas_height = round(_CANVAS * one.pixels.shape[0] / one.pixels.shape[1])
    figures = (
        tag(
            "figure",
            tag("canvas", width=_CANVAS, height=canvas_height, data_head=i),
            tag("figcaption", caption),
        )
        for i, caption in enumerate(captions)
    )
    ys, xs = (" ".join(f"{middle:.4f}" for middle in middles) for middles in layer.centres)
    height, width = next(iter(maps.values())).shape[-2:]
    grid = {"data_ys": ys, "data_xs": xs, "data_height": height, "data_width": width}
    return tag("div", tag("h3", about), *sprites, tag("div", *figures, class_="heads"), class_="layer", **grid)


def _kernel(model: str, layer: KernelMaps) -> Markup:
    groups, height, width = layer.mean.shape
    about = (
        f"{model}{layer.name}: the kernel is multiplied by 1 + A; mean of |A| {layer.magnitude:.3g}, at most "
        f"{layer.largest:.3g}; {share(layer.idle)} of the scales are 0"
    )
    picture = tag("img", src=_data(_kernel_picture(layer), "png"), alt="A, by group of input channels and tap")
    note = (
        f"A's mean over the output channels: {counted(groups, 'group')} of input channels, {height}x{width} taps "
        "each; bright above 0, dark below."
    )
    return tag("div", tag("h3", about), tag("p", note, class_="quiet"), picture, class_="layer kernel")


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def _scaled(maps: Tensor) -> np.ndarray:
    """Maps (..., h, w) as bytes, each scaled to its maximum; its root, so that small weights are seen."""
    return (255 * (maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-30)).sqrt()).round().byte().numpy()


def _sprite(maps: Tensor) -> bytes:
    """All maps (heads, n, h, w) of one kind as one PNG: heads below each other, queries beside each other."""
    heads, queries, height, width = maps.shape
    tiles = _scaled(maps).transpose(0, 2, 1, 3).reshape(heads * height, queries * width)
    image = Image.frombytes("P", tiles.shape[::-1], tiles.tobytes())
    colours = _colours(WEIGHTS)
    image.putpalette(colours.tobytes())
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=bytes(range(40, 40 + 200)) + bytes([240] * 56), optimize=True)
    return stream.getvalue()


def _kernel_picture(layer: KernelMaps) -> bytes:
    """A, bright above 0 and dark below, a small map of taps for each group of input channels."""
    groups, height, width = layer.mean.shape
    most = float(layer.mean.abs().max()) or 1.0
    values = (127.5 + 127.5 * layer.mean / most).round().byte().numpy()
    across = min(groups, 32)
    tiles = np.full((-(-groups // across) * (height + 1), across * (width + 1)), 128, np.uint8)
    for i, tap in enumerate(values):
        top, left = i // across * (height + 1), i % across * (width + 1)
        tiles[top : top + height, left : left + width] = tap
    coloured = Image.fromarray(_colours(SIGNED)[tiles])
    stream = io.BytesIO()
    coloured.resize((coloured.width * 7, coloured.height * 7), Image.Resampling.NEAREST).save(stream, "PNG")
    return stream.getvalue()


def _colours(name: str) -> np.ndarray:
    """256 colours of a map of matplotlib's, (256, 3) bytes."""
    from matplotlib import colormaps

    return np.round(255 * colormaps[name](np.arange(256))[:, :3]).astype(np.uint8)


def write_png(seen: list[Seen], path: Path, at: tuple[float, float], kind: str = "weights") -> None:
    """Draw every layer's heads for one query as a PNG: a row for each layer, a column for each head.

    Args:
        at: (x, y) of the query in the image, each from 0 to 1.
    """
    lines = [(one, layer) for one in seen for layer in one.layers]
    across = 1 + max((layer.heads for _, layer in lines if isinstance(layer, HeadMaps)), default=1)
    with picture(path, 1.7 * across, 2.2 * len(lines), dpi=110) as figure:
        for axes, (one, layer) in zip(figure.subplots(len(lines), across, squeeze=False), lines, strict=True):
            for ax in axes:
                ax.axis("off")
                ax.set_anchor("S")  # room for the title above an image that is not as high as its axes
            axes[0].imshow(one.pixels)
            name = "rollout" if isinstance(layer, Rollout) else layer.name
            axes[0].set_title("\n".join((Path(one.model).name, Path(one.image).name, name)), fontsize=7)
            if isinstance(layer, KernelMaps):
                axes[1].imshow(Image.open(io.BytesIO(_kernel_picture(layer))))
                axes[1].set_title(f"A, at most {layer.largest:.2g}", fontsize=7)
            else:
                _draw_tiles(axes, one.pixels, layer, layer.nearest(*at), kind)


def _draw_tiles(axes: Sequence[Any], pixels: np.ndarray, layer: HeadMaps | Rollout, query: int, kind: str) -> None:
    """Mark the query in the image of the first axes, and draw its maps on the others."""
    ys, xs = layer.centres
    x, y = xs[query % len(xs)] * pixels.shape[1], ys[query // len(xs)] * pixels.shape[0]
    axes[0].plot(x, y, "o", mfc="none", mec="white", mew=2)
    for ax, tile, title in zip(axes[1:], *_tiles(layer, query, kind), strict=False):
        ax.imshow(pixels, alpha=0.35)
        extent = (0, pixels.shape[1], pixels.shape[0], 0)
        colours = {"cmap": WEIGHTS, "vmin": 0, "vmax": 255, "alpha": 0.75}
        ax.imshow(tile, **colours, extent=extent, interpolation="bilinear")
        ax.plot(x, y, "o", mfc="none", mec="white", ms=4)
        ax.set_title(title, fontsize=7)


def _tiles(layer: HeadMaps | Rollout, query: int, kind: str) -> tuple[np.ndarray, list[str]]:
    """The maps of one query as bytes, (maps, h, w), and a title for each."""
    if isinstance(layer, Rollout):
        return _scaled(layer.maps[None, query]), [f"{share(layer.moved)} moved, {share(layer.outside, 0)} outside"]
    titles = zip(layer.numbers, layer.outside.tolist(), strict=True)
    return _scaled(layer.maps[kind][:, query]), [f"head {n}: {share(outside, 0)} outside" for n, outside in titles]


_STYLE = """
label { display: inline-block; margin-right: 0.8rem; }
.chooser { position: relative; display: inline-block; margin: 0.8rem 0; cursor: crosshair; touch-action: none; }
.chooser img { display: block; min-width: 14rem; max-width: min(100%, 26rem); height: auto;
  border-radius: 6px; }
.chooser i { position: absolute; width: 14px; height: 14px; margin: -7px; border: 2px solid #fff; border-radius: 99px;
  outline: 1px solid #000; pointer-events: none; display: none; }
.layer { margin-top: 1.2rem; }
.layer h3 { font-size: 0.92rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
.heads { display: flex; flex-wrap: wrap; gap: 0.7rem; }
.heads figure { margin: 0; overflow: visible; width: 130px; }
.heads canvas { border-radius: 4px; background: #000; }
.heads figcaption { font-size: 0.72rem; color: var(--quiet); font-weight: 400; line-height: 1.3; }
.kernel img { image-rendering: pixelated; max-width: 100%; margin-top: 0.4rem; }
@media print {
  section.looked { break-inside: auto; }
  .chooser img { max-width: 14rem; }
  .layer { break-inside: avoid; }
  label { display: none; }
  .heads figure, .heads canvas { width: 9.5rem; height: auto; }
}
"""

_SCRIPT = """
"use strict";
for (const part of document.querySelectorAll(".looked")) {
  const photo = part.querySelector(".chooser img"), mark = part.querySelector(".chooser i");
  let at = null;
  const draw = () => {
    const kind = document.querySelector("input[name=kind]:checked").value;
    mark.style.display = at ? "block" : "none";
    if (at) { mark.style.left = 100 * at.x + "%"; mark.style.top = 100 * at.y + "%"; }
    for (const layer of part.querySelectorAll(".layer:not(.kernel)")) {
      const sprite = layer.querySelector(`img[data-kind=${kind}], img[data-kind=rollout]`);
      const [h, w] = [+layer.dataset.height, +layer.dataset.width];
      const [ys, xs] = [layer.dataset.ys.split(" "), layer.dataset.xs.split(" ")];
      const row = at && Math.floor(at.y * ys.length), column = at && Math.floor(at.x * xs.length);
      const query = at ? row * xs.length + column : ys.length * xs.length;
      for (const canvas of layer.querySelectorAll("canvas")) {
        const pen = canvas.getContext("2d");
        pen.globalAlpha = 1;
        pen.drawImage(photo, 0, 0, canvas.width, canvas.height);
        pen.drawImage(sprite, query * w, canvas.dataset.head * h, w, h, 0, 0, canvas.width, canvas.height);
        if (at) {
          pen.beginPath();
          pen.arc(xs[column] * canvas.width, ys[row] * canvas.height, 4, 0, 7);
          pen.lineWidth = 2; pen.strokeStyle = "#fff"; pen.stroke();
        }
      }
    }
  };
  const point = (event, box) => {
    at = { x: Math.max(0, Math.min(0.999, (event.clientX - box.left) / box.width)),
           y: Math.max(0, Math.min(0.999, (event.clientY - box.top) / box.height)) };
    draw();
  };
  for (const target of [photo, ...part.querySelectorAll("canvas")]) {
    target.addEventListener("pointermove", event => point(event, target.getBoundingClientRect()));
    target.addEventListener("pointerdown", event => point(event, target.getBoundingClientRect()));
    target.addEventListener("pointerleave", () => { at = null; draw(); });
  }
  for (const button of document.querySelectorAll("input[name=kind]")) button.addEventListener("change", draw);
  Promise.all([...part.querySelectorAll("img")].map(image => image.decode())).then(draw, draw);
}
"""
