"""AW's convolution as Triton kernels, forward and backward:

    out[n] = conv(x[n], K_n),   K_n[o, t, c] = K[o, t, c] (1 + mixing[o, g] scales[n, t, g]),   g = c // r

for N samples, C1 input and C2 output channels, maps of H x W, results of H' x W' = P positions, kernels of T taps, and
G = C1 / r groups of input channels. A kernel is (C2, T, G, r), mixing (C2, G) and scales (N, T, G), all dense.

- No K_n is ever in global memory: a block of K is multiplied by its factors when it is loaded, in float32, and rounded
  to x's dtype.
- Products are of a block of positions, a block of output channels, and a block of input channels: BG groups and BR
  channels of each, padded where r is not a power of two.
- The kernels' gradient is summed over the samples in the program that holds a block of it. What is left to add up
  comes back with one axis for each program, in float32: there are no atomics, and results repeat bit for bit.
"""

import triton
import triton.language as tl

from augment_cli.layers.triton.product import product

SIZES = ["height", "width", "out_height", "out_width"]
"""Arguments whose values make no faster code: maps of many sizes, as in detection, need one compilation."""


@triton.jit
def _channels(group, first, groups, r, BG: tl.constexpr, BR: tl.constexpr):
    """Input channels of a block, (BG BR,): BR of each of BG groups, from `first` on; and whether they exist."""
    i = tl.arange(0, BG * BR)
    g, c = group + i // BR, first + i % BR
    return g * r + c, (g < groups) & (c < r)


@triton.jit
def _factors(mixing, scales, o, o_inside, group, groups, BG: tl.constexpr):
    """1 + mixing scales for some output channels and groups of one sample and tap, (outputs, BG), and both factors."""
    g = group + tl.arange(0, BG)
    inside = g < groups
    of_mixing = tl.load(mixing + o[:, None] * groups + g[None, :], mask=o_inside[:, None] & inside[None, :], other=0.0)
    of_scales = tl.load(scales + g, mask=inside, other=0.0)
    of_mixing, of_scales = of_mixing.to(tl.float32), of_scales.to(tl.float32)
    return 1 + of_mixing * of_scales[None, :], of_mixing, of_scales


@triton.jit
def _formed(kernels, factors, BG: tl.constexpr, BR: tl.constexpr):
    """A block of K (outputs, BG BR) times its factors (outputs, BG)."""
    outputs: tl.constexpr = kernels.shape[0]
    repeated = tl.reshape(tl.broadcast_to(factors[:, :, None], (outputs, BG, BR)), (outputs, BG * BR))
    return kernels.to(tl.float32) * repeated


@triton.jit(do_not_specialize=SIZES)
def conv_forward(
    x, kernel, mixing, scales, out,
    x_n, x_c, x_y, x_x, out_n, out_c, out_y, out_x,
    c1, c2, height, width, out_height, out_width, groups, r, taps, taps_x,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    BP: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of positions and output channels of one sample."""
    positions = out_height * out_width
    blocks_o, blocks_p = tl.cdiv(c2, BO), tl.cdiv(positions, BP)
    block_o = tl.program_id(0) % blocks_o
    block_p, n = tl.program_id(0) // blocks_o % blocks_p, (tl.program_id(0) // blocks_o // blocks_p).to(tl.int64)
    o, p = block_o * BO + tl.arange(0, BO), block_p * BP + tl.arange(0, BP)
    o_inside, p_inside = o < c2, p < positions
    y, column = p // out_width, p % out_width
    top, left = y * stride_y - padding_y, column * stride_x - padding_x  # of the tap at 0, 0
    x, scales = x + n * x_n + top.to(tl.int64) * x_y + left * x_x, scales + n * taps * groups
    kernel += o.to(tl.int64) * taps * c1

    sums = tl.zeros((BP, BO), tl.float32)
    parts = tl.cdiv(r, BR)
    blocks = tl.cdiv(groups, BG) * parts
    for i in range(taps * blocks):  # one loop, not three: loads are pipelined in the innermost one only
        t, group, first = i // blocks, i % blocks // parts * BG, i % blocks % parts * BR
        down, right = t // taps_x * dilation_y, t % taps_x * dilation_x
        in_y, in_x = top + down, left + right
        inside = p_inside & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        factors, _, _ = _factors(mixing, scales + t * groups, o, o_inside, group, groups, BG)
        c, c_inside = _channels(group, first, groups, r, BG, BR)
        places = x[:, None] + (down * x_y + right * x_x + c * x_c)[None, :]
        seen = tl.load(places, mask=inside[:, None] & c_inside[None, :], other=0.0)
        places = kernel[:, None] + (t * c1 + c)[None, :]
        kernels = tl.load(places, mask=o_inside[:, None] & c_inside[None, :], other=0.0)
        formed = _formed(kernels, factors, BG, BR).to(seen.dtype)
        sums = product(seen, tl.trans(formed), PRECISION, sums)
    places = n * out_n + y[:, None] * out_y + column[:, None] * out_x + o[None, :].to(tl.int64) * out_c
    tl.store(out + places, sums.to(out.dtype.element_ty), mask=p_inside[:, None] & o_inside[None, :])


@triton.jit(do_not_specialize=SIZES)
def maps_backward(
    d_out, kernel, mixing, scales, d_x,
    d_out_n, d_out_c, d_out_y, d_out_x, x_n, x_c, x_y, x_x,
    c1, c2, height, width, out_height, out_width, groups, r, taps, taps_x,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    BP: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of positions and input channels of one sample of x."""
    positions = height * width
    parts = tl.cdiv(r, BR)
    blocks_c, blocks_p = tl.cdiv(groups, BG) * parts, tl.cdiv(positions, BP)
    block_c = tl.program_id(0) % blocks_c
    block_p, n = tl.program_id(0) // blocks_c % blocks_p, (tl.program_id(0) // blocks_c // blocks_p).to(tl.int64)
    group = block_c // parts * BG
    c, c_inside = _channels(group, block_c % parts * BR, groups, r, BG, BR)
    p = block_p * BP + tl.arange(0, BP)
    p_inside = p < positions
    y, column = p // width, p % width
    d_out, scales = d_out + n * d_out_n, scales + n * taps * groups

    sums = tl.zeros((BP, BG * BR), tl.float32)
    for t in range(taps):
        from_y, from_x = y + padding_y - t // taps_x * dilation_y, column + padding_x - t % taps_x * dilation_x
        to_y, to_x = from_y // stride_y, from_x // stride_x
        inside = p_inside & (from_y >= 0) & (from_x >= 0) & (to_y < out_height) & (to_x < out_width)
        inside &= (from_y % stride_y == 0) & (from_x % stride_x == 0)
        at = to_y.to(tl.int64) * d_out_y + to_x * d_out_x
        for first in range(0, c2, BO):
            o = first + tl.arange(0, BO)
            o_inside = o < c2
            factors, _, _ = _factors(mixing, scales + t * groups, o, o_inside, group, groups, BG)
            places = (o[:, None].to(tl.int64) * taps + t) * c1 + c[None, :]
            kernels = tl.load(kernel + places, mask=o_inside[:, None] & c_inside[None, :], other=0.0)
            mask = inside[:, None] & o_inside[None, :]
            grads = tl.load(d_out + at[:, None] + o[None, :] * d_out_c, mask=mask, other=0.0)
            sums = product(grads, _formed(kernels, factors, BG, BR).to(grads.dtype), PRECISION, sums)
    places = n * x_n + y[:, None] * x_y + column[:, None] * x_x + c[None, :].to(tl.int64) * x_c
    tl.store(d_x + places, sums.to(d_x.dtype.element_ty), mask=p_inside[:, None] & c_inside[None, :])


@triton.jit(do_not_specialize=[*SIZES, "batch", "samples"])
def kernel_backward(
    d_out, x, kernel, mixing, scales, d_kernel, d_mixing, d_scales,
    d_out_n, d_out_c, d_out_y, d_out_x, x_n, x_c, x_y, x_x,
    batch, c1, c2, height, width, out_height, out_width, groups, r, taps, taps_x,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, samples,
    BP: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of one tap of K, over `samples` samples.

    Results, all float32: d_kernel (splits, C2, T, C1) of some samples each; d_mixing (splits, T, parts, C2, G) and
    d_scales (blocks of outputs, parts, N, T, G), where the BR channels of a block are one of a group's `parts`.
    """
    positions = out_height * out_width
    parts, blocks_o = tl.cdiv(r, BR), tl.cdiv(c2, BO)
    blocks_c = tl.cdiv(groups, BG) * parts
    block_c, rest = tl.program_id(0) % blocks_c, tl.program_id(0) // blocks_c
    block_o, rest = rest % blocks_o, rest // blocks_o
    t, split = rest % taps, (rest // taps).to(tl.int64)
    part, group = block_c % parts, block_c // parts * BG
    c, c_inside = _channels(group, part * BR, groups, r, BG, BR)
    o = block_o * BO + tl.arange(0, BO)
    o_inside = o < c2
    g = group + tl.arange(0, BG)
    in_kernel = (o[:, None].to(tl.int64) * taps + t) * c1 + c[None, :]
    mask = o_inside[:, None] & c_inside[None, :]
    kernels = tl.load(kernel + in_kernel, mask=mask, other=0.0).to(tl.float32)

    of_kernel = tl.zeros((BO, BG * BR), tl.float32)
    of_mixing = tl.zeros((BO, BG), tl.float32)
    for n in range(split * samples, tl.minimum((split + 1) * samples, batch)):
        of_sample = tl.zeros((BO, BG * BR), tl.float32)
        x_of_sample, d_out_of_sample = x + n * x_n, d_out + n * d_out_n
        for first in range(0, positions, BP):
            p = first + tl.arange(0, BP)
            y, column = p // out_width, p % out_width
            in_y = y * stride_y + t // taps_x * dilation_y - padding_y
            in_x = column * stride_x + t % taps_x * dilation_x - padding_x
            p_inside = p < positions
            inside = p_inside & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
            places = (in_y * x_y + in_x * x_x)[:, None] + c[None, :] * x_c
            seen = tl.load(x_of_sample + places, mask=inside[:, None] & c_inside[None, :], other=0.0)
            places = (y * d_out_y + column * d_out_x)[:, None] + o[None, :] * d_out_c
            grads = tl.load(d_out_of_sample + places, mask=p_inside[:, None] & o_inside[None, :], other=0.0)
            of_sample = product(tl.trans(grads), seen, PRECISION, of_sample)
        at_scales = (n * taps + t) * groups
        factors, by_output, by_group = _factors(mixing, scales + at_scales, o, o_inside, group, groups, BG)
        of_kernel += _formed(of_sample, factors, BG, BR)
        of_factors = tl.sum(tl.reshape(of_sample * kernels, (BO, BG, BR)), 2)
        of_mixing += of_factors * by_group[None, :]
        of_scales = tl.sum(of_factors * by_output, 0)
        at_scales += (block_o * parts + part).to(tl.int64) * batch * taps * groups
        tl.store(d_scales + at_scales + g, of_scales, mask=g < groups)
    tl.store(d_kernel + split * c2 * taps * c1 + in_kernel, of_kernel, mask=mask)
    in_mixing = (((split * taps + t) * parts + part) * c2 + o[:, None]) * groups + g[None, :]
    tl.store(d_mixing + in_mixing, of_mixing, mask=o_inside[:, None] & (g < groups)[None, :])
