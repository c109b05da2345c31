"""File formats of exported models: how each is written, and how its own runtime runs it."""

import io
import json
import logging
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from augment_cli.errors import InputError, boundary

Run = Callable[[np.ndarray], np.ndarray]
"""A model in its runtime. Shapes: images (N, C, H, W) in single precision to outputs (N, ...)."""


class Format(ABC):
    """A kind of file. `parts` are the suffixes of what is written, the first one named by the user."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]] = ()
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")

    @abstractmethod
    def write(self, model: nn.Module, example: Tensor, path: Path, options: dict[str, Any]) -> None:
        """Write a model in evaluation mode.

        Args:
            example: images (N, C, H, W); N is free in the result.
            options: `opset`, `precision`, `images`, batches for int8, and `stride`: None, or what the sides of images
                of any size are multiples of.
        """

    @abstractmethod
    def run(self, path: Path) -> Run:
        """The written model in its runtime, on the CPU."""

    @abstractmethod
    def annotate(self, path: Path, entries: dict[str, str]) -> None:
        """Put entries into the file's own metadata."""


class Onnx(Format):
    """ONNX by torch's exporter; run by onnxruntime."""

    name = "ONNX"
    parts = (".onnx",)
    packages = ("onnx", "onnxscript", "onnxruntime")
    precisions = ("fp32", "fp16", "int8")

    def write(self, model: nn.Module, example: Tensor, path: Path, options: dict[str, Any]) -> None:
        half = options["precision"] == "fp16"
        model, example = (_Half(model).eval(), example) if half else (model, example)
        names = {"input_names": ["images"], "output_names": ["outputs"], "opset_version": options["opset"]}
        with _quietly():
            program: Any = torch.onnx.export(
                model, (example,), dynamo=True, dynamic_shapes=_free(options), verbose=False, **names
            )
            program.save(path, external_data=False)
        if options["precision"] == "int8":
            _quantize_onnx(path, options["images"])

    def run(self, path: Path) -> Run:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        (name,) = (given.name for given in session.get_inputs())

        def run(images: np.ndarray) -> np.ndarray:
            (outputs,) = session.run(None, {name: images})
            return np.asarray(outputs)

        return run

    def annotate(self, path: Path, entries: dict[str, str]) -> None:
        import onnx

        model = onnx.load(path)
        onnx.helper.set_model_props(model, entries)
        onnx.save(model, path)


class Program(Format):
    """torch.export's program; run by torch."""

    name = "torch.export"
    parts = (".pt2",)

    def write(self, model: nn.Module, example: Tensor, path: Path, options: dict[str, Any]) -> None:
        model = _Half(model).eval() if options["precision"] == "fp16" else model
        with _quietly():
            torch.export.save(torch.export.export(model, (example,), dynamic_shapes=_free(options)), path)

    def run(self, path: Path) -> Run:
        with _quietly():
            module = torch.export.load(path).module()

        def run(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                outputs: Tensor = module(torch.from_numpy(images))
            return outputs.numpy()

        return run

    def annotate(self, path: Path, entries: dict[str, str]) -> None:
        with _quietly():
            program = torch.export.load(path)
            torch.export.save(program, path, extra_files={"augment.json": json.dumps(entries)})


class OpenVino(Format):
    """OpenVINO's two files; run by OpenVINO. fp16 stores the weights in half precision."""

    name = "OpenVINO"
    parts = (".xml", ".bin")
    packages = ("onnx", "onnxscript", "openvino", "nncf")
    precisions = ("fp32", "fp16", "int8")

    def write(self, model: nn.Module, example: Tensor, path: Path, options: dict[str, Any]) -> None:
        """Write by way of ONNX: from torch.export's program, OpenVINO makes a product of every expanded operand."""
        openvino = _silent_import("openvino")
        between = path.with_name(f"between-{path.stem}.onnx")
        FORMATS[".onnx"].write(model, example, between, {**options, "precision": "fp32"})
        converted = openvino.Core().read_model(between)
        if options["precision"] == "int8":
            converted = _quantize_openvino(converted, options["images"])
        openvino.save_model(converted, path, compress_to_fp16=options["precision"] == "fp16")
        between.unlink()

    def run(self, path: Path) -> Run:
        openvino = _silent_import("openvino")
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(images: np.ndarray) -> np.ndarray:
            return np.asarray(compiled(images)[0])

        return run

    def annotate(self, path: Path, entries: dict[str, str]) -> None:
        openvino = _silent_import("openvino")
        model = openvino.Core().read_model(path)
        for key, value in entries.items():
            model.set_rt_info(value, ["augment", key])
        annotated = path.with_name(f"annotated-{path.name}")
        openvino.save_model(model, annotated, compress_to_fp16=False)  # weights in half precision stay so
        for part in self.parts:
            annotated.with_suffix(part).replace(path.with_suffix(part))


class _Half(nn.Module):
    """A model in half precision, which takes and returns single precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.model(images.half())
        return outputs.float()


FORMATS: dict[str, Format] = {made.parts[0]: made for made in (Onnx(), Program(), OpenVino())}


def format_of(path: Path) -> Format:
    """The format of a file by its suffix.

    Raises:
        AugmentError: no format has it, or what the format needs is not installed.
    """
    found = FORMATS.get(path.suffix)
    if found is None:
        known = ", ".join(f"{suffix} ({made.name})" for suffix, made in FORMATS.items())
        raise InputError(f"{path}: the suffix says the format, one of {known}")
    if missing := [package for package in found.packages if find_spec(package) is None]:
        raise InputError(
            f"{found.name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install 'augment-cli[export]'"
        )
    return found


SIDES = (2, 64)
"""Smallest and largest side of a model's last map, where images may have any size. A program for a side of 1 would be
another one; the bound above is a limit of nothing but the statement that torch.export checks."""


def _free(options: dict[str, Any]) -> tuple[dict[int, Any]]:
    """Dimensions of the images that may vary; a side is a multiple of the stride: torch.export can divide it then."""
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if options.get("stride") is not None:
        low, high = SIDES
        sides = (torch.export.Dim(name, min=low, max=high) for name in ("height", "width"))
        free |= {axis: options["stride"] * side for axis, side in enumerate(sides, start=2)}
    return (free,)


def _quantize_onnx(path: Path, batches: Iterator[Tensor]) -> None:
    """Static quantisation to 8 bits, in place, by onnxruntime's own tools: weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.numpy()}

    ready = path.with_name(f"ready-{path.name}")
    with boundary("quantisation to int8"), _quietly():
        quant_pre_process(path, ready, skip_symbolic_shape=True)
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        only = {"op_types_to_quantize": ["Conv", "Gemm"]}
        quantize_static(ready, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds, **only)
    ready.unlink()


def _quantize_openvino(model: Any, batches: Iterator[Tensor]) -> Any:
    """Static quantisation to 8 bits by NNCF, OpenVINO's tool: of convolutions, as for ONNX."""
    nncf = _silent_import("nncf")
    images = [batch.numpy() for batch in batches]
    rest = nncf.IgnoredScope(types=["MatMul", "Multiply", "Add"], validate=False)
    with boundary("quantisation to int8"), _quietly(), redirect_stdout(io.StringIO()):
        return nncf.quantize(model, nncf.Dataset(images), subset_size=len(images), ignored_scope=rest)


def _silent_import(name: str) -> Any:
    """Import OpenVINO or NNCF, which report their use to a server, from their import on, unless in CI."""
    with patch.dict(os.environ, CI="true"):
        return import_module(name)


@contextmanager
def _quietly() -> Iterator[None]:
    """Exporters warn and log much that a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
