"""The parts of `make gpu`: each is a list of measurements, the most important first."""

import csv
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_targets import TARGETS, key_of

ROOT = Path(__file__).parent.parent
Measurement = tuple[str, Callable[[], dict[str, Any]]]
"""A key, and what measures the row that it is for."""


@dataclass(frozen=True)
class Call:
    """What is asked for: the device, tiny shapes instead of real ones, until when (time.time), and a folder for images,
    models and runs, which stay for a next call.
    """

    device: str
    rehearse: bool
    until: float
    work: Path

    def left(self) -> float:
        return self.until - time.time()

    @property
    def rounds(self) -> int:
        return 1 if self.rehearse else 9

    @property
    def compiler(self) -> str:
        return "eager" if self.rehearse else "inductor"


MODE = {"training": "forward+backward", "inference": "forward"}


def tests(call: Call) -> list[Measurement]:
    """Tests of the layers and of models on the card, then those of the kernels, which run on it too."""
    if call.rehearse:
        return [
            ("tests/gpu", partial(run_tests, call, 1.0, "tests/gpu", "-k", "every_backend and aa-triton and bfloat16"))
        ]
    kernels = ("tests/layers/triton", "--ignore", "tests/layers/triton/test_compiling.py")
    return [
        ("tests/gpu", partial(run_tests, call, 0.6, "tests/gpu")),
        ("tests/layers/triton", partial(run_tests, call, 1.0, *kernels)),
    ]


def run_tests(call: Call, share: float, *arguments: str) -> dict[str, Any]:
    """Run pytest, for a share of the time that is left at most."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *arguments]
        if not call.rehearse and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # Triton's compiler takes most of the time
        began = time.monotonic()
        code = _run_for(max(call.left() * share, 10), command)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {code} and wrote no report")
        row = _read_report(report) | {"seconds": round(time.monotonic() - began, 1)}
    if code is None:
        row["stopped"] = "for want of time"
    if row["failures"] or code not in (0, None):
        names = ", ".join(failure["test"] for failure in row["failures"])
        row["error"] = {"class": "TestFailures", "message": f"pytest ended with {code}; failed: {names or 'none'}"}
    return row


def _run_for(seconds: float, command: list[str]) -> int | None:
    """Run a command; the exit status, or None where it was stopped as Ctrl-C would, because its time was over."""
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs do not
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr, preexec_fn=hear)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            code = process.wait(seconds)
            return code if number == signal.SIGINT else None
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            seconds = 20
    process.wait()
    return None


def _read_report(path: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(path).iter("testcase"))
    failures, skipped = [], 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for found in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append(
                {"test": name, "message": (found.get("message") or "")[:500], "text": (found.text or "")[-1500:]}
            )
    failed = len({failure["test"] for failure in failures})
    return {"passed": len(cases) - skipped - failed, "failed": failed, "skipped": skipped, "failures": failures}


def layers(call: Call) -> list[Measurement]:
    """AA and AW beside the plain convolution and rivals. FlexAttention, which is slow to compile, where it counts."""
    usual, sizes, bf16 = ["conv", "timm", "sdpa", "fused", "triton"], ["14", "28", "56"], {"amp": "bfloat16"}
    few = ["conv", "timm", "fused", "triton"]
    found = [_aa(call, size, "training", [*usual, "flex"], **bf16) for size in sizes]
    found += [("AA, memory", partial(memory_by_size, call))]
    found += [_aw(call, size, mode, **bf16) for mode in MODE for size in AW]
    found += [_aa(call, size, "inference", [*usual, "flex"], **bf16) for size in sizes[:1]]
    found += [_aa(call, size, "training", few, **bf16, compiled=True) for size in sizes]
    found += [_aw(call, size, "training", **bf16, compiled=True) for size in AW[1:]]
    found += [_aa(call, size, "training", usual) for size in sizes]
    found += [_aw(call, size, "training") for size in AW]
    found += [_aa(call, size, "inference", [*usual, "flex"], **bf16) for size in sizes[1:]]
    found += [_aa(call, "7", mode, usual, **bf16) for mode in MODE]
    found += [_aa(call, size, "inference", few, **bf16, compiled=True) for size in sizes]
    return rehearsed(found) if call.rehearse else found


AW = ["14", "28", "56", "7"]


def rehearsed(found: list[Measurement]) -> list[Measurement]:
    """Rows that targets name, and one of each kind."""
    kinds = {
        *("AA, memory", "AW 14, training, bfloat16", "AA 14, inference, bfloat16", "AA 14, training, float32"),
        *("AA 14, training, bfloat16, compiled", "224 px, batch 256, inference, float32"),
        "800x1344, batch 4, training, bfloat16",
    }
    return [(key, measure) for key, measure in found if key in kinds | {target.key for target in TARGETS}]


def _aa(
    call: Call, size: str, mode: str, backends: list[str], amp: str | None = None, compiled: bool = False
) -> Measurement:
    return key_of(f"AA {size}", mode, amp, compiled), partial(compare_aa, call, size, mode, backends, amp, compiled)


def _aw(call: Call, size: str, mode: str, amp: str | None = None, compiled: bool = False) -> Measurement:
    return key_of(f"AW {size}", mode, amp, compiled), partial(compare_aw, call, int(size), mode, amp, compiled)


def compare_aa(
    call: Call, size: str, mode: str, backends: list[str], amp: str | None, compiled: bool
) -> dict[str, Any]:
    import layers

    case = layers.AA_CASES[size]
    if call.rehearse:  # FlexAttention has no backward pass on a CPU
        case = case._replace(channels=16, size=(4, 5), batch=1, heads=2, keys=8, values=4)
        backends = [name for name in backends if (name, mode) != ("flex", "training")]
    return {"by": layers.compare_aa(case, MODE[mode], backends, _setting(call, amp, compiled))}


def compare_aw(call: Call, size: int, mode: str, amp: str | None, compiled: bool) -> dict[str, Any]:
    import layers

    channels, batch = layers.AW_CASES[size], layers.AW_BATCHES["cuda"][-1]
    if call.rehearse:
        channels, batch, size = 16, 2, 3
    backends, setting = layers.GPU_AW_BACKENDS, _setting(call, amp, compiled)
    return {"batch": batch, "by": layers.compare_aw(channels, size, batch, MODE[mode], backends, setting)}


def _setting(call: Call, amp: str | None, compiled: bool) -> Any:
    import layers

    at_least = 0.0 if call.rehearse else 0.02
    return layers.Setting(call.device, amp, compiled, call.compiler, call.rounds, at_least=at_least)


def memory_by_size(call: Call) -> dict[str, Any]:
    """Peak memory of an AA layer in training, on two maps of which one has four times the positions."""
    return {"by": {backend: _growth(call, backend) for backend in ("triton", "timm")}}


def _growth(call: Call, backend: str) -> dict[str, Any]:
    import layers
    from measure import Device

    row, setting = {}, layers.Setting(call.device, "bfloat16")
    for side in (28, 56):
        case = layers.AA_CASES["56"]._replace(size=(side, side))
        if call.rehearse:
            case = case._replace(channels=16, size=(side // 14, side // 14), batch=1, heads=2, keys=8)
        layer, x = layers.aa_layer(case, setting)
        step = layers.step_of(layer, x, MODE["training"], setting, backend)
        step()
        row[f"mib_{side}"] = Device(call.device).peak_mib(step)
    return row | {"growth": row["mib_56"] / max(row["mib_28"], 1e-3)}


def models(call: Call) -> list[Measurement]:
    """ResNet-50, AA and AW at a batch of 256: first what the targets are for, which takes minutes to compile."""
    from models import MODELS, Setting

    setting = Setting(call.device, 256, rounds=call.rounds, amp="bfloat16", channels_last=True, compiler=call.compiler)
    compiled, full = replace(setting, compile=True), replace(setting, amp=None)
    orders = [(compiled, "training"), (setting, "training"), (setting, "inference"), (full, "training")]
    orders += [(full, "inference"), (compiled, "inference")]
    found = [_models(call, MODELS, mode, setting, "224 px, batch 256") for setting, mode in orders]
    return rehearsed(found) if call.rehearse else found


def _models(call: Call, makers: dict, mode: str, setting: Any, name: str) -> Measurement:
    key = key_of(name, mode, setting.amp, setting.compile)
    if call.rehearse:
        makers, setting = tiny_models(), replace(setting, batch=2, size=32)
    return key, partial(compare_models, makers, mode, setting)


def tiny_models() -> dict[str, Callable]:
    """Under the names of the real ones."""
    import timm

    from augment_cli import convert

    names = {"AA-ResNet-50": "aa", "AW-ResNet-50": "aw"}
    made = {
        name: partial(lambda recipe, size: convert("test_resnet", recipe, input_size=size), r)
        for name, r in names.items()
    }
    return {"ResNet-50": lambda size: timm.create_model("test_resnet"), **made}


def compare_models(makers: dict, mode: str, setting: Any) -> dict[str, Any]:
    from models import measure_what_fits, show

    fitting, rows = measure_what_fits(makers, mode, setting)
    show(mode, rows)
    return {"batch": fitting.batch, "by": rows}


def detection(call: Call) -> list[Measurement]:
    """Layers on the maps of 800x1344 images, to which detectors pad 800x1333, and backbones of such images."""
    from models import DETECTORS, Setting

    backends = ["conv", "timm", "sdpa", "fused", "triton"]
    bf16 = {"amp": "bfloat16"}
    setting = Setting(call.device, 4, (800, 1344), call.rounds, "bfloat16", channels_last=True, compiler=call.compiler)
    found = [_aa(call, "50x84", "training", [*backends, "flex"], **bf16)]
    found += [_models(call, DETECTORS, "training", setting, "800x1344, batch 4")]
    found += [_aa(call, size, "training", backends, **bf16) for size in ("25x42", "100x168")]
    found += [_aa(call, size, "inference", backends, **bf16) for size in ("50x84", "25x42", "100x168")]
    found += [_models(call, DETECTORS, "inference", setting, "800x1344, batch 4")]
    found += [_models(call, DETECTORS, "training", replace(setting, compile=True), "800x1344, batch 4")]
    return rehearsed(found) if call.rehearse else found


def fit(call: Call) -> list[Measurement]:
    """augment convert --init fit, which computes on the processor."""
    return [("convert --init fit", partial(convert_fitted, call))]


def convert_fitted(call: Call) -> dict[str, Any]:
    images = draw_images(call)
    count = 20 if call.rehearse else 128
    began = time.monotonic()
    _augment(*_converted(call), "--init", "fit", "--calibrate", images / "train", "--calibrate-images", count)
    return {"model": _model(call), "images": count, "seconds": round(time.monotonic() - began, 1)}


def finetune(call: Call) -> list[Measurement]:
    """augment finetune --precision bf16 of the fitted model, with its loader, until its time is over."""
    return [("finetune --precision bf16", partial(finetune_for_a_while, call))]


def finetune_for_a_while(call: Call) -> dict[str, Any]:
    """Images per second of whole epochs, the first left out: that has compiling and the loader's start in it."""
    images, run = draw_images(call), call.work / f"run-{_model(call)}"
    if not _file(call).exists():
        _augment(*_converted(call))
    batch, workers, epochs = (4, 0, 2) if call.rehearse else (128, min(16, os.cpu_count() or 1), 1000)
    command = [
        "finetune",
        _file(call),
        "-d",
        images,
        "-o",
        run,
        "--overwrite",
        "--precision",
        "bf16",
        "--channels-last",
    ]
    command += ["-b", batch, "-j", workers, "-e", epochs, "--warmup-epochs", 0, "--log-every", 1]
    command += ["--cpu"] if call.device == "cpu" else []
    code = _run_for(max(call.left() - 10, 20), [sys.executable, "-m", "augment_cli", *map(str, command)])
    if code not in (0, None):
        raise RuntimeError(f"augment finetune ended with {code}; its messages are above")
    with (run / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    count = len(list((images / "train").rglob("*.jpg"))) // batch * batch
    rates = [count / float(row["seconds"]) for row in rows]
    row = {"model": _model(call), "batch": batch, "workers": workers, "epochs": len(rows)}
    row |= {"images_per_second": round(statistics.median(rates[1:] or rates), 1), "first_epoch": round(rates[0], 1)}
    return row | {"losses": [round(float(rows[i][name]), 4) for i in (0, -1) for name in ("train_loss",)]}


def draw_images(call: Call) -> Path:
    """A folder of JPEGs of two classes, smooth as photographs are: train and validation."""
    import numpy as np
    from PIL import Image

    folder, counts = (
        call.work / ("few-images" if call.rehearse else "images"),
        (20, 4) if call.rehearse else (4096, 256),
    )
    if (folder / "done").exists():
        return folder
    random, side = np.random.default_rng(0), 32 if call.rehearse else 256
    for split, count in zip(("train", "validation"), counts, strict=True):
        for label in (0, 1):
            (folder / split / str(label)).mkdir(parents=True, exist_ok=True)
        for i in range(min(count, 256)):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            picture = small.resize((side, side), Image.Resampling.BICUBIC)
            for copy in range(i, count, 256):
                picture.save(folder / split / str(copy % 2) / f"{copy:05}.jpg", quality=90)
    (folder / "done").touch()
    return folder


def _model(call: Call) -> str:
    return "test_resnet" if call.rehearse else "resnet50"


def _file(call: Call) -> Path:
    return call.work / f"{_model(call)}.safetensors"


def _converted(call: Call) -> tuple[Any, ...]:
    options = ("--recipe", "aa", "--img-size", 32) if call.rehearse else ("--recipe", "aa-resnet")
    return "convert", _model(call), *options, "-a", "num_classes=2", "-o", _file(call), "--overwrite"


def _augment(*arguments: Any) -> None:
    command = [sys.executable, "-m", "augment_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"augment {arguments[0]} ended with {done.returncode}: {done.stderr[-700:]}")


def tune(call: Call) -> list[Measurement]:
    """Launch configurations of the Triton kernels."""
    import gpu_tune

    return gpu_tune.measurements(call)


PARTS: dict[str, Callable[[Call], list[Measurement]]] = {
    part.__name__: part for part in (tests, layers, models, detection, fit, finetune, tune)
}
SECONDS = {"tests": 70, "layers": 90, "models": 170, "detection": 50, "fit": 30, "finetune": 180, "tune": 300}
"""Budgets: under ten minutes for all but `tune`, which runs only where it is named."""
