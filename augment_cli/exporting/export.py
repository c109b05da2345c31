"""Export a model, run what was written in its own runtime, and compare."""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli import signals
from augment_cli.checkpoint.metadata import metadata_of
from augment_cli.errors import InputError, boundary
from augment_cli.exporting.formats import SIDES, Format, Run, format_of
from augment_cli.exporting.inference import for_inference, total_stride
from augment_cli.files import check_output, write_file
from augment_cli.surgery.calibration import Calibration

TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.5}
"""Largest difference allowed, as a share of the largest output. Bounds against errors, not measures of quality."""
DYNAMIC = ("batch", "batch,size")
_BATCHES = (1, 3)


@dataclass(frozen=True)
class Exported:
    """A written file, and how it compares with its model in torch.

    difference: largest one of the outputs, as a share of the largest output. agreement: percent of the images with the
    same first class, None where outputs are not (images, classes). stride: what sides of images are multiples of, where
    they may vary. images: how many were compared, at two sizes where the size may vary.
    """

    path: str
    format: str
    precision: str
    opset: int | None
    input_size: tuple[int, int, int]
    stride: int | None
    images: int
    difference: float
    agreement: float | None
    plan_sha256: str | None
    source_sha256: str | None
    versions: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def export(
    model: nn.Module,
    path: str | Path,
    input_size: tuple[int, int, int],
    *,
    dynamic: str = "batch",
    precision: str = "fp32",
    opset: int = 20,
    calibration: Calibration | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export a model and check the file in its own runtime, at two sizes of batches, and of images where they vary.

    A small JSON of the comparison is written beside the file, and into its metadata where the format has some.

    Args:
        path: its suffix says the format: .onnx, .pt2 or .xml.
        input_size: (channels, height, width).
        dynamic: "batch", or "batch,size" for images of other sizes too, in multiples of the model's total stride.
        precision: fp32, fp16 or int8.
        opset: of ONNX.
        calibration: images to quantise with and to compare on; without them the comparison is on random ones.
        tolerance: largest difference allowed, as a share of the largest output; None takes TOLERANCES.

    Raises:
        AugmentError: no such format, the model cannot be exported, or the outputs differ too much. Nothing is written.
    """
    path = Path(path)
    kind = format_of(path)
    _check_settings(kind, dynamic, precision, opset, calibration, tolerance)
    outputs = [path.with_suffix(part) for part in kind.parts] + [sidecar(path)]
    for output in outputs:
        check_output(output, overwrite)
    stride = total_stride(model, input_size) if dynamic == "batch,size" else None
    images = _images(input_size, stride, calibration)
    wanted = [_outputs(model, part).numpy() for part in images]
    made = for_inference(model, input_size, any_size=stride is not None)
    options = {"opset": opset, "precision": precision, "images": calibration and calibration.fitting()}
    options["stride"] = stride
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        with boundary(f"{kind.name} cannot express this model"), torch.no_grad():
            kind.write(made, images[0][:2], file, options)
        run = kind.run(file)
        difference, agreement = _compare([_run_all(run, part, kind) for part in images], wanted)
        _check_difference(difference, TOLERANCES[precision] if tolerance is None else tolerance, path)
        exported = Exported(
            path=path.name,
            format=kind.name,
            precision=precision,
            opset=opset if kind.name == "ONNX" else None,
            input_size=input_size,
            stride=stride,
            images=sum(map(len, images)),
            difference=difference,
            agreement=agreement,
            **_digests(model),
            versions={name: version(name) for name in ("augment-cli", "torch", "timm", *kind.packages)},
        )
        kind.annotate(file, _entries(exported))
        (file.parent / sidecar(path).name).write_text(exported.to_json() + "\n", encoding="utf-8")
        with signals.held():  # all of its files, or none
            for output in outputs:
                write_file(output, partial(shutil.copyfile, file.parent / output.name))
    return exported


def sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """A model's outputs in evaluation mode; every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with boundary("the model does not run on images of this size"), torch.no_grad():
            parts = [model(part) for part in images.split(_BATCHES[1])]
    finally:
        for module, mode in modes:
            module.training = mode
    if not all(isinstance(part, Tensor) for part in parts):
        raise InputError(f"the model's output is {type(parts[0]).__name__}, not one tensor: it cannot be compared")
    return torch.cat(parts)


def _check_settings(
    kind: Format, dynamic: str, precision: str, opset: int, calibration: Calibration | None, tolerance: float | None
) -> None:
    if dynamic not in DYNAMIC:
        raise InputError(f"`dynamic={dynamic!r}`: use {' or '.join(map(repr, DYNAMIC))}")
    if precision not in kind.precisions:
        raise InputError(f"`precision={precision!r}`: {kind.name} is written in {', '.join(kind.precisions)}")
    if precision == "int8" and calibration is None:
        raise InputError("`precision='int8'` needs images to measure ranges on: give `calibrate`")
    if not 18 <= opset <= 23:
        raise InputError(f"`opset={opset}`: torch's exporter writes opsets 18 to 23")
    if tolerance is not None and not tolerance > 0:
        raise InputError(f"`tolerance={tolerance}` is not above 0")


def _images(input_size: tuple[int, int, int], stride: int | None, calibration: Calibration | None) -> list[Tensor]:
    """Images to compare on, of each size: held-out ones, or as many random ones as two batches of _BATCHES."""
    if calibration is not None:
        images = torch.cat(list(calibration.held_out()))
    else:
        images = torch.randn(sum(_BATCHES), *input_size, generator=torch.Generator().manual_seed(0))
    if stride is None:
        return [images]
    height, width = input_size[1:]
    low, high = (stride * side for side in SIDES)
    if any(side % stride or not low <= side <= high for side in (height, width)):
        raise InputError(
            f"`dynamic='batch,size'` takes images whose sides are multiples of {stride}, this model's total stride, "
            f"from {low} to {high}, and not {height}x{width}: `input_size` sets another size"
        )
    larger = (height + stride, width + 2 * stride) if width + 2 * stride <= high else (height - stride, width - stride)
    return [images, F.interpolate(images, size=larger, mode="bilinear", align_corners=False)]


def _run_all(run: Run, images: Tensor, kind: Format) -> np.ndarray:
    """Outputs in a runtime, by batches of different sizes."""
    first, second = _BATCHES
    parts = [images[:first], *images[first:].split(second)]
    with boundary(f"{kind.name}'s runtime cannot run the file"):
        return np.concatenate([run(part.numpy()) for part in parts])


def _compare(got: list[np.ndarray], wanted: list[np.ndarray]) -> tuple[float, float | None]:
    """The largest difference over all sizes of images, and the agreement over all images."""
    pairs = list(zip(got, wanted, strict=True))
    difference = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12)) for a, b in pairs)
    if wanted[0].ndim != 2:
        return difference, None
    return difference, round(100 * float(np.concatenate([a.argmax(1) == b.argmax(1) for a, b in pairs]).mean()), 3)


def _check_difference(difference: float, bound: float, path: Path) -> None:
    if not difference <= bound:  # also where it is no number
        raise InputError(
            f"{path} would differ from the model by {difference:.2g} of its largest output, more than {bound:g}; "
            f"nothing is written. `tolerance` sets the bound"
        )


def _digests(model: nn.Module) -> dict[str, str | None]:
    """Digests of the plan and of the source's weights, None for a model that was not converted."""
    metadata = metadata_of(model)
    return {
        "plan_sha256": metadata.plan.digest() if metadata else None,
        "source_sha256": metadata.source_sha256 if metadata else None,
    }


def _entries(exported: Exported) -> dict[str, str]:
    found = {key: value for key, value in asdict(exported).items() if value is not None and key != "path"}
    return {f"augment.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
