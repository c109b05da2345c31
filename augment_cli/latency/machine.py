"""The machine as far as it bears on time, and the settings of a measurement as it can meet them."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from augment_cli.errors import InputError
from augment_cli.layers import native, triton
from augment_cli.planning.latency import LatencySettings


def resolved(settings: LatencySettings) -> LatencySettings:
    """The settings with a number of threads.

    Raises:
        AugmentError: the device is not there.
    """
    if settings.device != "cpu":
        number = int(settings.device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} of them" if torch.cuda.is_available() else "none"
            raise InputError(
                f"latency.device={settings.device}: torch finds {found} on this machine; `latency.device=cpu` measures "
                f"on the processor"
            )
    return settings.model_copy(update={"threads": settings.threads or torch.get_num_threads()})


def describe_machine(device: str) -> str:
    """Device, versions and compiled kernels, in words."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {', '.join(_cuda_kernels())}"
    kernels = f"{native.library.instructions} kernels" if native.library else "no compiled kernels"
    return f"{processor()}, torch {torch.__version__}, {kernels}"


def _cuda_kernels() -> Iterator[str]:
    """Where the kernels of a CUDA device come from, and the settings of torch that change their time."""
    backends: Any = torch.backends  # torch does not declare cudnn.conv
    yield "Triton" if triton.INSTALLED else "no Triton"
    if torch.backends.cudnn.enabled:
        yield f"cuDNN {torch.backends.cudnn.version()}"
        if torch.backends.cudnn.benchmark:
            yield "cudnn.benchmark"
    convolutions, products = backends.cudnn.conv, backends.cuda.matmul
    yield f"fp32_precision {convolutions.fp32_precision} in convolutions and {products.fp32_precision} in products"


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads within the block."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
