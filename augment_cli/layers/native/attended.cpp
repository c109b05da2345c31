// AW's convolution, O[n] = conv(I[n], K_n) with K_n[c2, c1, t] = K[c2, c1, t] (1 + s[g, c2] A2[n, g, t]), g = c1 // r,
// forward and backward. No K_n is ever stored: a vector of K is multiplied by its factor when it is loaded, for at most
// TILE positions, or output channels, whose sums stay in registers.
//
// Lanes are output channels in the forward pass and input channels in the backward pass; both come in pairs of vectors,
// so that C1 and C2 are multiples of PAIR, and r of LANES. Maps are dense and channels first.
#include "vector.h"
#include <algorithm>
#include <cstring>
#include <omp.h>

namespace {

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

template <int P> using Sums = vec[P][2];

// sums[j] += numbers[j] * (a, b)
template <int P> inline __attribute__((always_inline)) void add_products(Sums<P> &sums, const float *numbers, vec a, vec b) {
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) {
        vec one = all(numbers[j]);
        sums[j][0] = fused(one, a, sums[j][0]), sums[j][1] = fused(one, b, sums[j][1]);
    }
}

// ---- forward

// K (C2, C1, taps) to [C2 / PAIR][C1][taps][PAIR]: some output channels and LANES of C1 taps.
void pack_for_outputs(const Conv &s, const float *kernel, int panel, long at, float *packed) {
    long depth = (long)s.c1 * s.taps();
    for (int half = 0; half < PAIR; half += LANES) {
        vec rows[LANES];
        for (int l = 0; l < LANES; ++l) rows[l] = load(kernel + (panel * PAIR + half + l) * depth + at);
        transpose(rows);
        for (int l = 0; l < LANES; ++l) store(packed + (panel * depth + at + l) * PAIR + half, rows[l]);
    }
}

// Rows of one channel from `top` on, with zeros around, every stride_x-th column side by side, so that neighbouring
// positions read neighbours. What is zero stays zero from channel to channel.
void copy_rows(const Conv &s, const float *channel, int top, int rows, int phase_width, float *map) {
    int stop = std::min(s.width + s.padding_x, s.padded_width()), row_width = phase_width * s.stride_x;
    if (stop <= s.padding_x) return;
    for (int row = std::max(0, s.padding_y - top); row < rows && top + row < s.height + s.padding_y; ++row) {
        float *to = map + row * row_width;
        const float *from = channel + (top + row - s.padding_y) * s.width - s.padding_x;
        if (s.stride_x == 1)
            std::memcpy(to + s.padding_x, from + s.padding_x, sizeof(float) * (stop - s.padding_x));
        else
            for (int i = s.padding_x; i < stop; ++i) to[i % s.stride_x * phase_width + i / s.stride_x] = from[i];
    }
}

// Tiles [first, last) of the positions of a sample, and where what they see of some channels is unfolded: of each tile
// [channels][taps][its positions], and room for a vector that was not full.
struct Part {
    const Conv &s;
    int first, last, channels;
    float *unfolded, *map;

    int begin() const { return s.tile_start(first); }
    float *of_tile(int tile) const {
        return unfolded + (long)(s.tile_start(tile) - begin()) * channels * s.taps() + (tile - first) * LANES;
    }
    static long map_size(const Conv &s) { return (long)s.padded_height() * (s.padded_width() + s.stride_x) + LANES; }

    void unfold(const float *x, int channel, int count) {
        int end = s.tile_start(last), taps = s.taps(), top = begin() / s.out_width * s.stride_y;
        int rows = ((end - 1) / s.out_width - begin() / s.out_width) * s.stride_y + s.tap_y(taps - 1) + 1;
        int phase_width = (s.padded_width() + s.stride_x - 1) / s.stride_x, row_width = phase_width * s.stride_x;
        int line = s.stride_y * row_width, taps_at[MOST_TAPS];
        for (int t = 0; t < taps; ++t)
            taps_at[t] = s.tap_y(t) * row_width + s.tap_x(t) % s.stride_x * phase_width + s.tap_x(t) / s.stride_x;
        std::memset(map, 0, sizeof(float) * map_size(s));
        for (int c = 0; c < count; ++c) {
            copy_rows(s, x + (long)(channel + c) * s.height * s.width, top, rows, phase_width, map);
            for (int tile = first; tile < last; ++tile) {
                int start = s.tile_start(tile), stop = s.tile_start(tile + 1);
                float *to = of_tile(tile) + (long)c * taps * (stop - start);
                int y = start / s.out_width, column = start % s.out_width, first_run = std::min(stop - start, s.out_width - column);
                const float *line_start = map + y * line - top * row_width;
                for (int t = 0; t < taps; ++t) {
                    const float *from = line_start + taps_at[t];
                    int run = first_run, left = stop - start;
                    store(to, load(from + column));  // of a tile, so at most a vector; what is too much is written over
                    for (to += run, left -= run; left > 0; to += run, left -= run) {
                        from += line, run = std::min(left, s.out_width);
                        store(to, load(from));
                    }
                }
            }
        }
    }
};

// Adds some groups' channels to P positions of PAIR output channels, block (P, PAIR).
template <int P>
void add_groups(const Conv &s, const float *kernel, const float *unfolded, const float *mixing, const float *scales,
                int groups, float *block) {
    Sums<P> sums;
    float factors[MOST_TAPS * PAIR];
    for (int j = 0; j < P; ++j) sums[j][0] = load(block + j * PAIR), sums[j][1] = load(block + j * PAIR + LANES);
    for (int g = 0; g < groups; ++g, mixing += s.c2) {
        for (int t = 0; t < s.taps(); ++t) {
            vec scale = all(*scales++);
            store(factors + t * PAIR, fused(scale, load(mixing), all(1.f)));
            store(factors + t * PAIR + LANES, fused(scale, load(mixing + LANES), all(1.f)));
        }
        for (int i = 0; i < s.r; ++i)
            for (int t = 0; t < s.taps(); ++t, kernel += PAIR, unfolded += P)
                add_products<P>(sums, unfolded, load(kernel) * load(factors + t * PAIR),
                                load(kernel + LANES) * load(factors + t * PAIR + LANES));
    }
    for (int j = 0; j < P; ++j) store(block + j * PAIR, sums[j][0]), store(block + j * PAIR + LANES, sums[j][1]);
}

// ---- backward

// K (C2, C1, taps) to [C1 / PAIR][taps][C2][PAIR], and back: some input channels.
template <class F> void each_for_inputs(const Conv &s, int panel, F f) {  // f(place in K, place in packed K)
    int taps = s.taps();
    for (int o = 0; o < s.c2; ++o)
        for (int l = 0; l < PAIR; ++l)
            for (int t = 0; t < taps; ++t)
                f(((long)o * s.c1 + panel * PAIR + l) * taps + t, (((long)panel * taps + t) * s.c2 + o) * PAIR + l);
}

// A sample's channels, PAIR of them, with zeros around: [padded height][padded width][PAIR].
void pad(const Conv &s, const float *x, float *padded) {
    std::memset(padded, 0, sizeof(float) * s.padded() * PAIR);
    for (int c = 0; c < PAIR; ++c)
        for (int y = 0; y < s.height && y + s.padding_y < s.padded_height(); ++y)
            for (int i = 0; i < s.width && i + s.padding_x < s.padded_width(); ++i)
                padded[((y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] =
                    x[((long)c * s.height + y) * s.width + i];
}

void unpad(const Conv &s, const float *padded, float *x) {
    for (int c = 0; c < PAIR; ++c)
        for (int y = 0; y < s.height; ++y)
            for (int i = 0; i < s.width; ++i) {
                bool seen = y + s.padding_y < s.padded_height() && i + s.padding_x < s.padded_width();
                x[((long)c * s.height + y) * s.width + i] =
                    seen ? padded[((y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] : 0.f;
            }
}

// Gradients of the padded inputs at tap t of P positions from `start` on: adds K_n^T d_out. d_out [C2][P].
template <int P>
void inputs_of_positions(const Conv &s, const float *kernel, const float *factors, const float *d_out, int t, int start,
                         float *d_padded) {
    Sums<P> sums;
    for (auto &pair : sums) pair[0] = pair[1] = all(0.f);
    for (int o = 0; o < s.c2; ++o, kernel += PAIR, d_out += P)
        add_products<P>(sums, d_out, load(kernel) * all(factors[o]), load(kernel + LANES) * all(factors[s.c2 + o]));
    for (int j = 0; j < P; ++j) {
        int y = (start + j) / s.out_width * s.stride_y + s.tap_y(t), x = (start + j) % s.out_width * s.stride_x + s.tap_x(t);
        float *to = d_padded + (long)(y * s.padded_width() + x) * PAIR;
        store(to, load(to) + sums[j][0]), store(to + LANES, load(to + LANES) + sums[j][1]);
    }
}

// Gradients of the kernels of P output channels at tap t, for one sample, and what they give. d_out [positions][P].
template <int P>
void kernels_of_outputs(const Conv &s, const float *padded, const float *d_out, int t, const float *kernel,
                        const float *factors, const float *const (&mixing)[2], const float *scales, float *d_kernel, float *d_mixing,
                        vec (&d_scales)[2]) {
    Sums<P> sums;
    for (auto &pair : sums) pair[0] = pair[1] = all(0.f);
    const float *row = padded + (long)(s.tap_y(t) * s.padded_width() + s.tap_x(t)) * PAIR;
    for (int y = 0; y < s.out_height; ++y, row += (long)s.stride_y * s.padded_width() * PAIR) {
        const float *from = row;
        for (int x = 0; x < s.out_width; ++x, from += s.stride_x * PAIR, d_out += P)
            add_products<P>(sums, d_out, load(from), load(from + LANES));
    }
    for (int half = 0; half < 2; ++half) {
        vec scale = all(scales[half]), total = d_scales[half];
        for (int j = 0; j < P; ++j) {
            int at = j * PAIR + half * LANES;
            vec product = sums[j][half] * load(kernel + at);
            total = fused(all(mixing[half][j]), product, total);
            store(d_mixing + at, fused(scale, product, load(d_mixing + at)));
            store(d_kernel + at, fused(all(factors[half * s.c2 + j]), sums[j][half], load(d_kernel + at)));
        }
        d_scales[half] = total;
    }
}

// How the forward pass is cut: what a thread unfolds and the sums that it keeps stay in its second-level cache.
struct ForwardPlan {
    int together, at_once;  // tiles of positions; groups of channels
    long packed, sums, unfolded, each;

    ForwardPlan(const Conv &s, int threads) {
        constexpr int FITTING = 1 << 16;
        int tiles = s.tiles(), of_group = s.r * s.taps() * TILE;
        int shared = std::max(1, (s.batch * tiles + threads - 1) / threads);
        together = std::max(1, std::min({tiles, shared, FITTING / (s.c2 * TILE), FITTING / of_group}));
        together = tiles / ((tiles + together - 1) / together) + 1;  // of even parts
        at_once = std::max(1, std::min(s.groups(), FITTING / (together * of_group)));
        packed = (long)s.c1 * s.c2 * s.taps(), sums = (long)together * TILE * s.c2;
        unfolded = (long)together * (of_group * at_once + LANES);
        each = sums + unfolded + Part::map_size(s);
    }
};

// How the backward pass is cut: samples at a time, whose padded inputs and gradients are held.
struct BackwardPlan {
    int together;
    long kernel, mixing, padded, of_out, panels, each;

    explicit BackwardPlan(const Conv &s) {
        constexpr long FITTING = 1000000;
        panels = s.c1 / PAIR, padded = (long)s.padded() * PAIR, of_out = (long)s.c2 * s.positions();
        together = (int)std::max(1L, std::min((long)s.batch, FITTING / (panels * padded + 2 * of_out)));
        kernel = (long)s.c1 * s.c2 * s.taps(), mixing = (long)s.taps() * s.groups() * s.c2;
        each = padded + (long)s.c2 * (2 + PAIR);
    }
};

Conv conv_of(const int *numbers) {
    Conv s;
    std::memcpy(&s, numbers, sizeof s);
    return s;
}

}  // namespace

// Floats of scratch memory that a call needs. `numbers`: the members of Conv.
EXPORT long attended_scratch(const int *numbers, int backward, int threads) {
    Conv s = conv_of(numbers);
    if (!backward) {
        ForwardPlan plan(s, threads);
        return plan.packed + threads * plan.each;
    }
    BackwardPlan plan(s);
    return 2 * plan.kernel + plan.mixing + plan.together * (plan.panels * plan.padded + 2 * plan.of_out) + threads * plan.each;
}

// x (N, C1, H, W), kernel (C2, C1, h, w), mixing (C1/r, C2), scales (N, C1/r, h w); out (N, C2, H', W').
EXPORT void attended_forward(const int *numbers, const float *x, const float *kernel, const float *mixing,
                             const float *scales, float *out, float *scratch, int threads) {
    const Conv s = conv_of(numbers);
    const ForwardPlan plan(s, threads);
    int panels = s.c2 / PAIR, tiles = s.tiles(), parts = (tiles + plan.together - 1) / plan.together;
    long depth = (long)s.c1 * s.taps();
    float *packed = scratch;
#pragma omp parallel num_threads(threads)
    {
        float *sums = scratch + plan.packed + plan.each * omp_get_thread_num(), *unfolded = sums + plan.sums;
        float *map = unfolded + plan.unfolded;
#pragma omp for collapse(2) schedule(static)
        for (int panel = 0; panel < panels; ++panel)
            for (long at = 0; at < depth; at += LANES) pack_for_outputs(s, kernel, panel, at, packed);
#pragma omp for collapse(2) schedule(static)
        for (int n = 0; n < s.batch; ++n)
            for (int i = 0; i < parts; ++i) {
                int first = (long)i * tiles / parts, last = (long)(i + 1) * tiles / parts;
                Part part{s, first, last, plan.at_once * s.r, unfolded, map};
                int begin = part.begin(), count = s.tile_start(last) - begin;
                std::memset(sums, 0, sizeof(float) * count * s.c2);
                for (int g = 0; g < s.groups(); g += plan.at_once) {
                    int groups = std::min(plan.at_once, s.groups() - g);
                    const float *of_sample = scales + ((long)n * s.groups() + g) * s.taps();
                    part.unfold(x + (long)n * s.c1 * s.height * s.width, g * s.r, groups * s.r);
                    for (int panel = 0; panel < panels; ++panel)
                        for (int tile = first; tile < last; ++tile) {
                            const float *rows = packed + (panel * depth + (long)g * s.r * s.taps()) * PAIR;
                            int start = s.tile_start(tile);
                            float *block = sums + ((long)panel * count + start - begin) * PAIR;
                            with_constant<TILE>(s.tile_start(tile + 1) - start, [&](auto width) {
                                add_groups<decltype(width)::value>(s, rows, part.of_tile(tile),
                                                                   mixing + (long)g * s.c2 + panel * PAIR, of_sample,
                                                                   groups, block);
                            });
                        }
                }
                for (int o = 0; o < s.c2; ++o) {
                    float *to = out + ((long)n * s.c2 + o) * s.positions() + begin;
                    const float *from = sums + (long)(o / PAIR) * count * PAIR + o % PAIR;
                    for (int p = 0; p < count; ++p) to[p] = from[(long)p * PAIR];
                }
            }
    }
}

// Writes dx unless it is null, and, unless they are null, d_kernel, d_mixing and d_scales; shapes as of what they are of.
EXPORT void attended_backward(const int *numbers, const float *x, const float *kernel, const float *mixing,
                              const float *scales, const float *d_out, float *dx, float *d_kernel, float *d_mixing,
                              float *d_scales, float *scratch, int threads) {
    const Conv s = conv_of(numbers);
    const BackwardPlan plan(s);
    const int panels = plan.panels, taps = s.taps(), groups = s.groups(), positions = s.positions();
    const int tiles = s.tiles(), output_tiles = (s.c2 + TILE - 1) / TILE;
    const long of_tap = (long)s.c2 * PAIR, map = (long)s.height * s.width;
    auto output_start = [&](int tile) { return (int)((long)tile * s.c2 / output_tiles); };
    auto group = [&](int panel, int half) { return (panel * PAIR + half * LANES) / s.r; };
    float *packed = scratch, *d_packed = packed + plan.kernel, *d_mixed = d_packed + plan.kernel;
    float *padded = d_mixed + plan.mixing, *by_position = padded + plan.together * panels * plan.padded;
    float *by_output = by_position + plan.together * plan.of_out, *of_threads = by_output + plan.together * plan.of_out;
    if (d_kernel) {
        std::memset(d_packed, 0, sizeof(float) * (plan.kernel + plan.mixing));  // and d_mixed behind it
        std::memset(d_scales, 0, sizeof(float) * s.batch * groups * taps);
    }
#pragma omp parallel num_threads(threads)
    {
        float *d_padded = of_threads + plan.each * omp_get_thread_num();
        float *factors = d_padded + plan.padded, *d_mixing_lanes = factors + 2 * s.c2;
        auto make_factors = [&](int n, int panel, int t) {
            for (int half = 0; half < 2; ++half) {
                int g = group(panel, half);
                vec scale = all(scales[((long)n * groups + g) * taps + t]);
                for (int o = 0; o < s.c2; o += LANES)
                    store(factors + half * s.c2 + o, fused(scale, load(mixing + (long)g * s.c2 + o), all(1.f)));
            }
        };
#pragma omp for schedule(static)
        for (int panel = 0; panel < panels; ++panel)
            each_for_inputs(s, panel, [&](long i, long j) { packed[j] = kernel[i]; });
        for (int chunk = 0; chunk < s.batch; chunk += plan.together) {
            int samples = std::min(plan.together, s.batch - chunk);
            const float *d_chunk = d_out + chunk * plan.of_out;
            if (d_kernel) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int n = 0; n < samples; ++n)
                    for (int panel = 0; panel < panels; ++panel)
                        pad(s, x + ((long)(chunk + n) * s.c1 + panel * PAIR) * map, padded + (n * plan.panels + panel) * plan.padded);
#pragma omp for collapse(2) schedule(static) nowait
                for (int n = 0; n < samples; ++n)
                    for (int tile = 0; tile < output_tiles; ++tile) {
                        int start = output_start(tile), width = output_start(tile + 1) - start;
                        const float *from = d_chunk + n * plan.of_out + (long)start * positions;
                        float *to = by_output + n * plan.of_out + (long)start * positions;
                        for (int p = 0; p < positions; ++p)
                            for (int j = 0; j < width; ++j) *to++ = from[(long)j * positions + p];
                    }
            }
            if (dx) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int n = 0; n < samples; ++n)
                    for (int tile = 0; tile < tiles; ++tile) {
                        int start = s.tile_start(tile), width = s.tile_start(tile + 1) - start;
                        const float *from = d_chunk + n * plan.of_out + start;
                        float *to = by_position + n * plan.of_out + (long)start * s.c2;
                        for (int o = 0; o < s.c2; ++o, from += positions)
                            for (int j = 0; j < width; ++j) *to++ = from[j];
                    }
            }
#pragma omp barrier
            if (dx) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int n = 0; n < samples; ++n) {
                        std::memset(d_padded, 0, sizeof(float) * plan.padded);
                        for (int t = 0; t < taps; ++t) {
                            const float *of_kernel = packed + ((long)panel * taps + t) * of_tap;
                            make_factors(chunk + n, panel, t);
                            for (int tile = 0; tile < tiles; ++tile) {
                                int start = s.tile_start(tile);
                                const float *d_tile = by_position + n * plan.of_out + (long)start * s.c2;
                                with_constant<TILE>(s.tile_start(tile + 1) - start, [&](auto width) {
                                    inputs_of_positions<decltype(width)::value>(s, of_kernel, factors, d_tile, t, start, d_padded);
                                });
                            }
                        }
                        unpad(s, d_padded, dx + ((long)(chunk + n) * s.c1 + panel * PAIR) * map);
                    }
            }
            if (d_kernel) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int t = 0; t < taps; ++t) {
                        const long at = ((long)panel * taps + t) * of_tap;
                        const int of_half[2] = {group(panel, 0), group(panel, 1)};
                        std::memset(d_mixing_lanes, 0, sizeof(float) * of_tap);
                        for (int n = 0; n < samples; ++n) {
                            const long sample = (long)(chunk + n) * groups;
                            const float both[2] = {scales[(sample + of_half[0]) * taps + t], scales[(sample + of_half[1]) * taps + t]};
                            vec totals[2] = {all(0.f), all(0.f)};
                            make_factors(chunk + n, panel, t);
                            for (int tile = 0; tile < output_tiles; ++tile) {
                                const long o = output_start(tile);
                                const float *const mixings[2] = {mixing + of_half[0] * s.c2 + o, mixing + of_half[1] * s.c2 + o};
                                with_constant<TILE>(output_start(tile + 1) - o, [&](auto width) {
                                    kernels_of_outputs<decltype(width)::value>(
                                        s, padded + (n * plan.panels + panel) * plan.padded,
                                        by_output + n * plan.of_out + o * positions, t, packed + at + o * PAIR, factors + o,
                                        mixings, both, d_packed + at + o * PAIR, d_mixing_lanes + o * PAIR, totals);
                                });
                            }
                            for (int half = 0; half < 2; ++half)
                                d_scales[(sample + of_half[half]) * taps + t] += sum(totals[half]);
                        }
                        for (int half = 0; half < 2; ++half)
                            for (int o = 0; o < s.c2; ++o)
                                d_mixed[((long)t * groups + of_half[half]) * s.c2 + o] +=
                                    sum(load(d_mixing_lanes + o * PAIR + half * LANES));
                    }
            }
#pragma omp barrier
        }
        if (d_kernel) {
#pragma omp for schedule(static)
            for (int panel = 0; panel < panels; ++panel)
                each_for_inputs(s, panel, [&](long i, long j) { d_kernel[i] = d_packed[j]; });
#pragma omp for schedule(static)
            for (int i = 0; i < groups * s.c2; ++i) {
                d_mixing[i] = 0;
                for (int t = 0; t < taps; ++t) d_mixing[i] += d_mixed[(long)t * groups * s.c2 + i];
            }
        }
    }
}
