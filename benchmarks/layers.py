"""Time one layer at a time, side by side in one process: AAConv2d's backends and peers, AWConv2d and nn.Conv2d.

    python benchmarks/layers.py [--only aa aw] [--rounds 15] [--threads 1] [--floors]

Each reading is a whole layer, convolution branch and projections included, float32, forward or forward + backward. The
rounds of all backends alternate, so that other load on the machine slows all of them alike; ratios are medians of the
rounds' ratios, with quartiles. Peak memory is that of the tensors that one call makes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from measure import machine, peak_mib, quartiles, ratios, write_results
from timm.layers.bottleneck_attn import PosEmbedRel
from torch import Tensor, nn

from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.layers.aa.attention import BACKENDS

HEADS, KEY_CHANNELS = 8, 160
AA_CASES = {7: (512, 8, 56), 14: (256, 8, 32), 28: (128, 4, 16), 56: (64, 2, 8)}  # map: channels, batch, d_v
AW_CASES = {56: 64, 28: 128, 14: 256, 7: 512}  # map: channels
AW_BATCHES = (1, 8, 32)
MODES = ("forward", "forward+backward")
EXPONENTIAL = 9  # multiply-adds: six for a polynomial, and to take the whole part off and put it back


def bottleneck_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attend as timm.layers.BottleneckAttn does between its qkv convolution and its pooling, scale_pos_embed=True.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    height, width, d = q.shape[2:]
    position = SimpleNamespace(height=height, width=width, height_rel=rel_height, width_rel=rel_width)
    q, v = (t.movedim(-1, 2).flatten(3).flatten(0, 1).transpose(1, 2) for t in (q, v))
    k = k.movedim(-1, 2).flatten(3).flatten(0, 1)
    logits = (q @ k + PosEmbedRel.forward(position, q)) * d**-0.5
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    return out.unflatten(0, (-1, HEADS)).unflatten(-1, (height, width)).movedim(2, -1)


BACKENDS["timm"] = bottleneck_attention


def aa_layer(size: int) -> tuple[AAConv2d, Tensor]:
    channels, batch, value_channels = AA_CASES[size]
    split = {"heads": HEADS, "key_channels": KEY_CHANNELS, "value_channels": value_channels}
    layer = AAConv2d(channels, channels, 3, padding=1, bias=False, **split, resolution=size)
    return layer, torch.randn(batch, channels, size, size, requires_grad=True)


def run(layer: nn.Module, x: Tensor, mode: str) -> None:
    if mode == "forward":
        with torch.no_grad():
            layer(x)
        return
    layer.zero_grad()
    x.grad = None
    out = layer(x)
    out.backward(torch.ones_like(out))


def run_by(backend: str, layer: nn.Module, x: Tensor, mode: str) -> None:
    layer.backend = backend
    run(layer, x, mode)


def seconds(step: Callable[[], object], at_least: float = 0.02) -> float:
    """One reading: the mean of as many calls as fill `at_least` seconds."""
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < at_least:
        step()
        calls += 1
    return spent / calls


def side_by_side(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        step()
    readings = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
    return {name: [reading[name] for reading in readings] for name in steps}


def measure_aa(rounds: int, cases: list[int], backends: list[str]) -> list[dict]:
    rows = []
    for size in cases:
        layer, x = aa_layer(size)
        for mode in MODES:
            steps = {backend: partial(run_by, backend, layer, x, mode) for backend in backends}
            taken = side_by_side(steps, rounds)
            for backend in backends:
                row = {"map": size, "mode": mode, "backend": backend, "milliseconds": milliseconds(taken[backend])}
                row["peak_mib"] = peak_mib(steps[backend])
                row |= {f"times_{other}": ratios(taken[other], taken[backend]) for other in ("reference", "timm")}
                rows.append(row)
                show(f"AA {size:2d} {mode:16s} {backend:10s}", row, ("times_reference", "times_timm"))
    return rows


def measure_aw(rounds: int, cases: list[int], backends: list[str]) -> list[dict]:
    rows = []
    for size in cases:
        channels = AW_CASES[size]
        plain, layer = (made(channels, channels, 3, padding=1, bias=False) for made in (nn.Conv2d, AWConv2d))
        nn.init.normal_(layer.expand.weight, std=0.1)
        for batch in AW_BATCHES:
            x = torch.randn(batch, channels, size, size, requires_grad=True)
            for mode in MODES:
                steps = {"conv": partial(run, plain, x, mode)}
                steps |= {backend: partial(run_by, backend, layer, x, mode) for backend in backends}
                taken = side_by_side(steps, rounds)
                for name in steps:
                    row = {"map": size, "batch": batch, "mode": mode, "backend": name}
                    row |= {"milliseconds": milliseconds(taken[name]), "peak_mib": peak_mib(steps[name])}
                    row["cost_of_conv"] = ratios(taken[name], taken["conv"])
                    rows.append(row)
                    show(f"AW {size:2d} x{batch:<3d} {mode:16s} {name:10s}", row, ("cost_of_conv",))
    for mode in MODES:
        for backend in backends:
            costs = [r["cost_of_conv"]["median"] for r in rows if r["backend"] == backend and r["mode"] == mode]
            print(f"AW {mode} {backend}: geometric mean {statistics.geometric_mean(costs):.2f}, worst {max(costs):.2f}")
    return rows


def milliseconds(values: list[float]) -> dict[str, float]:
    return quartiles([1e3 * value for value in values])


def show(title: str, row: dict, keys: tuple[str, ...]) -> None:
    spread = "  ".join(
        f"{key} {row[key]['median']:5.2f} ({row[key]['low']:.2f}-{row[key]['high']:.2f})" for key in keys
    )
    print(f"{title} {row['milliseconds']['median']:9.2f} ms {row['peak_mib']:8.1f} MiB  {spread}", flush=True)


def rate(amount: float, step: Callable[[], object]) -> float:
    """Amount a second, at the fastest of several readings."""
    return amount / min(seconds(step, 0.005) for _ in range(20))


def rates() -> dict[str, float]:
    """Highest rates of torch on this machine and its threads, a second: multiply-adds, and bytes moved."""
    x, taps = torch.randn(8, 512, 14, 14), torch.randn(512, 512, 5, 5)  # so large that memory for results is no matter
    many = torch.randn(2**24)
    other = torch.empty_like(many)
    return {
        "multiply_adds": rate(8 * 14**2 * taps.numel(), lambda: F.conv2d(x, taps, padding=2)),
        "bytes": rate(8 * many.numel(), lambda: torch.mul(many, 2, out=other)),
    }


def aa_floor(size: int, per_second: dict[str, float]) -> dict:
    """Milliseconds of the arithmetic that attention cannot leave out, and of the convolutions around it, as measured.

    Forward, a logit takes d multiply-adds to make, one to sum and e to use; backward it is made again, and its gradient
    takes e, those of q, k and v 2 d + e. An exponential, each time, is worth EXPONENTIAL of them.
    """
    _, batch, value_channels = AA_CASES[size]
    d, e, logits = KEY_CHANNELS // HEADS, value_channels // HEADS, batch * HEADS * size**4
    layer, x = aa_layer(size)
    BACKENDS["nothing"] = lambda q, k, v, *tables: v
    row = {"map": size}
    products = d + 1 + e + EXPONENTIAL, 4 * d + 1 + 3 * e + 2 * EXPONENTIAL
    for mode, of_logit in zip(MODES, products, strict=True):
        core = logits * of_logit / per_second["multiply_adds"]
        rest = 1 / rate(1, partial(run_by, "nothing", layer, x, mode))
        row[mode] = {"core_ms": round(1e3 * core, 3), "convolutions_ms": round(1e3 * rest, 3)}
        print(f"AA {size:2d} {mode:16s} floor {1e3 * (core + rest):9.2f} ms: core {1e3 * core:.2f}", flush=True)
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
    parser.add_argument("--maps", type=int, nargs="+", choices=AA_CASES, default=list(AA_CASES))
    parser.add_argument("--aa-backends", nargs="+", default=["reference", "timm", "auto"])
    parser.add_argument("--aw-backends", nargs="+", default=["grouped", "auto"])
    parser.add_argument(
        "--floors", action="store_true", help="what each case takes at the least, by this machine's rates"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch.empty(31 * 2**18)  # freed at once: from then on glibc keeps large blocks, as in a long training run
    results = {"machine": machine(), "threads": options.threads, "rounds": options.rounds}
    if "aa" in options.only:
        results["aa"] = measure_aa(options.rounds, options.maps, options.aa_backends)
    if options.floors:
        per_second = results["per_second"] = rates()
        print("  ".join(f"{name} {value / 1e9:.1f} billion/s" for name, value in per_second.items()))
        results["aa_floors"] = [aa_floor(size, per_second) for size in options.maps]
        results["aw_floors"] = [aw_floor(size, batch, per_second) for size in options.maps for batch in AW_BATCHES]
    if "aw" in options.only:
        results["aw"] = measure_aw(options.rounds, options.maps, options.aw_backends)
    if not options.no_write:
        write_results(f"layers-{options.threads}-thread{'s' * (options.threads > 1)}", results)


if __name__ == "__main__":
    main()
