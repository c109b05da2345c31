"""Launch configurations of the Triton kernels, each timed: the chosen one, then those that differ by the fewest factors
of two. A configuration is as in `layers/triton/attention.py` (SIZES) and `attended.py` (BLOCKS).
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_parts import Call, Measurement
from layers import AA_CASES, AW_CASES
from measure import Device, quartiles
from torch import Tensor

from augment_cli.layers.geometry import Geometry
from augment_cli.layers.triton import padded

Config = tuple[int, ...]
"""Positions or channels of the blocks, warps, stages."""

Run = Callable[[], list[Tensor]]

AA = ("14", "28", "56", "50x84")
AW = (14, 7, 56)
TOLERANCE = 0.02
"""Relative distance to the chosen configuration's results, in bfloat16."""


@dataclass(frozen=True)
class Case:
    """A kernel's entry in a table of configurations, and what makes inputs and returns a call with its results."""

    name: str
    table: dict[Any, Config]
    entry: Any
    make: Callable[[], Run]

    @property
    def chosen(self) -> Config:
        return self.table[self.entry]

    def configs(self) -> list[tuple[int, Config]]:
        """Configurations, with their distance from the chosen one."""
        *blocks, _, _ = self.chosen
        grid = itertools.product(*([b // 2, b, 2 * b] for b in blocks), (2, 4, 8), (1, 2, 3, 4))
        found = [(_distance(c, self.chosen), c) for c in grid if min(c[: len(blocks)]) >= 16]
        return sorted(found)


def _distance(config: Config, chosen: Config) -> int:
    *blocks, stages = config
    *others, other = chosen
    return sum(abs(round(math.log2(a / b))) for a, b in zip(blocks, others, strict=True)) + abs(stages - other)


def measurements(call: Call) -> list[Measurement]:
    found = [
        (distance, f"{case.name}, {'x'.join(map(str, config))}", partial(measure, call, case, config))
        for case in cases(call)
        for distance, config in case.configs()[: 2 if call.rehearse else None]
    ]
    return [(key, run) for _, key, run in sorted(found, key=lambda entry: entry[0])]


def cases(call: Call) -> Iterator[Case]:
    from augment_cli.layers.triton.attended import BLOCKS
    from augment_cli.layers.triton.attention import SIZES

    for size in AA[:1] if call.rehearse else AA:
        case = AA_CASES[size]
        d, e = case.keys // case.heads, case.values // case.heads
        entry = max(padded(d), padded(e), 32)
        shape = (1, 2, 4, 5, d, e) if call.rehearse else (case.on_gpu, case.heads, *case.size, d, e)
        yield Case(f"AA {size}, bfloat16", SIZES["half"], entry, partial(attend, call.device, *shape))
    for size in AW[:1] if call.rehearse else AW:
        shape = (1, 16, 3) if call.rehearse else (256, AW_CASES[size], size)
        for name, table in BLOCKS.items():
            yield Case(f"AW {size}, {name}, bfloat16", table, "half", partial(convolve, name, call.device, *shape))


def attend(device: str, n: int, heads: int, height: int, width: int, d: int, e: int) -> Run:
    """AA's core, forward and backward."""
    from augment_cli.layers.triton.attention import backward, forward

    drawn = _Drawn(device)
    maps = drawn(n, heads * (2 * d + e), height, width).to(memory_format=torch.channels_last).flatten(2)
    parts = maps.split([heads * d, heads * d, heads * e], dim=1)
    inputs = [
        *(t.unflatten(1, (heads, -1)) for t in parts),
        *(drawn(2 * size - 1, d).float() for size in (height, width)),
    ]

    def run() -> list[Tensor]:
        results = forward(*inputs)
        return [results[0], *backward(results[0], *inputs, *results)]

    return run


def convolve(name: str, device: str, n: int, channels: int, size: int) -> Run:
    """One of AW's three kernels, for a 3x3 kernel of as many input as output channels."""
    from augment_cli.layers.triton import attended

    geometry, groups, drawn = Geometry((3, 3), (1, 1), (1, 1), (1, 1)), channels // 16, _Drawn(device)
    x, out = (drawn(n, channels, size, size).to(memory_format=torch.channels_last) for _ in range(2))
    inputs = x, drawn(channels, 9, groups, 16).float(), drawn(channels, groups).float(), drawn(n, 9, groups)
    into = torch.empty_like(x)

    def run() -> list[Tensor]:
        if name == "kernel_backward":
            return list(attended.kernel_backward(out, inputs, geometry))
        if name == "conv_forward":
            attended.forward(*inputs, geometry, into)
        else:
            attended.maps_backward(out, inputs, geometry, into)
        return [into]

    return run


class _Drawn:
    """Normal numbers in bfloat16, the same for each configuration."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).bfloat16()


def measure(call: Call, case: Case, config: Config) -> dict[str, Any]:
    """Milliseconds of one configuration, if it computes what the chosen one does."""
    chosen, device, run = case.chosen, Device(call.device), case.make()
    expected = [t.clone() for t in run()]
    case.table[case.entry] = config
    try:
        for found, right in zip(run(), expected, strict=True):
            off = float((found.double() - right.double()).norm() / right.double().norm())
            if not off <= TOLERANCE:
                raise ValueError(f"{config} is {off:.2g} off the chosen configuration's results")
        readings = [device.seconds(run, 0.0 if call.rehearse else 0.01) for _ in range(call.rounds)]
    finally:
        case.table[case.entry] = chosen
    row = {"case": case.name, "config": list(config), "chosen": config == chosen}
    return row | {"milliseconds": quartiles([1e3 * value for value in readings])}
