"""Images per second of whole models, source against converted, in one process with interleaved rounds.

    python benchmarks/models.py                                       # this machine's CPU, two threads
    python benchmarks/models.py --device cuda --batch 256 --amp bfloat16 --channels-last [--compile]

Quote the ratios: converted speed over the source's, round by round. What ran before in a process decides how often the
allocator returns memory to the system, which takes both models' time: `--only inference` measures a fresh process.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from measure import Device, interleaved, machine, quartiles, ratios, write_results
from torch import Tensor, nn

from augment_cli import convert

SIZE = 224
MODELS = {
    "ResNet-50": lambda size=SIZE: timm.create_model("resnet50"),
    "AA-ResNet-50": lambda size=SIZE: convert("resnet50", "aa-resnet", input_size=size),
    "AW-ResNet-50": lambda size=SIZE: convert("resnet50", "aw-resnet", input_size=size),
}
DETECTORS = {
    "ResNet-50": MODELS["ResNet-50"],
    "AA-ResNet-50": lambda size: convert("resnet50", "aa-retinanet", input_size=size),
    "AW-ResNet-50": lambda size: convert("resnet50", "aw-faster-rcnn", input_size=size),
}
"""Backbones for images of a detector's size, by the recipes for them."""

Size = int | tuple[int, int]
Makers = dict[str, Callable[[Size], nn.Module]]
"""Models by name, for images of a size; the first is the source that the others are held against."""

MODES = ("training", "inference")


@dataclass(frozen=True)
class Setting:
    """How models are measured."""

    device: str = "cpu"
    batch: int = 8
    size: Size = SIZE
    rounds: int = 9
    amp: str | None = None
    channels_last: bool = False
    compile: bool = False
    compiler: str = "inductor"


def training_step(model: nn.Module, x: Tensor, target: Tensor, amp: torch.dtype | None) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(x.device.type, amp, enabled=amp is not None):
            loss = torch.nn.functional.cross_entropy(model(x), target)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def inference(model: nn.Module, x: Tensor, amp: torch.dtype | None) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, amp, enabled=amp is not None):
            model(x)

    return step


def measure(makers: Makers, mode: str, setting: Setting) -> dict[str, dict[str, Any]]:
    """Images per second of each model, in alternation, and of the first model beside the others."""
    torch.compiler.reset()
    device = Device(setting.device)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    amp = getattr(torch, setting.amp) if setting.amp else None
    height, width = setting.size if isinstance(setting.size, tuple) else (setting.size, setting.size)
    x = torch.randn(setting.batch, 3, height, width, device=setting.device).to(memory_format=layout)
    target = torch.randint(1000, (setting.batch,), device=setting.device)
    steps, peaks = {}, {}
    for name, make in makers.items():
        model = make(setting.size).to(setting.device, memory_format=layout).train(mode == "training")
        runner = torch.compile(model, backend=setting.compiler) if setting.compile else model
        step = training_step(runner, x, target, amp) if mode == "training" else inference(runner, x, amp)
        if setting.device == "cuda":
            step()
            peaks[name] = {"peak_mib": device.peak_mib(step)}
        steps[name] = step
    seconds = interleaved(steps, setting.rounds, device.synchronize)
    source = seconds[next(iter(makers))]
    return {
        name: {
            "images_per_second": quartiles([setting.batch / s for s in values]),
            "speed_against_source": ratios(source, values),
        }
        | peaks.get(name, {})
        for name, values in seconds.items()
    }


def measure_what_fits(makers: Makers, mode: str, setting: Setting) -> tuple[Setting, dict[str, dict[str, Any]]]:
    """The same, with half the batch as often as the device's memory does not do; and the setting that did."""
    while True:
        try:
            return setting, measure(makers, mode, setting)
        except torch.OutOfMemoryError:
            if setting.batch == 1:
                raise
        Device(setting.device).free()
        setting = replace(setting, batch=setting.batch // 2)
        print(f"out of memory: a batch of {setting.batch} instead", flush=True)


def show(mode: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{mode:14s} {'images/s':>9s}  {'against the source (quartiles)':>32s}")
    for name, row in rows.items():
        against = row["speed_against_source"]
        spread = f"{against['median']:.3f} ({against['low']:.3f} to {against['high']:.3f})"
        peak = f"  {row['peak_mib']:,} MiB" if "peak_mib" in row else ""
        print(f"  {name:12s} {row['images_per_second']['median']:9.2f}  {spread:>32s}{peak}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--amp", choices=("bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = Setting(
        **{
            name: getattr(options, name)
            for name in ("device", "batch", "size", "rounds", "amp", "channels_last", "compile")
        }
    )
    results, batches = {}, {}
    for mode in options.only:
        fitting, results[mode] = measure_what_fits(MODELS, mode, setting)
        batches[mode] = fitting.batch
        show(mode, results[mode])
    if not options.no_write:
        name = f"models-{options.device}{'-compiled' if options.compile else ''}"
        name += "" if len(options.only) > 1 else f"-{options.only[0]}"
        write_results(name, {"machine": machine(), "options": vars(options), "batches": batches, "results": results})


if __name__ == "__main__":
    main()
