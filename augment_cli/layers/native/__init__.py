"""Kernels of the layers in C++: float32, for x86-64 with AVX-512 or AVX2, compiled when the package is built.

Torch's operations compute the same more slowly. Where the kernels are missing, because there was no compiler, or for
another processor or operating system, the layers do without them.
"""

import ctypes
import hashlib
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
LANES = {"AVX512": 16, "AVX2": 8}
"""Numbers in a vector, by what torch finds that the processor can do."""


def library_path(instructions: str) -> Path:
    """Where the kernels for some instructions are: the name changes with the sources, so that none is taken for older
    or newer ones."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return HERE / f"kernels-{instructions.lower()}-{digest[:12]}.so"


def instructions() -> str | None:
    """What the kernels in use were compiled for, "AVX512" or "AVX2"; None where there are none."""
    return _loaded()[0]


def lanes() -> int:
    """Numbers in a vector of the kernels in use."""
    return LANES[_loaded()[0]]


def kernels() -> ctypes.CDLL:
    """The kernels in use. Their arguments are not checked: `takes` says which tensors they are for."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[str | None, ctypes.CDLL | None]:
    capability = torch.backends.cpu.get_cpu_capability()
    for name in LANES:
        if capability.startswith(name) and library_path(name).is_file():
            try:
                return name, ctypes.CDLL(str(library_path(name)))
            except OSError:  # made for another system
                return None, None
    return None, None


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels, and these are plain float32 tensors on a processor that nothing looks on at."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return plain and all(t.dtype == torch.float32 for t in tensors) and instructions() is not None


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def long(number: int) -> ctypes.c_long:
    return ctypes.c_long(number)
