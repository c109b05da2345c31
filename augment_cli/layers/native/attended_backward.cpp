// AW's convolution, as attended.h describes it: the backward pass.
//
// Per sample n, tap t and position p, with x_t (C1, P) for the padded input as tap t sees it:
//
//   dx_t[c, p]    += sum_o K_n[o, c, t] d_out[o, p]
//   d_K_n[o, c, t] = sum_p d_out[o, p] x_t[c, p]
//
// and from d_K_n, which is formed in registers and never stored, with f = 1 + mixing scales:
//
//   d_kernel += f d_K_n,   d_mixing[g, o] += scales K d_K_n,   d_scales[n, g, t] += mixing K d_K_n
#include "attended.h"

#include <omp.h>

namespace {

// Pair the places of one panel's numbers in K (C2, C1, T) and in packed K [C1 / PAIR][T][C2][PAIR]: calls
// f(place in K, place in packed K).
template <class F>
void each_for_inputs(const Conv &s, int panel, F f) {
    int taps = s.taps();
    for (int o = 0; o < s.c2; ++o)
        for (int l = 0; l < PAIR; ++l)
            for (int t = 0; t < taps; ++t)
                f(((long)o * s.c1 + panel * PAIR + l) * taps + t, (((long)panel * taps + t) * s.c2 + o) * PAIR + l);
}

// Copy one panel of a sample with zeros around: x (PAIR, H, W) to padded [padded height][padded width][PAIR].
void pad(const Conv &s, const float *x, float *padded) {
    std::memset(padded, 0, sizeof(float) * s.padded() * PAIR);
    for (int c = 0; c < PAIR; ++c)
        for (int y = 0; y < s.height && y + s.padding_y < s.padded_height(); ++y)
            for (int i = 0; i < s.width && i + s.padding_x < s.padded_width(); ++i)
                padded[((long)(y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] =
                    x[((long)c * s.height + y) * s.width + i];
}

// Inverse of `pad`: padded [padded height][padded width][PAIR] to x (PAIR, H, W); zeros where no window reads.
void unpad(const Conv &s, const float *padded, float *x) {
    for (int c = 0; c < PAIR; ++c)
        for (int y = 0; y < s.height; ++y)
            for (int i = 0; i < s.width; ++i) {
                bool seen = y + s.padding_y < s.padded_height() && i + s.padding_x < s.padded_width();
                x[((long)c * s.height + y) * s.width + i] =
                    seen ? padded[((long)(y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] : 0.f;
            }
}

// Gradient of one panel's input through tap t, for P positions from `start` on: adds K_n^T d_out to d_padded [padded
// height][padded width][PAIR]. kernel [C2][PAIR], factors [2][C2], one row for each vector of the panel; d_out [C2][P]
template <int P>
void inputs_of_positions(const Conv &s, const float *kernel, const float *factors, const float *d_out, int t, int start,
                         float *d_padded) {
    Tile<P> sums;
    sums.fill(all(0.f), all(0.f));
    for (int o = 0; o < s.c2; ++o, kernel += PAIR, d_out += P)
        sums.add_products(d_out, load(kernel) * all(factors[o]), load(kernel + LANES) * all(factors[s.c2 + o]));
    for (int j = 0; j < P; ++j) {
        int y = (start + j) / s.out_width * s.stride_y + s.tap_y(t);
        int x = (start + j) % s.out_width * s.stride_x + s.tap_x(t);
        float *to = d_padded + (long)(y * s.padded_width() + x) * PAIR;
        store(to, load(to) + sums.at[j][0]), store(to + LANES, load(to + LANES) + sums.at[j][1]);
    }
}

// Gradient of K_n at tap t for one panel and P output channels: x_t^T d_out to sums [P][PAIR].
// padded [padded height][padded width][PAIR], d_out [positions][P]
template <int P>
void kernels_of_outputs(const Conv &s, const float *padded, const float *d_out, int t, Tile<P> &sums) {
    const float *row = padded + (long)(s.tap_y(t) * s.padded_width() + s.tap_x(t)) * PAIR;
    sums.fill(all(0.f), all(0.f));
    for (int y = 0; y < s.out_height; ++y, row += (long)s.stride_y * s.padded_width() * PAIR) {
        const float *from = row;
        for (int x = 0; x < s.out_width; ++x, from += s.stride_x * PAIR, d_out += P)
            sums.add_products(d_out, load(from), load(from + LANES));
    }
}

// Inputs, scratch memory and passes of one backward call. The pieces of a pass may run in parallel. Samples are taken
// some at a time (`together`), and each has a slot for its padded input and its d_out.
struct Backward {
    const Conv s;
    const float *x, *kernel, *mixing, *scales, *d_out;
    int together, panels = s.c1 / PAIR, output_tiles = (s.c2 + TILE - 1) / TILE;
    long of_padded = (long)s.padded() * PAIR, of_out = (long)s.c2 * s.positions(), of_tap = (long)s.c2 * PAIR;
    long of_kernel = (long)s.c1 * s.c2 * s.taps(), of_mixing = (long)s.taps() * s.groups() * s.c2;
    float *packed, *d_packed;        // [C1 / PAIR][T][C2][PAIR]
    float *d_mixed;                  // [T][G][C2]: gradient of mixing at each tap
    float *padded;                   // [slots][C1 / PAIR][padded height][padded width][PAIR]
    float *by_position, *by_output;  // [slots]: d_out, for each tile of positions [C2][its positions], and for each
                                     // tile of output channels [P][its channels]
    float *of_threads;               // each thread: d_padded, factors [2][C2], d_mixing [C2][PAIR]
    long each = of_padded + s.c2 * (2 + PAIR), taken = 0;

    Backward(const Conv &conv, const float *x, const float *kernel, const float *mixing, const float *scales,
             const float *d_out, float *place)
        : s(conv), x(x), kernel(kernel), mixing(mixing), scales(scales), d_out(d_out) {
        // Floats of the slots: 4 MB, or one sample. Chosen on the machine of benchmarks/results/layers-1-thread.json.
        constexpr long FITTING = 1000000;
        together = (int)std::max(1L, std::min((long)s.batch, FITTING / (panels * of_padded + 2 * of_out)));
        auto take = [&](long n) { return taken += n, place + (taken - n); };
        packed = take(of_kernel), d_packed = take(of_kernel), d_mixed = take(of_mixing);
        padded = take(together * panels * of_padded);
        by_position = take(together * of_out), by_output = take(together * of_out), of_threads = take(0);
    }

    int output_start(int tile) const { return (long)tile * s.c2 / output_tiles; }
    int group(int panel, int half) const { return (panel * PAIR + half * LANES) / s.r; }
    const float *scale_of(int n, int g, int t) const { return scales + ((long)n * s.groups() + g) * s.taps() + t; }
    float *of_thread() const { return of_threads + each * omp_get_thread_num(); }

    // Factors of K_n at tap t, for both vectors of a panel: 1 + mixing scales to factors [2][C2].
    void make_factors(int n, int panel, int t, float *factors) const {
        for (int half = 0; half < 2; ++half) {
            const float *row = mixing + (long)group(panel, half) * s.c2;
            vec scale = all(*scale_of(n, group(panel, half), t));
            for (int o = 0; o < s.c2; o += LANES)
                store(factors + half * s.c2 + o, fused(scale, load(row + o), all(1.f)));
        }
    }

    // Pass: x (C1, H, W) of a sample to its slot of `padded`, one panel.
    void hold_input(int n, int slot, int panel) const {
        long map = (long)s.height * s.width;
        pad(s, x + ((long)n * s.c1 + panel * PAIR) * map, padded + ((long)slot * panels + panel) * of_padded);
    }

    // Pass: d_out (C2, P) of a sample to its slot of `by_position`, one tile [C2][its positions].
    void hold_by_position(int n, int slot, int tile) const {
        int start = s.tile_start(tile), width = s.tile_start(tile + 1) - start;
        const float *from = d_out + n * of_out + start;
        float *to = by_position + slot * of_out + (long)start * s.c2;
        for (int o = 0; o < s.c2; ++o, from += s.positions())
            for (int j = 0; j < width; ++j) *to++ = from[j];
    }
    // Pass: d_out (C2, P) of a sample to its slot of `by_output`, one tile [P][its channels].
    void hold_by_output(int n, int slot, int tile) const {
        int start = output_start(tile), width = output_start(tile + 1) - start;
        const float *from = d_out + n * of_out + (long)start * s.positions();
        float *to = by_output + slot * of_out + (long)start * s.positions();
        for (int p = 0; p < s.positions(); ++p)
            for (int j = 0; j < width; ++j) *to++ = from[(long)j * s.positions() + p];
    }

    // Pass: `packed`, factors and `by_position` to dx (N, C1, H, W), one sample and panel.
    void inputs(int n, int slot, int panel, float *dx) const {
        float *d_padded = of_thread(), *factors = d_padded + of_padded;
        std::memset(d_padded, 0, sizeof(float) * of_padded);
        for (int t = 0; t < s.taps(); ++t) {
            const float *rows = packed + ((long)panel * s.taps() + t) * of_tap;
            make_factors(n, panel, t, factors);
            for (int tile = 0; tile < s.tiles(); ++tile) {
                int start = s.tile_start(tile);
                const float *d_tile = by_position + slot * of_out + (long)start * s.c2;
                with_constant<TILE>(s.tile_start(tile + 1) - start, [&](auto width) {
                    inputs_of_positions<decltype(width)::value>(s, rows, factors, d_tile, t, start, d_padded);
                });
            }
        }
        unpad(s, d_padded, dx + ((long)n * s.c1 + panel * PAIR) * s.height * s.width);
    }

    // Pass: `padded` and `by_output` to d_packed, d_mixed and d_scales (N, G, T), one panel and tap, all samples held.
    void kernels(int first, int samples, int panel, int t, float *d_scales) const {
        float *factors = of_thread() + of_padded, *d_mixing = factors + 2 * s.c2;
        std::memset(d_mixing, 0, sizeof(float) * of_tap);
        for (int slot = 0; slot < samples; ++slot) {
            vec totals[2] = {all(0.f), all(0.f)};
            make_factors(first + slot, panel, t, factors);
            for (int tile = 0; tile < output_tiles; ++tile)
                with_constant<TILE>(output_start(tile + 1) - output_start(tile), [&](auto width) {
                    Tile<decltype(width)::value> sums;
                    const float *d_tile = by_output + slot * of_out + (long)output_start(tile) * s.positions();
                    kernels_of_outputs(s, padded + ((long)slot * panels + panel) * of_padded, d_tile, t, sums);
                    use(sums, first + slot, panel, t, output_start(tile), factors, d_mixing, totals);
                });
            for (int half = 0; half < 2; ++half)
                d_scales[scale_of(first + slot, group(panel, half), t) - scales] += sum(totals[half]);
        }
        for (int half = 0; half < 2; ++half) {
            float *total = d_mixed + ((long)t * s.groups() + group(panel, half)) * s.c2;
            for (int o = 0; o < s.c2; ++o) total[o] += sum(load(d_mixing + o * PAIR + half * LANES));
        }
    }

    // Use the gradient of K_n, sums [P][PAIR] for P output channels from o on: adds to d_packed, to d_mixing [C2][PAIR]
    // and to totals [PAIR], whose sum is the gradient of the scale.
    template <int P>
    INLINE void use(const Tile<P> &sums, int n, int panel, int t, int o, const float *factors, float *d_mixing,
                    vec (&totals)[2]) const {
        long at = ((long)panel * s.taps() + t) * of_tap;
        for (int half = 0; half < 2; ++half) {
            const float *row = mixing + (long)group(panel, half) * s.c2;
            vec scale = all(*scale_of(n, group(panel, half), t));
            for (int j = 0; j < P; ++j) {
                long i = (long)(o + j) * PAIR + half * LANES;
                vec product = sums.at[j][half] * load(packed + at + i);
                totals[half] = fused(all(row[o + j]), product, totals[half]);
                store(d_mixing + i, fused(scale, product, load(d_mixing + i)));
                vec factor = all(factors[half * s.c2 + o + j]);
                store(d_packed + at + i, fused(factor, sums.at[j][half], load(d_packed + at + i)));
            }
        }
    }
};

}  // namespace

// Floats of scratch memory that a call needs.
EXPORT long attended_backward_scratch(const Conv *conv, int threads) {
    const Backward pass(*conv, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
    return pass.taken + threads * pass.each;
}

// x (N, C1, H, W), kernel (C2, C1, T), mixing (G, C2), scales (N, G, T), d_out (N, C2, P) to gradients in the inputs'
// shapes. dx may be null, and so may be d_kernel, d_mixing and d_scales together: they are skipped.
EXPORT void attended_backward(const Conv *conv, const float *x, const float *kernel, const float *mixing,
                              const float *scales, const float *d_out, float *dx, float *d_kernel, float *d_mixing,
                              float *d_scales, float *scratch, int threads) {
    const Backward pass(*conv, x, kernel, mixing, scales, d_out, scratch);
    const Conv &s = pass.s;
    const int panels = pass.panels, taps = s.taps(), of_tap = s.groups() * s.c2;
    if (d_kernel) {
        std::memset(pass.d_packed, 0,
                    sizeof(float) * (pass.of_kernel + pass.of_mixing));  // d_mixed lies behind d_packed
        std::fill_n(d_scales, (long)s.batch * s.groups() * taps, 0.f);   // not memset: null where there are no samples
    }
#pragma omp parallel num_threads(threads)
    {
        // 1. kernel: (C2, C1, T) to packed [C1 / PAIR][T][C2][PAIR]
#pragma omp for schedule(static)
        for (int panel = 0; panel < panels; ++panel)
            each_for_inputs(s, panel, [&](long i, long j) { pass.packed[j] = kernel[i]; });

        // 2. samples, some at a time
        for (int first = 0; first < s.batch; first += pass.together) {
            int samples = std::min(pass.together, s.batch - first);

            // 2a. padded inputs [slots][C1 / PAIR][padded map][PAIR], and d_out (C2, P) in the layouts of 2b and 2c
            if (d_kernel) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int slot = 0; slot < samples; ++slot)
                    for (int panel = 0; panel < panels; ++panel) pass.hold_input(first + slot, slot, panel);
#pragma omp for collapse(2) schedule(static) nowait
                for (int slot = 0; slot < samples; ++slot)
                    for (int tile = 0; tile < pass.output_tiles; ++tile) pass.hold_by_output(first + slot, slot, tile);
            }
            if (dx) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int slot = 0; slot < samples; ++slot)
                    for (int tile = 0; tile < s.tiles(); ++tile) pass.hold_by_position(first + slot, slot, tile);
            }
#pragma omp barrier

            // 2b. input: packed, d_out to dx (C1, H, W) of each sample
            if (dx) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int slot = 0; slot < samples; ++slot) pass.inputs(first + slot, slot, panel, dx);
            }

            // 2c. kernel, mixing and scales: padded inputs, d_out to d_packed, d_mixed [T][G][C2] and d_scales (G, T)
            if (d_kernel) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int t = 0; t < taps; ++t) pass.kernels(first, samples, panel, t, d_scales);
            }
#pragma omp barrier
        }

        // 3. results: d_packed to d_kernel (C2, C1, T), d_mixed [T][G][C2] to d_mixing (G, C2)
        if (d_kernel) {
#pragma omp for schedule(static)
            for (int panel = 0; panel < panels; ++panel)
                each_for_inputs(s, panel, [&](long i, long j) { d_kernel[i] = pass.d_packed[j]; });
#pragma omp for schedule(static)
            for (int i = 0; i < of_tap; ++i) {
                d_mixing[i] = 0;
                for (int t = 0; t < taps; ++t) d_mixing[i] += pass.d_mixed[(long)t * of_tap + i];
            }
        }
    }
}
