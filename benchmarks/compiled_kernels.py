"""What the Triton kernels take of a GPU: registers, spilled bytes, shared memory. Needs no GPU.

    python benchmarks/compiled_kernels.py [--arch 80 90 100] [--json FILE]

Triton compiles for a GPU that is not there, by its own ptxas. Each kernel is compiled as the layers launch it, from a
call with tensors on the CPU, so the tiles, warps and argument types are those of training.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported, which torch.utils.flop_counter does

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
PRECISIONS = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}
ATTENTION = {
    "14x14, 20 and 8": (14, 14, 20, 8),
    "50x84, 12 and 6": (50, 84, 12, 6),
    "7x7, 64 and 64": (7, 7, 64, 64),
    "56x56, 128 and 128": (56, 56, 128, 128),
}
CONVOLUTIONS = {
    "14x14, 256": (256, 14, 1),
    "56x56, 64": (64, 56, 1),
    "7x7, 512, stride 2": (512, 14, 2),
    "56x56, 3, one group": (3, 56, 1, 3),
    "28x28, 64, groups of 1": (64, 28, 1, 1),
}


def attention(height: int, width: int, d: int, e: int, dtype: torch.dtype) -> None:
    """Both passes of AA, for heads of d key and e value channels."""
    from augment_cli.layers.triton.attention import backward, forward

    maps = torch.zeros(2, 8 * (2 * d + e), height, width, dtype=dtype).to(memory_format=torch.channels_last)
    maps = maps.flatten(2).split([8 * d, 8 * d, 8 * e], dim=1)
    inputs = [t.unflatten(1, (8, -1)) for t in maps] + [torch.zeros(2 * size - 1, d) for size in (height, width)]
    results = forward(*inputs)
    backward(results[0], *inputs, *results)


def convolution(channels: int, size: int | tuple[int, int], stride: int, *more: Any) -> None:
    """Both passes of AW, for a 3x3 kernel of as many input as output channels.

    Args:
        more: r, where it is not 16, and the dtype.
    """
    from augment_cli.compat import pair
    from augment_cli.layers.geometry import Geometry
    from augment_cli.layers.triton.attended import forward, kernel_backward, maps_backward

    *reduction, dtype = more
    r = reduction[0] if reduction else 16
    geometry, groups = Geometry((3, 3), (stride, stride), (1, 1), (1, 1)), channels // r
    x = torch.zeros(2, channels, *pair(size), dtype=dtype).to(memory_format=torch.channels_last)
    kernel, mixing, scales = (
        torch.zeros(channels, 9, groups, r),
        torch.zeros(channels, groups),
        torch.zeros(2, 9, groups),
    )
    out = torch.zeros(2, channels, *geometry.out_size(x), dtype=dtype).to(memory_format=torch.channels_last)
    forward(x, kernel, mixing, scales, geometry, out)
    maps_backward(out, (x, kernel, mixing, scales), geometry, x)
    kernel_backward(out, (x, kernel, mixing, scales), geometry)


class Absent:
    """A GPU that is not there, as Triton's driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Callable[[], None], arch: int) -> list[CompiledKernel]:
    """Kernels that a call launches, compiled for an architecture. None of them runs."""
    found = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid: tuple, warmup: bool, **options) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Absent(arch))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = run
    return found


def resources(kernel: CompiledKernel) -> dict[str, int]:
    """Read what a kernel takes from its binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{name}:(\d+)", shown)[1]) for name in ("REG", "STACK"))
    found = {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}
    return {**found, "warps": kernel.metadata.num_warps}


def rows(wanted: str | None, case: str | None, archs: list[int], precisions: list[str], quick: bool) -> Iterator[dict]:
    for layer, call, cases in (("AA", attention, ATTENTION), ("AW", convolution, CONVOLUTIONS)):
        if wanted not in (None, layer):
            continue
        for name, sizes in list(cases.items())[: 1 if quick else None]:
            if case not in (None, name):
                continue
            for precision in precisions:
                dtype, products = PRECISIONS[precision]
                torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = products
                for arch in archs:
                    for kernel in compiled(lambda call=call, sizes=sizes, dtype=dtype: call(*sizes, dtype), arch):
                        which = {"layer": layer, "case": name, "kernel": kernel.metadata.name, "precision": precision}
                        yield {**which, "arch": arch, **resources(kernel)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, without a dot"
    )
    parser.add_argument("--layer", choices=("AA", "AW"), help="one of the layers only")
    parser.add_argument("--case", choices=[*ATTENTION, *CONVOLUTIONS], help="one case only")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp32", "tf32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="the first case of each layer only")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    args = parser.parse_args()
    found = []
    for row in rows(args.layer, args.case, args.arch, args.precision, args.quick):
        if not found:
            print(" | ".join(row))
        print(" | ".join(str(value) for value in row.values()), flush=True)
        found.append(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
