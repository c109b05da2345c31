"""Calls of the compiled kernels: wrong tensors are refused, structs have the right size, forked processes work."""

import ctypes
import subprocess
import sys

import pytest
import torch

from augment_cli.layers import native
from augment_cli.layers.geometry import Geometry
from augment_cli.layers.native import attended, attention
from tests.layers.helpers import needs_kernels, normal

pytestmark = needs_kernels


def maps_and_tables() -> list[torch.Tensor]:
    """q, k (2, 2, 4, 6), v (2, 2, 3, 6) of maps of 2x3 positions, and their tables."""
    maps = [normal(2, 2, c, 6, seed=c, dtype=torch.float32) for c in (4, 5, 3)]
    maps[1] = maps[1][:, :, :4].contiguous()
    return [*maps, normal(3, 4, seed=1, dtype=torch.float32), normal(5, 4, seed=2, dtype=torch.float32)]


def convolution() -> list[torch.Tensor]:
    """x, K, s, A2 and out of a 3x3 convolution."""
    shapes = (2, 32, 5, 6), (32, 288), (2, 32), (2, 2, 9), (2, 32, 3, 4)
    return [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]


GEOMETRY = Geometry((3, 3), (1, 1), (0, 0), (1, 1))


def run_attention(tensors: list[torch.Tensor]) -> None:
    attention.forward(*tensors)


def run_attention_backward(tensors: list[torch.Tensor]) -> None:
    results = attention.forward(*maps_and_tables())
    attention.backward(tensors[2], *maps_and_tables(), tensors[2], *results[1:])


def run_convolution(tensors: list[torch.Tensor]) -> None:
    attended.forward(*tensors[:4], GEOMETRY, tensors[4])


def run_convolution_backward(tensors: list[torch.Tensor]) -> None:
    x, *rest = (torch.empty_like(t) for t in tensors[:4])
    attended.backward(tensors[4], tuple(tensors[:4]), GEOMETRY, x, rest)


CALLS = {
    "attention": (run_attention, maps_and_tables, range(5)),
    "attention_backward": (run_attention_backward, maps_and_tables, (2,)),
    "attended": (run_convolution, convolution, range(5)),
    "attended_backward": (run_convolution_backward, convolution, range(5)),
}
WRONG = {
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "integers": lambda t: t.int(),
    "meta": lambda t: t.to("meta"),
    "missing": lambda t: None,
    "longer": lambda t: torch.cat([t, t], -1),
    "shorter": lambda t: t[..., :-1].contiguous(),
    "flat": lambda t: t.flatten(),
    "negated": torch._neg_view,
    "sparse": lambda t: t.to_sparse(),
    "freed": lambda t: freed(t.clone()),
    "subclass": lambda t: t.as_subclass(type("Other", (torch.Tensor,), {})),
}


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose memory was given back, as torch.distributed does between steps."""
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_other_tensors_are_refused(call, wrong):
    run, make, places = CALLS[call]
    run(make())
    for place in places:
        tensors = make()
        tensors[place] = WRONG[wrong](tensors[place])
        with pytest.raises((RuntimeError, AttributeError, NotImplementedError, ValueError, TypeError, IndexError)):
            run(tensors)


@pytest.mark.parametrize("wrong", WRONG)
def test_the_hand_over_says_what_it_takes(wrong):
    tensor = torch.zeros(3, 4)
    kernel = attention._forward_kernel
    assert kernel._address(tensor, (3, 4)) == tensor.data_ptr()
    with pytest.raises(RuntimeError, match=r"attention_forward takes a dense float32 tensor \(3, 4\) on the CPU"):
        kernel._address(WRONG[wrong](tensor), (3, 4))


def test_layouts_that_the_hand_over_takes():
    kernel, maps = attention._forward_kernel, torch.zeros(4, 6, 5)
    assert kernel._address(maps[:, 2:4], (4, 2, 5), 30) == maps[:, 2:4].data_ptr()
    for tensor, step in ((maps[:, 2:4], None), (maps[:, 2:4], 10), (maps[..., :3], 30), (maps.movedim(0, 1), 5)):
        with pytest.raises(RuntimeError, match="dense"):
            kernel._address(tensor, tuple(tensor.shape), step)
    assert not kernel._address(torch.zeros(0, 3), (0, 3))


def test_functions_say_what_they_take():
    for kernel in (
        attention._forward_kernel,
        attention._backward_kernel,
        attended._forward_kernel,
        attended._backward_kernel,
    ):
        for function in kernel._functions:
            assert function.argtypes[0]._type_ in (attention._Numbers, attended._Numbers)
            with pytest.raises(ctypes.ArgumentError):
                function(*[1.5] * len(function.argtypes))


def test_numbers_of_another_length_are_not_loaded():
    class Longer(ctypes.Structure):
        _fields_ = (*attention._Numbers._fields_, ("one_more", ctypes.c_long))

    with pytest.raises(ImportError, match="bytes"):
        native.Kernel("attention_forward", Longer, tensors=8)


FORK = """
import os, torch
from augment_cli.layers import AWConv2d
from augment_cli.layers.aa.attention import attention
from augment_cli.layers.aw.attended import attended_conv

torch.set_num_threads(2)
x, layer = torch.randn(8, 64, 14, 14), AWConv2d(64, 64, 3)
tensors = [torch.randn(4, 2, 14, 14, 8, requires_grad=True) for _ in range(3)]
tables = [torch.randn(27, 8) for _ in range(2)]
geometry, mixing, scales = layer.geometry, torch.randn(4, 64), torch.rand(8, 4, 3, 3)

def run():
    out = attention(*tensors, *tables, "native")
    torch.autograd.backward(out, torch.ones_like(out))
    attended_conv(x, layer.weight.detach(), mixing, scales, geometry, "native")

run()
child = os.fork()
if not child:
    run()
    os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_does_not_hang():
    """GNU OpenMP waits for threads that the child does not have; torch's own operations do."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
