"""C++ kernels of the layers: float32, for x86-64 with AVX-512 or AVX2, compiled when the package is built.

Torch's operations compute the same more slowly. Where the kernels are missing (no compiler, another processor or
operating system), `library` is None and the layers use torch's operations.

`Kernel` checks every tensor before C++ reads or writes it; `attention` and `attended` call the two kernels with it.

GNU OpenMP's threads do not survive a fork: in a forked process torch's own convolutions hang if the parent ran one in
several threads. The kernels use one thread there and do not hang. Start processes by "spawn" to use more threads.
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from augment_cli.compat import are_functorch_transforms_active
from augment_cli.layers.native.compiling import library_path

HERE = Path(__file__).parent
LANES = {"AVX512": 16, "AVX2": 8}
"""Floats in a vector, by the name of torch's CPU capability. The first that the processor has is used."""


@dataclass(frozen=True)
class Library:
    """The compiled kernels in use: their instruction set, "AVX512" or "AVX2", and their functions."""

    instructions: str
    functions: ctypes.CDLL

    @property
    def lanes(self) -> int:
        """Floats in a vector."""
        return LANES[self.instructions]


def _load() -> Library | None:
    capability = torch.backends.cpu.get_cpu_capability()
    for name in LANES:
        if capability.startswith(name) and library_path(HERE, name).is_file():
            try:
                return Library(name, ctypes.CDLL(str(library_path(HERE, name))))
            except OSError:  # compiled for another system
                return None
    return None


library = _load()
"""The kernels in use; None where there are none."""

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def takes(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether there are kernels, these are plain CPU tensors of such dtypes, and no transform of torch.func is active.

    Under torch.compile the kernels are used, as operators. Exporters and tracers do not get them, so that what they
    record runs without this package. (torch 2.9 reports exporting under torch.compile too.)
    """
    if library is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    if not torch.compiler.is_compiling() and are_functorch_transforms_active():
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return plain and all(t.dtype in dtypes for t in tensors)


Argument = tuple[Tensor, Sequence[int]] | tuple[Tensor, Sequence[int], int]
"""A tensor, its shape in C++, and, where only the samples need be dense, the floats from one sample to the next."""


class Kernel:
    """A C++ function `name(const Numbers *, float *tensor, ..., float *scratch, int threads)`, called safely.

    No other code calls the library. C++ trusts the numbers and pointers that it is given, so a call first checks every
    tensor's dtype, device, layout and shape.

    Args:
        name: the function's name. `name_scratch` returns the floats of scratch memory that a call needs, and
            `<name up to the first _>_numbers` the size of the struct in bytes.
        numbers: the struct, as ctypes declares it.
        tensors: number of tensor arguments.

    Raises:
        ImportError: `numbers` is not as long as the struct in C++.
    """

    def __init__(self, name: str, numbers: type[ctypes.Structure], tensors: int) -> None:
        self.name = name
        self._functions = None if library is None else _bind(library.functions, name, numbers, tensors)

    def __call__(self, numbers: ctypes.Structure, *tensors: Argument | None) -> None:
        """Run the kernel in torch's number of threads. None stands for a result that is not wanted.

        Raises:
            RuntimeError: a tensor is not float32, on the CPU, of its shape and dense; or there are no kernels.
        """
        if self._functions is None:
            raise RuntimeError(f"there is no compiled {self.name} in this installation")
        run, scratch_floats = self._functions
        addresses = [None if t is None else self._address(*t) for t in tensors]
        threads = 1 if _forked else torch.get_num_threads()
        scratch = torch.empty(scratch_floats(numbers, threads), dtype=torch.float32, device="cpu")
        run(numbers, *addresses, scratch.data_ptr(), threads)

    def _address(self, tensor: Tensor, shape: Sequence[int], step: int | None = None) -> int:
        """Check a tensor, and return its address. With `step`, floats from sample to sample, samples may lie apart."""
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.dtype is torch.float32
        if plain and tensor.layout is torch.strided and tensor.shape == shape and not tensor.is_neg():
            dense = tensor.is_contiguous() if step is None else tensor.stride(0) == step and dense_samples(tensor)
            address = tensor.data_ptr()
            if dense and (address or not tensor.numel()):  # FSDP, for one, frees the storage of a tensor
                return address
        found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" if isinstance(tensor, Tensor) else tensor
        raise RuntimeError(f"{self.name} takes a dense float32 tensor {tuple(shape)} on the CPU, and was given {found}")


def _bind(
    functions: ctypes.CDLL, name: str, numbers: type[ctypes.Structure], tensors: int
) -> tuple[Callable[..., None], Callable[..., int]]:
    """The C++ functions `name` and `name_scratch`, with their argument types."""
    size = getattr(functions, f"{name.partition('_')[0]}_numbers")()
    if size != ctypes.sizeof(numbers):
        raise ImportError(f"{name} takes {size} bytes of numbers, {numbers.__name__} has {ctypes.sizeof(numbers)}")
    run, scratch_floats = getattr(functions, name), getattr(functions, f"{name}_scratch")
    run.argtypes = [ctypes.POINTER(numbers), *[ctypes.c_void_p] * (tensors + 1), ctypes.c_int]
    scratch_floats.argtypes = [ctypes.POINTER(numbers), ctypes.c_int]
    run.restype, scratch_floats.restype = None, ctypes.c_long
    return run, scratch_floats


def dense_samples(maps: Tensor) -> bool:
    """Whether every sample is contiguous; samples may lie apart."""
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
