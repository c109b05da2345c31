"""Kernels of the layers in C++: float32, for x86-64 with AVX-512 or AVX2, compiled when the package is built.

Torch's operations compute the same more slowly. Where the kernels are missing, because there was no compiler, or for
another processor or operating system, the layers do without them.

GNU OpenMP's threads do not live on in a forked process: torch's own convolutions hang there, if the parent ran any in
several threads. The kernels do not hang, because in a forked process they use one thread. Start processes by "spawn" to
use more.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from augment_cli.layers.native.compiling import library_path

HERE = Path(__file__).parent
LANES = {"AVX512": 16, "AVX2": 8}
"""Numbers in a vector, by what torch finds that the processor can do."""


def _load() -> tuple[str | None, ctypes.CDLL | None]:
    capability = torch.backends.cpu.get_cpu_capability()
    for name in LANES:
        if capability.startswith(name) and library_path(HERE, name).is_file():
            try:
                return name, ctypes.CDLL(str(library_path(HERE, name)))
            except OSError:  # made for another system
                return None, None
    return None, None


instructions, _library = _load()
"""What the kernels in use were compiled for, "AVX512" or "AVX2", and the kernels; None where there are none."""

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


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


class Kernel:
    """A C++ function `name(const Numbers *, float *tensor, ..., float *scratch, int threads)`.

    Calling this is the only way to the compiled code, which reads and writes what it is told to: no tensor gets there
    that is not what the kernel takes it for.

    Raises:
        ImportError: the library's struct is not as long as `numbers`.
    """

    def __init__(self, name: str, numbers: type[ctypes.Structure], tensors: int) -> None:
        self.name, self.numbers = name, numbers
        if _library is None:
            return
        size = getattr(_library, f"{name.partition('_')[0]}_numbers")()
        if size != ctypes.sizeof(numbers):
            raise ImportError(f"{name} takes {size} bytes of numbers, {numbers.__name__} has {ctypes.sizeof(numbers)}")
        self._run, self._scratch = getattr(_library, name), getattr(_library, f"{name}_scratch")
        self._run.argtypes = [ctypes.POINTER(numbers), *[ctypes.c_void_p] * (tensors + 1), ctypes.c_int]
        self._scratch.argtypes = [ctypes.POINTER(numbers), ctypes.c_int]
        self._run.restype, self._scratch.restype = None, ctypes.c_long

    def __call__(self, numbers: ctypes.Structure, *tensors: "Argument | None") -> None:
        """Run the kernel in torch's number of threads, with fresh scratch memory. None is a result not wanted.

        Raises:
            RuntimeError: a tensor is not of float32, on the CPU, of its shape, or dense; or there are no kernels.
        """
        if _library is None:
            raise RuntimeError(f"there is no compiled {self.name} in this installation")
        addresses = [None if t is None else self._address(*t) for t in tensors]
        threads = 1 if _forked else torch.get_num_threads()
        scratch = torch.empty(self._scratch(numbers, threads), dtype=torch.float32, device="cpu")
        self._run(numbers, *addresses, scratch.data_ptr(), threads)

    def _address(self, tensor: Tensor, shape: Sequence[int], step: int | None = None) -> int:
        """Where a tensor's numbers start; with a `step` from sample to sample only the samples need be dense."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype is torch.float32
        if plain and tensor.layout is torch.strided and tensor.shape == shape and not tensor.is_neg():
            dense = tensor.is_contiguous() if step is None else tensor.stride(0) == step and dense_samples(tensor)
            address = tensor.data_ptr()
            if dense and (address or not tensor.numel()):  # storage may have been freed, by FSDP for one
                return address
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" if isinstance(tensor, Tensor) else tensor
        raise RuntimeError(f"{self.name} takes a dense float32 tensor {tuple(shape)} on the CPU, and was given {found}")


Argument = tuple[Tensor, Sequence[int]] | tuple[Tensor, Sequence[int], int]
"""A tensor, the shape that the kernel takes it for, and, where it need not be dense, the step from sample to sample."""


def dense_samples(maps: Tensor) -> bool:
    """Whether every sample is contiguous, however far it is from one to the next."""
    if maps.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(maps.shape[:0:-1], maps.stride()[:0:-1], strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Fields of one type for a ctypes.Structure."""
    return [(name, kind) for name in names.split()]
