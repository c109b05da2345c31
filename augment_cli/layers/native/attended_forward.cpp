// AW's convolution, as attended.h describes it: the forward pass.
//
// A part, some tiles of positions of one sample, is unfolded a few groups of input channels at a time and multiplied by
// all panels of output channels. The unfolding and the part's sums stay in the second-level cache.
#include "attended.h"

#include <omp.h>

namespace {

// Pack the kernel so that output channels lie along the lanes: K (C2, C1 T) to [C2 / PAIR][C1 T][PAIR]. This call packs
// one panel, and LANES of its C1 T numbers from `at` on.
void pack_for_outputs(const Conv &s, const float *kernel, int panel, long at, float *packed) {
    long depth = (long)s.c1 * s.taps();
    for (int half = 0; half < PAIR; half += LANES) {
        vec rows[LANES];
        for (int l = 0; l < LANES; ++l) rows[l] = load(kernel + (panel * PAIR + half + l) * depth + at);
        transpose(rows);
        for (int l = 0; l < LANES; ++l) store(packed + (panel * depth + at + l) * PAIR + half, rows[l]);
    }
}

// Copy rows of one channel, (H, W), from padded row `top` on, to map [rows][stride_x][phase_width]. Columns that are
// stride_x apart become neighbours, as neighbouring positions read them. The zeros around are not written: they are the
// same for every channel.
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

// Tiles [first, last) of a sample's positions, and memory to unfold some channels for them: for each tile
// [channels][T][its positions], and room for one vector behind it, because whole vectors are stored.
struct Part {
    const Conv &s;
    int first, last, channels;
    float *unfolded, *map;

    int begin() const { return s.tile_start(first); }
    float *of_tile(int tile) const {
        return unfolded + (long)(s.tile_start(tile) - begin()) * channels * s.taps() + (tile - first) * LANES;
    }
    static long map_size(const Conv &s) { return (long)s.padded_height() * (s.padded_width() + s.stride_x) + LANES; }

    // Unfold `count` channels of x (C1, H, W) from `channel` on, all taps.
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
                int y = start / s.out_width, column = start % s.out_width,
                    first_run = std::min(stop - start, s.out_width - column);
                const float *line_start = map + y * line - top * row_width;
                for (int t = 0; t < taps; ++t) {
                    const float *from = line_start + taps_at[t];
                    int run = first_run, left = stop - start;
                    store(to, load(from + column));  // a tile fits a vector; the next store overwrites what is too much
                    for (to += run, left -= run; left > 0; to += run, left -= run) {
                        from += line, run = std::min(left, s.out_width);
                        store(to, load(from));
                    }
                }
            }
        }
    }
};

// Convolve `groups` groups of input channels for P positions and one panel of output channels: adds to sums [P][PAIR].
// kernel [groups r][T][PAIR], unfolded [groups r][T][P], mixing (groups, C2), scales (groups, T)
template <int P>
void add_groups(const Conv &s, const float *kernel, const float *unfolded, const float *mixing, const float *scales,
                int groups, float *sums) {
    Tile<P> tile;
    float factors[MOST_TAPS * PAIR];
    tile.read(sums);
    for (int g = 0; g < groups; ++g, mixing += s.c2) {
        // factors of the group: 1 + mixing scales, [T][PAIR]
        for (int t = 0; t < s.taps(); ++t) {
            vec scale = all(*scales++);
            store(factors + t * PAIR, fused(scale, load(mixing), all(1.f)));
            store(factors + t * PAIR + LANES, fused(scale, load(mixing + LANES), all(1.f)));
        }
        // its r input channels: K_n [T][PAIR], formed as it is used, times the unfolding [T][P]
        for (int i = 0; i < s.r; ++i)
            for (int t = 0; t < s.taps(); ++t, kernel += PAIR, unfolded += P)
                tile.add_products(unfolded, load(kernel) * load(factors + t * PAIR),
                                  load(kernel + LANES) * load(factors + t * PAIR + LANES));
    }
    tile.write(sums);
}

// Partition of the forward pass: a thread's unfolding and its sums stay in its second-level cache.
struct ForwardPlan {
    int together, at_once;              // tiles of a part; groups of channels that are unfolded at a time
    long packed, sums, unfolded, each;  // floats: of the packed kernel, and of one thread's memory

    ForwardPlan(const Conv &s, int threads) {
        // Floats of the sums, and of the unfolding: 256 KiB each, half of a second-level cache of 1 MiB. Chosen on the
        // machine of benchmarks/results/layers-1-thread.json.
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

// All output channels of one part: x (C1, H, W), packed [C2 / PAIR][C1 T][PAIR], mixing (G, C2), scales (G, T) to its
// positions of out (C2, P). sums [C2 / PAIR][positions of the part][PAIR]
void part_forward(const Conv &s, Part &part, int at_once, const float *x, const float *packed, const float *mixing,
                  const float *scales, float *sums, float *out) {
    int panels = s.c2 / PAIR, begin = part.begin(), count = s.tile_start(part.last) - begin;
    std::memset(sums, 0, sizeof(float) * count * s.c2);

    // 1. convolution, some groups of input channels at a time
    for (int g = 0; g < s.groups(); g += at_once) {
        int groups = std::min(at_once, s.groups() - g);
        // 1a. unfolding: x (groups r, H, W) to [tiles][groups r][T][positions]
        part.unfold(x, g * s.r, groups * s.r);
        // 1b. products: packed, the unfolding and the factors to sums
        for (int panel = 0; panel < panels; ++panel)
            for (int tile = part.first; tile < part.last; ++tile) {
                const float *rows = packed + ((long)panel * s.c1 + g * s.r) * s.taps() * PAIR;
                float *block = sums + ((long)panel * count + s.tile_start(tile) - begin) * PAIR;
                with_constant<TILE>(s.tile_start(tile + 1) - s.tile_start(tile), [&](auto width) {
                    add_groups<decltype(width)::value>(s, rows, part.of_tile(tile),
                                                       mixing + (long)g * s.c2 + panel * PAIR, scales + g * s.taps(),
                                                       groups, block);
                });
            }
    }

    // 2. result: sums [C2 / PAIR][positions][PAIR] to out (C2, P)
    for (int o = 0; o < s.c2; ++o) {
        const float *from = sums + (long)(o / PAIR) * count * PAIR + o % PAIR;
        float *to = out + (long)o * s.positions() + begin;
        for (int p = 0; p < count; ++p) to[p] = from[(long)p * PAIR];
    }
}

}  // namespace

EXPORT int attended_numbers() { return sizeof(Conv); }

// Floats of scratch memory that a call needs.
EXPORT long attended_forward_scratch(const Conv *conv, int threads) {
    const ForwardPlan plan(*conv, threads);
    return plan.packed + threads * plan.each;
}

// x (N, C1, H, W), kernel (C2, C1, T), mixing (G, C2), scales (N, G, T); out (N, C2, P).
EXPORT void attended_forward(const Conv *conv, const float *x, const float *kernel, const float *mixing,
                             const float *scales, float *out, float *scratch, int threads) {
    const Conv &s = *conv;
    const ForwardPlan plan(s, threads);
    int panels = s.c2 / PAIR, tiles = s.tiles(), parts = (tiles + plan.together - 1) / plan.together;
    long depth = (long)s.c1 * s.taps();
    float *packed = scratch;
#pragma omp parallel num_threads(threads)
    {
        float *sums = scratch + plan.packed + plan.each * omp_get_thread_num(), *unfolded = sums + plan.sums;

        // 1. kernel: (C2, C1 T) to packed [C2 / PAIR][C1 T][PAIR]
#pragma omp for collapse(2) schedule(static)
        for (int panel = 0; panel < panels; ++panel)
            for (long at = 0; at < depth; at += LANES) pack_for_outputs(s, kernel, panel, at, packed);

        // 2. parts of the samples: x (C1, H, W) and packed to out (C2, P)
#pragma omp for collapse(2) schedule(static)
        for (int n = 0; n < s.batch; ++n)
            for (int i = 0; i < parts; ++i) {
                int first = (long)i * tiles / parts, last = (long)(i + 1) * tiles / parts;
                Part part{s, first, last, plan.at_once * s.r, unfolded, unfolded + plan.unfolded};
                part_forward(s, part, plan.at_once, x + (long)n * s.c1 * s.height * s.width, packed, mixing,
                             scales + (long)n * s.groups() * s.taps(), sums, out + (long)n * s.c2 * s.positions());
            }
    }
}
