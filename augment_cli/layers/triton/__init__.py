"""Triton kernels of the layers, for NVIDIA GPUs. Triton comes with torch on Linux.

Triton is imported when a layer on a GPU first asks whether it works, or calls a kernel. With TRITON_INTERPRET=1 in the
environment before that, the same kernels run in its interpreter, on CPU tensors, slowly.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from augment_cli.compat import are_functorch_transforms_active

LEAST_CAPABILITY = 8, 0
"""Compute capability from which on tensor cores take bfloat16."""
LEAST_TRITON = 3, 6
"""Version from which on Triton compiles all of these kernels for every architecture; 3.5 fails for 10.0."""
INSTALLED = importlib.util.find_spec("triton") is not None
DTYPES = torch.float32, torch.bfloat16, torch.float16


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None where they can."""
    if not INSTALLED:
        return "Triton is not installed"
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype not in DTYPES})
    if dtypes:
        return f"they take float32, bfloat16 and float16, not {', '.join(dtypes)}"
    device = tensors[0].device
    if device.type == "cuda":
        return _reason_against_gpu(device.index)
    return None if is_interpreted() and device.type == "cpu" else f"they run on CUDA, not on {device.type}"


@torch.compiler.assume_constant_result
def _reason_against_gpu(index: int) -> str | None:
    return _check_gpu(index)


@cache
def _check_gpu(index: int) -> str | None:
    """Why the kernels do not run on a GPU. Triton compiles its launcher when it starts, with a C compiler."""
    if torch.version.hip:
        return "they are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return "the GPU's compute capability is {}.{}, below {}.{}".format(*capability, *LEAST_CAPABILITY)
    try:
        _start()
    except Exception as error:  # of a compiler, a driver or a linker
        reason = f"Triton does not work here ({error})"
        warnings.warn(f"{reason}: the layers use torch's operations, which are slower", stacklevel=2)
        return reason
    return None


def _start() -> None:
    """Start Triton.

    Raises:
        Exception: it does not start, whatever the reason.
    """
    import triton
    from triton.runtime import driver

    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        raise RuntimeError("version {} is older than {}.{}".format(triton.__version__, *LEAST_TRITON))
    driver.active.get_current_device()


def takes(*tensors: Tensor) -> bool:
    """Whether "auto" may choose the kernels: plain CUDA tensors that they can take, and no transform of torch.func.

    Under torch.compile they are used, as operators. Exporters and tracers do not get them, so that what they record
    runs without this package. (torch 2.9 reports exporting under torch.compile too.)
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if not torch.compiler.is_compiling() and are_functorch_transforms_active():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cuda" for t in tensors)
    return plain and reason_against(*tensors) is None


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Launch kernels on the tensor's device: Triton launches them on the current one."""
    if tensor.device.type == "cuda":
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def padded(channels: int, least: int = 16) -> int:
    """Channels as a matrix product takes them: a power of two, 16 at least."""
    return max(least, 1 << (channels - 1).bit_length())
