"""Time one layer at a time, side by side in one process: AAConv2d's backends and peers, AWConv2d and nn.Conv2d.

    python benchmarks/layers.py [--only aa aw] [--rounds 15] [--threads 1] [--floors]
    python benchmarks/layers.py --device cuda [--amp bfloat16] [--compile] [--maps 14 28 50x84]

Each reading is a whole layer, convolution branch and projections included, forward or forward + backward, in float32 or
under autocast. The rounds of all backends alternate, so that other load on the machine slows all of them alike; ratios
are medians of the rounds' ratios, with quartiles. Peak memory is that of the tensors that one call makes.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from gpu_rows import failure
from measure import Device, machine, quartiles, ratios, write_results
from rivals import RIVALS
from torch import Tensor, nn

from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.layers.aa.attention import BACKENDS

AW_CASES = {56: 64, 28: 128, 14: 256, 7: 512}  # map: channels
AW_BATCHES = {"cpu": (1, 8, 32), "cuda": (32, 256)}
GPU_AA_BACKENDS = ["conv", *RIVALS, "fused", "triton"]
GPU_AW_BACKENDS = ["grouped", "static", "unfolded", "triton"]
MODES = ("forward", "forward+backward")
EXPONENTIAL = 9  # multiply-adds: six for a polynomial, and to take the whole part off and put it back


class AACase(NamedTuple):
    """Sizes of an AA layer and of its input; `on_gpu` is the batch there, so that `timm` fits in 24 GB at 56x56."""

    channels: int
    size: tuple[int, int]
    batch: int
    on_gpu: int
    values: int
    keys: int = 160
    pool: int = 1
    heads: int = 8


AA_CASES = {
    "7": AACase(512, (7, 7), 8, 256, 56),
    "14": AACase(256, (14, 14), 8, 256, 32),
    "28": AACase(128, (28, 28), 4, 64, 16),
    "56": AACase(64, (56, 56), 2, 8, 8),
    "25x42": AACase(512, (25, 42), 1, 4, 48, keys=96),
    "50x84": AACase(256, (50, 84), 1, 4, 24, keys=48),
    "100x168": AACase(128, (100, 168), 1, 4, 8, keys=24, pool=4),
}
"""By map. The last three are the stages of a ResNet-50 for images of 800x1344, as recipe aa-retinanet splits them."""


@dataclass(frozen=True)
class Setting:
    """How calls are measured. `batch` stands for the cases' own; `at_least` are the seconds of a reading."""

    device: str = "cpu"
    amp: str | None = None
    compile: bool = False
    compiler: str = "inductor"
    rounds: int = 15
    batch: int | None = None
    at_least: float = 0.02


def aa_layer(case: AACase, setting: Setting) -> tuple[AAConv2d, Tensor]:
    split = {"heads": case.heads, "key_channels": case.keys, "value_channels": case.values, "attention_pool": case.pool}
    channels, device = case.channels, setting.device
    layer = AAConv2d(channels, channels, 3, padding=1, bias=False, **split, resolution=case.size, device=device)
    batch = setting.batch or (case.batch if device == "cpu" else case.on_gpu)
    return layer, maps(setting, batch, channels, *case.size)


def maps(setting: Setting, *shape: int) -> Tensor:
    """An input in the layout that convolutions are fastest in: channels last on a GPU."""
    layout = torch.contiguous_format if setting.device == "cpu" else torch.channels_last
    return torch.randn(shape, device=setting.device).to(memory_format=layout).requires_grad_()


def run(layer: nn.Module, x: Tensor, mode: str, amp: str | None = None) -> None:
    with torch.autocast(x.device.type, getattr(torch, amp or "bfloat16"), enabled=amp is not None):
        if mode == "forward":
            with torch.no_grad():
                layer(x)
            return
        layer.zero_grad()
        x.grad = None
        out = layer(x)
    out.backward(torch.ones_like(out))


def step_of(layer: nn.Module, x: Tensor, mode: str, setting: Setting, backend: str | None = None) -> Callable[[], None]:
    """A call of a copy of the layer, by a backend."""
    layer = copy.deepcopy(layer)
    if backend is not None:
        layer.backend = backend
    runner = torch.compile(layer, dynamic=False, backend=setting.compiler) if setting.compile else layer
    return partial(run, runner, x, mode, setting.amp)


Rows = dict[str, dict[str, Any]]
"""By name: milliseconds, peak memory and ratios, or the error of what failed."""


def compare(steps: dict[str, Callable[[], None]], setting: Setting, ratio: Callable[[str, dict], dict]) -> Rows:
    """Measure steps in alternation. One that fails is left out, with its error.

    Args:
        ratio: gets a step's name and the seconds of all rounds by name, and returns ratios to show.
    """
    device, rows, running = Device(setting.device), {}, {}
    for name, step in steps.items():
        try:
            step()
            device.synchronize()
            running[name], rows[name] = step, {}
        except Exception as error:  # whatever a compiler or a driver raises
            rows[name] = {"error": failure(error)}
        if name not in running:  # out here the error no longer holds what the step had made
            device.free()
            device.synchronize()  # raises where the card cannot go on, so that the rest is not measured
    readings = [
        {name: device.seconds(step, setting.at_least) for name, step in running.items()} for _ in range(setting.rounds)
    ]
    taken = {name: [reading[name] for reading in readings] for name in running}
    for name in running:
        rows[name] = {"milliseconds": quartiles([1e3 * value for value in taken[name]])}
        rows[name] |= {"peak_mib": device.peak_mib(running[name]), **ratio(name, taken)}
    return rows


def compare_aa(case: AACase, mode: str, backends: list[str], setting: Setting) -> Rows:
    """Backends of one AA layer; "conv" is the plain convolution with as many channels."""
    torch.compiler.reset()
    layer, x = aa_layer(case, setting)
    steps = {
        name: step_of(plain(case.channels, setting), x, mode, setting)
        if name == "conv"
        else step_of(layer, x, mode, setting, name)
        for name in backends
    }

    def ratio(name: str, taken: dict[str, list[float]]) -> dict:
        found = {f"times_{o}": ratios(taken[o], taken[name]) for o in ("reference", "timm") if o in taken}
        return found | ({"cost_of_conv": ratios(taken[name], taken["conv"])} if "conv" in taken else {})

    return compare(steps, setting, ratio)


def compare_aw(channels: int, size: int, batch: int, mode: str, backends: list[str], setting: Setting) -> Rows:
    """The plain convolution, and backends of one AW layer."""
    torch.compiler.reset()
    layer = AWConv2d(channels, channels, 3, padding=1, bias=False, device=setting.device)
    nn.init.normal_(layer.expand.weight, std=0.1)
    x = maps(setting, batch, channels, size, size)
    steps = {"conv": step_of(plain(channels, setting), x, mode, setting)}
    steps |= {backend: step_of(layer, x, mode, setting, backend) for backend in backends}
    return compare(
        steps,
        setting,
        lambda name, taken: {"cost_of_conv": ratios(taken[name], taken["conv"])} if "conv" in taken else {},
    )


def plain(channels: int, setting: Setting) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=setting.device)


def measure_aa(cases: list[str], backends: list[str], setting: Setting) -> list[dict]:
    rows = []
    for size in cases:
        for mode in MODES:
            for backend, row in compare_aa(AA_CASES[size], mode, backends, setting).items():
                rows.append({"map": int(size) if size.isdecimal() else size, "mode": mode, "backend": backend, **row})
                show(f"AA {size:>2s} {mode:16s} {backend:10s}", row)
    return rows


def measure_aw(cases: list[int], backends: list[str], setting: Setting) -> list[dict]:
    rows = []
    for size in cases:
        for batch in AW_BATCHES[setting.device]:
            for mode in MODES:
                for name, row in compare_aw(AW_CASES[size], size, batch, mode, backends, setting).items():
                    rows.append({"map": size, "batch": batch, "mode": mode, "backend": name, **row})
                    show(f"AW {size:2d} x{batch:<3d} {mode:16s} {name:10s}", row)
    for mode in MODES:
        for backend in backends:
            found = [r for r in rows if r["backend"] == backend and r["mode"] == mode and "cost_of_conv" in r]
            if costs := [r["cost_of_conv"]["median"] for r in found]:
                mean = statistics.geometric_mean(costs)
                print(f"AW {mode} {backend}: geometric mean {mean:.2f}, worst {max(costs):.2f}")
    return rows


def show(title: str, row: dict) -> None:
    if "error" in row:
        print(f"{title} failed: {row['error']['class']}: {row['error']['message']}", flush=True)
        return
    spread = "  ".join(
        f"{key} {row[key]['median']:5.2f} ({row[key]['low']:.2f}-{row[key]['high']:.2f})"
        for key in ("times_reference", "times_timm", "cost_of_conv")
        if key in row
    )
    print(f"{title} {row['milliseconds']['median']:9.2f} ms {row['peak_mib']:8.1f} MiB  {spread}", flush=True)


def rate(amount: float, step: Callable[[], object]) -> float:
    """Amount a second, at the fastest of several readings."""
    return amount / min(Device().seconds(step, 0.005) for _ in range(20))


def rates() -> dict[str, float]:
    """Highest rates of torch on this machine and its threads, a second: multiply-adds, and bytes moved."""
    x, taps = torch.randn(8, 512, 14, 14), torch.randn(512, 512, 5, 5)  # so large that memory for results is no matter
    many = torch.randn(2**24)
    other = torch.empty_like(many)
    return {
        "multiply_adds": rate(8 * 14**2 * taps.numel(), lambda: F.conv2d(x, taps, padding=2)),
        "bytes": rate(8 * many.numel(), lambda: torch.mul(many, 2, out=other)),
    }


def aa_floor(size: str, per_second: dict[str, float]) -> dict:
    """Milliseconds of the arithmetic that attention cannot leave out, and of the convolutions around it, as measured.

    Forward, a logit takes d multiply-adds to make, one to sum and e to use; backward it is made again, and its gradient
    takes e, those of q, k and v 2 d + e. An exponential, each time, is worth EXPONENTIAL of them.
    """
    case = AA_CASES[size]
    d, e, logits = (
        case.keys // case.heads,
        case.values // case.heads,
        case.batch * case.heads * math.prod(case.size) ** 2,
    )
    layer, x = aa_layer(case, Setting())
    BACKENDS["nothing"] = lambda q, k, v, *tables: v
    row = {"map": int(size)}
    products = d + 1 + e + EXPONENTIAL, 4 * d + 1 + 3 * e + 2 * EXPONENTIAL
    for mode, of_logit in zip(MODES, products, strict=True):
        core = logits * of_logit / per_second["multiply_adds"]
        rest = 1 / rate(1, step_of(layer, x, mode, Setting(), "nothing"))
        row[mode] = {"core_ms": round(1e3 * core, 3), "convolutions_ms": round(1e3 * rest, 3)}
        print(f"AA {size:>2s} {mode:16s} floor {1e3 * (core + rest):9.2f} ms: core {1e3 * core:.2f}", flush=True)
    return row


def aw_floor(size: int, batch: int, per_second: dict[str, float]) -> dict:
    """Milliseconds that AW cannot go under: its convolution's multiply-adds, or, if more, its bytes moved once.

    Training has three convolutions' multiply-adds, and moves input, result, kernel and the gradients of all.
    """
    channels = AW_CASES[size]
    row = {"map": size, "batch": batch}
    for mode, times in zip(MODES, (1, 3), strict=True):
        products = times * batch * size**2 * 9 * channels**2 / per_second["multiply_adds"]
        moved = 4 * times * (2 * batch * channels * size**2 + 9 * channels**2) / per_second["bytes"]
        row[mode] = {"products_ms": round(1e3 * products, 3), "bytes_ms": round(1e3 * moved, 3)}
        print(f"AW {size:2d} x{batch:<3d} {mode:16s} floor {1e3 * max(products, moved):9.2f} ms", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("aa", "aw"), default=["aa", "aw"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=AW_BATCHES, default="cpu")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="autocast to it")
    parser.add_argument("--compile", action="store_true", help="every layer by torch.compile")
    parser.add_argument("--maps", nargs="+", choices=AA_CASES, default=["7", "14", "28", "56"])
    parser.add_argument("--aa-backends", nargs="+", choices=("conv", "auto", *BACKENDS))
    parser.add_argument("--aw-backends", nargs="+")
    parser.add_argument(
        "--floors", action="store_true", help="what each case takes at the least, by this machine's processor's rates"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.empty(31 * 2**18)  # freed at once: from then on glibc keeps large blocks, as in a long training run
    setting = Setting(options.device, options.amp, options.compile, options.rounds)
    on_cpu, squares = options.device == "cpu", [int(size) for size in options.maps if size.isdecimal()]
    results = {"machine": machine(), "threads": options.threads, "rounds": options.rounds}
    if "aa" in options.only:
        backends = options.aa_backends or (["reference", "timm", "auto"] if on_cpu else GPU_AA_BACKENDS)
        results["aa"] = measure_aa(options.maps, backends, setting)
    if options.floors:
        per_second = results["per_second"] = rates()
        print("  ".join(f"{name} {value / 1e9:.1f} billion/s" for name, value in per_second.items()))
        results["aa_floors"] = [aa_floor(str(size), per_second) for size in squares]
        batches = AW_BATCHES["cpu"]
        results["aw_floors"] = [aw_floor(size, batch, per_second) for size in squares for batch in batches]
    if "aw" in options.only:
        backends = options.aw_backends or (["grouped", "auto"] if on_cpu else GPU_AW_BACKENDS)
        results["aw"] = measure_aw(squares, backends, setting)
    if not options.no_write:
        threads = f"{options.threads}-thread{'s' * (options.threads > 1)}"
        name = threads if on_cpu else "-".join(filter(None, ["cuda", options.amp, "compiled" * options.compile]))
        write_results(f"layers-{name}", results)


if __name__ == "__main__":
    main()
