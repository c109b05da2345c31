"""Kernels of the layers in C++: float32, for x86-64 with AVX-512 or AVX2, compiled when the package is built.

Torch's operations compute the same more slowly. Where the kernels are missing, because there was no compiler, or for
another processor or operating system, the layers do without them.
"""

import ctypes
import hashlib
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


def _load() -> tuple[str | None, ctypes.CDLL | None]:
    capability = torch.backends.cpu.get_cpu_capability()
    for name in LANES:
        if capability.startswith(name) and library_path(name).is_file():
            try:
                library = ctypes.CDLL(str(library_path(name)))
            except OSError:  # made for another system
                return None, None
            for scratch in ("attention", "attended_forward", "attended_backward"):
                getattr(library, f"{scratch}_scratch").restype = ctypes.c_long
            return name, library
    return None, None


instructions, kernels = _load()
"""What the kernels in use were compiled for, "AVX512" or "AVX2", and the kernels; None where there are none.

They check no arguments: `takes` says which tensors they are for.
"""


def lanes() -> int:
    """Numbers in a vector of the kernels in use."""
    return LANES[instructions]


def takes(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether there are kernels, and these are plain tensors of such types on a processor, and no transform looks on.

    A compiler may: it is given operators. Exporters and tracers are not, so that what they record runs without us.
    (torch 2.9 says under torch.compile, too, that it is exporting.)
    """
    if instructions is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return plain and all(t.dtype in dtypes for t in tensors)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def long(number: int) -> ctypes.c_long:
    return ctypes.c_long(number)
