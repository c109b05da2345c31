// AW's convolution, O[n] = conv(I[n], K_n) with K_n[c2, c1, t] = K[c2, c1, t] (1 + s[g, c2] A2[n, g, t]), g = c1 // r,
// forward and backward. No K_n is ever stored: a vector of K is multiplied by its factor when it is loaded, for at most
// TILE positions, or output channels, whose sums stay in registers.
//
// Lanes are output channels in the forward pass and input channels in the backward pass; both come in pairs of vectors,
// so that C1 and C2 are multiples of PAIR, and r of LANES. Maps are dense and channels first.
#pragma once
#include <algorithm>
#include <cstring>

#include "vector.h"

namespace {

// A call's numbers, as augment_cli/layers/native/attended.py declares them.
struct Conv {
    int batch, c1, c2, height, width, r, kernel_height, kernel_width;
    int stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, out_height, out_width;

    int groups() const { return c1 / r; }
    int taps() const { return kernel_height * kernel_width; }
    int positions() const { return out_height * out_width; }
    int padded_height() const { return (out_height - 1) * stride_y + (kernel_height - 1) * dilation_y + 1; }
    int padded_width() const { return (out_width - 1) * stride_x + (kernel_width - 1) * dilation_x + 1; }
    int padded() const { return padded_height() * padded_width(); }
    int tiles() const { return (positions() + TILE - 1) / TILE; }
    int tile_start(int tile) const { return (long)tile * positions() / tiles(); }
    int tap_y(int t) const { return t / kernel_width * dilation_y; }
    int tap_x(int t) const { return t % kernel_width * dilation_x; }
};

constexpr int MOST_TAPS = 49;  // of a kernel

}  // namespace
