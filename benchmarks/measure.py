"""Helpers of the benchmarks: the machine's description, time and memory on a device, quartiles, and results."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from augment_cli.layers import native

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str | int]:
    """The machine as far as it bears on speed, without its name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": model,
        "cores": os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
        "kernels": native.library.instructions if native.library else "none",
        "torch": version("torch"),
        "timm": version("timm"),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"low": round(low, 6), "median": round(median, 6), "high": round(high, 6)}


def write_results(name: str, results: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int, synchronize: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round that is not counted; a round runs them all in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Quartiles of the ratio round by round: what a machine's drift does not move."""
    return quartiles([a / b for a, b in zip(numerator, denominator, strict=True)])


class Device:
    """Where calls are measured: "cpu" or "cuda"."""

    def __init__(self, name: str = "cpu") -> None:
        self.name = name

    def synchronize(self) -> None:
        """Wait for what was launched."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def seconds(self, step: Callable[[], object], at_least: float = 0.02) -> float:
        """One reading: the mean of as many calls as fill `at_least` seconds. Their number doubles between two looks."""
        self.synchronize()
        start, calls, more = time.perf_counter(), 0, 1
        while True:
            for _ in range(more):
                step()
            self.synchronize()
            calls += more
            more = calls
            if (spent := time.perf_counter() - start) >= at_least:
                return spent / calls

    def peak_mib(self, step: Callable[[], object]) -> float:
        """The most memory that tensors made by a call hold at one time, in MiB."""
        if self.name != "cuda":
            return peak_mib(step)
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        self.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 3)

    def free(self) -> None:
        """Give memory back that no tensor uses, after something failed for want of it."""
        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()


def peak_mib(function: Callable[[], object]) -> float:
    """The most memory that tensors made by a call hold at one time, in MiB, on the CPU: by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    from augment_cli.layers.aa.blocked import free_blocks

    free_blocks()  # or what is kept from earlier calls would not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in sorted(_memory_events(profiler), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return round(most / 2**20, 3)


def _memory_events(profiler) -> list:
    return [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
