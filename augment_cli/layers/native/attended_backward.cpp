// AW's convolution, as attended.h describes it: the backward pass.
#include <omp.h>

#include "attended.h"

namespace {

// K (C2, C1, taps) to [C1 / PAIR][taps][C2][PAIR], and back: some input channels.
template <class F>
void each_for_inputs(const Conv &s, int panel, F f) {  // f(place in K, place in packed K)
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
                padded[((long)(y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] =
                    x[((long)c * s.height + y) * s.width + i];
}

void unpad(const Conv &s, const float *padded, float *x) {
    for (int c = 0; c < PAIR; ++c)
        for (int y = 0; y < s.height; ++y)
            for (int i = 0; i < s.width; ++i) {
                bool seen = y + s.padding_y < s.padded_height() && i + s.padding_x < s.padded_width();
                x[((long)c * s.height + y) * s.width + i] =
                    seen ? padded[((long)(y + s.padding_y) * s.padded_width() + i + s.padding_x) * PAIR + c] : 0.f;
            }
}

// Gradients of the padded inputs at tap t of P positions from `start` on: adds K_n^T d_out. d_out [C2][P].
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

// Gradients of the kernels of P output channels at tap t for one sample. d_out [positions][P].
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

// A backward pass: what it is given, what it makes of it, and its steps, whose parts may run side by side. Samples are
// taken some at a time, and their padded inputs and gradients are held.
struct Backward {
    const Conv s;
    const float *x, *kernel, *mixing, *scales, *d_out;
    int together, panels = s.c1 / PAIR, output_tiles = (s.c2 + TILE - 1) / TILE;
    long of_padded = (long)s.padded() * PAIR, of_out = (long)s.c2 * s.positions(), of_tap = (long)s.c2 * PAIR;
    long of_kernel = (long)s.c1 * s.c2 * s.taps(), of_mixing = (long)s.taps() * s.groups() * s.c2;
    float *packed, *d_packed, *d_mixed;       // kernel, its gradient, and that of mixing at every tap
    float *padded, *by_position, *by_output;  // of the samples held
    float *of_threads;
    long each = of_padded + s.c2 * (2 + PAIR), taken = 0;

    Backward(const Conv &conv, const float *x, const float *kernel, const float *mixing, const float *scales,
             const float *d_out, float *place)
        : s(conv), x(x), kernel(kernel), mixing(mixing), scales(scales), d_out(d_out) {
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

    // K_n's factors, for the first and for the second vector of a panel: [2][C2].
    void make_factors(int n, int panel, int t, float *factors) const {
        for (int half = 0; half < 2; ++half) {
            const float *row = mixing + (long)group(panel, half) * s.c2;
            vec scale = all(*scale_of(n, group(panel, half), t));
            for (int o = 0; o < s.c2; o += LANES)
                store(factors + half * s.c2 + o, fused(scale, load(row + o), all(1.f)));
        }
    }

    void hold_input(int n, int slot, int panel) const {
        long map = (long)s.height * s.width;
        pad(s, x + ((long)n * s.c1 + panel * PAIR) * map, padded + ((long)slot * panels + panel) * of_padded);
    }

    // Gradients of a sample's results as the two steps want them: for each tile of positions [C2][positions of it], and
    // for each tile of output channels [positions][channels of it].
    void hold_by_position(int n, int slot, int tile) const {
        int start = s.tile_start(tile), width = s.tile_start(tile + 1) - start;
        const float *from = d_out + n * of_out + start;
        float *to = by_position + slot * of_out + (long)start * s.c2;
        for (int o = 0; o < s.c2; ++o, from += s.positions())
            for (int j = 0; j < width; ++j) *to++ = from[j];
    }
    void hold_by_output(int n, int slot, int tile) const {
        int start = output_start(tile), width = output_start(tile + 1) - start;
        const float *from = d_out + n * of_out + (long)start * s.positions();
        float *to = by_output + slot * of_out + (long)start * s.positions();
        for (int p = 0; p < s.positions(); ++p)
            for (int j = 0; j < width; ++j) *to++ = from[(long)j * s.positions() + p];
    }

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

    // Of kernel and mixing at one tap, from all samples held, and of their scales.
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

    // What gradients of a sample's own kernels, of P output channels from o on, are to K, to mixing and to its scales.
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

// Writes dx unless it is null, and, unless they are null, d_kernel, d_mixing and d_scales; shapes as of what they are
// of.
EXPORT void attended_backward(const Conv *conv, const float *x, const float *kernel, const float *mixing,
                              const float *scales, const float *d_out, float *dx, float *d_kernel, float *d_mixing,
                              float *d_scales, float *scratch, int threads) {
    const Backward pass(*conv, x, kernel, mixing, scales, d_out, scratch);
    const Conv &s = pass.s;
    const int panels = pass.panels, taps = s.taps(), of_tap = s.groups() * s.c2;
    if (d_kernel) {
        std::memset(pass.d_packed, 0, sizeof(float) * (pass.of_kernel + pass.of_mixing));  // and d_mixed behind it
        std::fill_n(d_scales, (long)s.batch * s.groups() * taps, 0.f);  // null where there are no samples
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int panel = 0; panel < panels; ++panel)
            each_for_inputs(s, panel, [&](long i, long j) { pass.packed[j] = kernel[i]; });
        for (int first = 0; first < s.batch; first += pass.together) {
            int samples = std::min(pass.together, s.batch - first);
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
            if (dx) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int slot = 0; slot < samples; ++slot) pass.inputs(first + slot, slot, panel, dx);
            }
            if (d_kernel) {
#pragma omp for collapse(2) schedule(static) nowait
                for (int panel = 0; panel < panels; ++panel)
                    for (int t = 0; t < taps; ++t) pass.kernels(first, samples, panel, t, d_scales);
            }
#pragma omp barrier
        }
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
