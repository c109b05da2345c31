// AW's convolution, forward and backward:
//
//   out[n] = conv(x[n], K_n),   K_n[o, c, t] = K[o, c, t] (1 + mixing[g, o] scales[n, g, t]),   g = c / r
//
// for N samples, C1 input and C2 output channels, maps of H x W, results of H' x W' = P positions, kernels of T = h w
// taps, and G = C1 / r groups of input channels. attended_reference.cpp has the same in plain loops.
//
// - No K_n is ever stored: a vector of K is multiplied by its factors when it is loaded, for up to TILE positions, or
//   output channels, whose sums stay in registers.
// - Lanes are output channels in the forward pass, and input channels in the backward pass. A panel is PAIR of them,
// two
//   vectors, so C1 and C2 must be multiples of PAIR, and r of LANES.
// - Maps are dense and channels first.
#pragma once
#include <algorithm>
#include <cstring>

#include "vector.h"

namespace {

// Numbers of a call, as augment_cli/layers/native/attended.py declares them.
struct Conv {
    int batch, c1, c2, height, width, r, kernel_height, kernel_width;
    int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, out_height, out_width;

    int groups() const { return c1 / r; }
    int taps() const { return kernel_height * kernel_width; }
    int positions() const { return out_height * out_width; }
    int padded_height() const { return (out_height - 1) * stride_y + (kernel_height - 1) * dilation_y + 1; }
    int padded_width() const { return (out_width - 1) * stride_x + (kernel_width - 1) * dilation_x + 1; }
    int padded() const { return padded_height() * padded_width(); }
    // Output positions are cut into tiles of nearly equal size, at most TILE.
    int tiles() const { return (positions() + TILE - 1) / TILE; }
    int tile_start(int tile) const { return (long)tile * positions() / tiles(); }
    // Where tap t reads, in the padded input, from the position of tap 0.
    int tap_y(int t) const { return t / kernel_width * dilation_y; }
    int tap_x(int t) const { return t % kernel_width * dilation_x; }
};

constexpr int MOST_TAPS = 49;  // of a kernel, for arrays on the stack: 7 x 7

}  // namespace
