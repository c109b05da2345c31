"""The attention core of an AA layer, side by side: plain, timm's BottleneckAttn, blocked, fused.

    python benchmarks/attention_core.py [--rounds N] [--threads N] [--cases 14 56] [--floors]

Each reading is a whole AAConv2d, convolution branch and projections included, float32. Rounds of the peers alternate in
one process, so that what else the machine does meets all of them; the ratio is the median of the rounds' ratios, with
quartiles. Peak memory is that of the tensors that one call makes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from timm.layers.bottleneck_attn import PosEmbedRel
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from augment_cli.layers import aa_conv
from augment_cli.layers.attention import relative_attention
from augment_cli.layers.blocked import blocked_relative_attention
from augment_cli.layers.fused import fused_relative_attention

HEADS, KEY_CHANNELS = 8, 160
CASES = {7: (512, 8, 56), 14: (256, 8, 32), 28: (128, 4, 16), 56: (64, 2, 8)}  # map: channels, batch, d_v


def bottleneck_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """What timm.layers.BottleneckAttn does between its qkv convolution and its pooling, scale_pos_embed=True.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    height, width, d = q.shape[2:]
    position = SimpleNamespace(height=height, width=width, height_rel=rel_height, width_rel=rel_width)
    q, v = (t.movedim(-1, 2).flatten(3).flatten(0, 1).transpose(1, 2) for t in (q, v))
    k = k.movedim(-1, 2).flatten(3).flatten(0, 1)
    logits = (q @ k + PosEmbedRel.forward(position, q)) * d**-0.5
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    return out.unflatten(0, (-1, HEADS)).unflatten(-1, (height, width)).movedim(2, -1)


PEERS = {
    "plain": relative_attention,
    "timm": bottleneck_attention,
    "blocked": blocked_relative_attention,
    "fused": fused_relative_attention,
}


def make_layer(size: int, channels: int, value_channels: int) -> nn.Module:
    split = {"heads": HEADS, "key_channels": KEY_CHANNELS, "value_channels": value_channels}
    return aa_conv.AAConv2d(channels, channels, 3, padding=1, bias=False, **split, resolution=size)


def infer(layer: nn.Module, x: Tensor, core: Callable[..., Tensor]) -> None:
    with torch.no_grad(), mock.patch.object(aa_conv, "relative_attention", core):
        layer(x)


def train(layer: nn.Module, x: Tensor, core: Callable[..., Tensor]) -> None:
    layer.zero_grad()
    x.grad = None
    with mock.patch.object(aa_conv, "relative_attention", core):
        out = layer(x)
    out.backward(torch.ones_like(out))


def seconds(step: Callable[[], None], at_least: float = 0.02) -> float:
    """One reading: the mean of as many calls as fill `at_least` seconds."""
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < at_least:
        step()
        calls += 1
    return spent / calls


def peak_bytes(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(size: int, names: list[str], rounds: int) -> None:
    channels, batch, value_channels = CASES[size]
    layer = make_layer(size, channels, value_channels)
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    for mode, call in (("forward", infer), ("forward+backward", train)):
        steps = {name: partial(call, layer, x, PEERS[name]) for name in names}
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        readings = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds)]
        for name in names:
            time_ms = 1e3 * statistics.median(r[name] for r in readings)
            against = "".join(f"   {other}: {ratio(readings, other, name)}" for other in names[:2] if other != name)
            print(
                f"{size:3d} {mode:17s} {name:8s} {time_ms:9.2f} ms {peaks[name] / 2**20:8.1f} MiB{against}", flush=True
            )


def ratio(readings: list[dict[str, float]], slower: str, name: str) -> str:
    low, middle, high = statistics.quantiles([r[slower] / r[name] for r in readings], n=4)
    return f"{middle:5.2f}x ({low:.2f} to {high:.2f})"


def rate(amount: float, step: Callable[[], object]) -> float:
    """Amount a second, at the fastest of several readings."""
    return amount / min(seconds(step, 0.005) for _ in range(20))


def floor(size: int) -> None:
    """The parts that no arrangement of this algorithm leaves out, each at its own measured rate, for one core."""
    channels, batch, value_channels = CASES[size]
    d, e, positions, queries = KEY_CHANNELS // HEADS, value_channels // HEADS, size**2, min(size**2, 112)
    logits = batch * HEADS * positions**2
    q, k, v = torch.randn(d, queries), torch.randn(positions, d), torch.randn(e + 1, positions)
    block, other = torch.randn(positions, queries), torch.empty(positions, queries)
    sums = torch.randn(e + 1, queries)
    per_second = {
        "q k": rate(block.numel(), lambda: torch.mm(k, q, out=other)),
        "exp2": rate(block.numel(), lambda: torch.exp2(block, out=other)),
        "p v": rate(block.numel(), lambda: torch.mm(v, block)),
        "dp": rate(block.numel(), lambda: torch.mm(v.t(), sums, out=other)),
        "dq": rate(block.numel(), lambda: torch.mm(k.t(), block)),
        "dk": rate(block.numel(), lambda: torch.mm(q, block.t())),
        "pass": rate(block.numel(), lambda: torch.mul(block, block, out=other)),
    }
    forward = ("q k", "exp2", "p v", "pass")
    both = (*forward, "q k", "exp2", "pass", "dp", "pass", "p v", "dq", "dk", "pass", "pass")
    layer = make_layer(size, channels, value_channels)
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    for mode, parts, call in (("forward", forward, infer), ("forward+backward", both, train)):
        core = 1e3 * sum(logits / per_second[part] for part in parts)
        rest = 1e3 / rate(1, partial(call, layer, x, lambda q, k, v, *tables: v))
        print(f"{size:3d} {mode:17s} floor    {core + rest:9.2f} ms: core {core:.2f}, convolutions {rest:.2f}")
    print(
        "    " + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in per_second.items()), "billion logits a second"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", type=int, nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["plain", "timm", "blocked"])
    parser.add_argument("--floors", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for size in options.cases:
        floor(size) if options.floors else measure(size, options.peers, options.rounds)


if __name__ == "__main__":
    main()
