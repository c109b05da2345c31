"""The matrix product that all kernels share."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr, more=None):
    """a b + more, summed in float32."""
    if PRECISION == "interpreted":  # the interpreter multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, more, input_precision="ieee")
    return tl.dot(a, b, more, input_precision=PRECISION)
