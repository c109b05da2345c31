// The attention core of AA, as attention.h describes it: the forward pass.
#include "attention.h"

#include <omp.h>

#include <cmath>

namespace {

// 2^60. Sums of weights below it leave room for large values in float32; above its inverse no weight that counts was
// rounded to zero.
constexpr float SAFE = 1152921504606846976.f;

// One pass over all keys: w.q, w.rows, w.columns, k (d, HW), v (e, HW) to sums [e + 1][PAIR], the weighted values and
// below them the sums of the weights. A weight is 2^(logit - peak), with peaks [PAIR], or zeros where there are none.
void attend(const Shape &s, const float *k, const float *v, const Work &w, const float *peaks, float *sums) {
    std::memset(sums, 0, sizeof(float) * PAIR * (s.e + 1));
    each_tile(0, s.positions(), [&](auto n, int key) {
        Tile<decltype(n)::value> tile;
        auto add = [&](float *total, auto each) {
            vec a = load(total), b = load(total + LANES);
            UNROLL for (int j = 0; j < decltype(n)::value; ++j) each(j, a, b);
            store(total, a), store(total + LANES, b);
        };
        // logits of the tile, [keys][PAIR]
        logits(s, k, w, key, tile);
        if (peaks) subtract(tile, peaks);
        // weights in their place, and their sum, [PAIR]
        add(sums + s.e * PAIR, [&](int j, vec &a, vec &b) {
            a += tile.at[j][0] = exp2(tile.at[j][0]), b += tile.at[j][1] = exp2(tile.at[j][1]);
        });
        // sums of the weighted values, [e][PAIR]
        for (int c = 0; c < s.e; ++c) {
            const float *values = v + (long)c * s.positions() + key;
            add(sums + c * PAIR, [&](int j, vec &a, vec &b) {
                vec value = all(values[j]);
                a = fused(value, tile.at[j][0], a), b = fused(value, tile.at[j][1], b);
            });
        }
    });
}

// Largest logit of each query: w.q, w.rows, w.columns, k (d, HW) to peaks [PAIR].
void find_peaks(const Shape &s, const float *k, const Work &w, float *peaks) {
    vec a = all(-INFINITY), b = a;
    each_tile(0, s.positions(), [&](auto n, int key) {
        Tile<decltype(n)::value> tile;
        logits(s, k, w, key, tile);
        for (auto &row : tile.at) a = larger(row[0], a), b = larger(row[1], b);
    });
    store(peaks, a), store(peaks + LANES, b);
}

bool is_safe(const float *totals, int n) {
    return std::all_of(totals, totals + n, [](float t) { return t > 1 / SAFE && t < SAFE; });
}

// One block of queries: q, k (d, HW), v (e, HW) of its head to its part of out (e, HW), shifts (HW) and sums (HW).
void block_forward(const Maps &maps, const Tables &tables, Work &w, int task, int query, float *out, float *shifts,
                   float *sums) {
    const Shape &s = maps.s;
    const float *q = maps.of_q(task), *k = maps.of_k(task), *v = maps.of_v(task);
    float *totals = w.sums + s.e * PAIR, *peaks = totals + PAIR;
    int positions = s.positions(), present = std::min(PAIR, positions - query);

    // 1. queries: q (d, HW) to w.q [d][PAIR]
    take_block(q, s.d, positions, query, maps.scale * LOG2_E, w.q);

    // 2. relative logits: w.q and the tables to w.rows [H][PAIR], w.columns [W][PAIR]
    relative_logits(tables, w, query);

    // 3. attention: w.sums [e + 1][PAIR] over all keys; where a sum is not safe, again, relative to the largest logits
    attend(s, k, v, w, nullptr, w.sums);
    bool safe = is_safe(totals, present);
    if (!safe) {
        find_peaks(s, k, w, peaks);
        attend(s, k, v, w, peaks, w.sums);
    }

    // 4. results: w.sums to out (e, HW), divided by the sums of weights; shifts and sums (HW), for the backward pass
    out += maps.at(task, s.e) + query, shifts += maps.at(task, 1) + query, sums += maps.at(task, 1) + query;
    for (int i = 0; i < present; ++i) {
        float inverse = 1 / totals[i];
        for (int c = 0; c < s.e; ++c) out[(long)c * positions + i] = w.sums[c * PAIR + i] * inverse;
        Split split = split_power(totals[i]);
        shifts[i] = safe ? split.exponent : peaks[i];
        sums[i] = safe ? split.significand : totals[i];
    }
}

}  // namespace

EXPORT int attention_numbers() { return sizeof(Attention); }

// Floats of scratch memory that a call needs.
EXPORT long attention_forward_scratch(const Attention *a, int threads) {
    const Shape s = a->shape();
    return Tables(s, nullptr).size() + threads * Work::size(s, false);
}

// q, k (N, heads, d, HW), v (N, heads, e, HW), rel_height (2H - 1, d), rel_width (2W - 1, d);
// out (N, heads, e, HW), shifts and sums (N, heads, HW).
EXPORT void attention_forward(const Attention *a, const float *q, const float *k, const float *v,
                              const float *rel_height, const float *rel_width, float *out, float *shifts, float *sums,
                              float *scratch, int threads) {
    const Maps maps(*a, q, k, v);
    const Tables tables = laid_out(maps.s, rel_height, rel_width, scratch);
    scratch += tables.size();
    int tasks = a->batch * a->heads, blocks = round_up(maps.s.positions(), PAIR) / PAIR;
#pragma omp parallel num_threads(threads)
    {
        Work w(maps.s, scratch + Work::size(maps.s, false) * omp_get_thread_num(), false);
#pragma omp for collapse(2) schedule(static)
        for (int task = 0; task < tasks; ++task)
            for (int block = 0; block < blocks; ++block)
                block_forward(maps, tables, w, task, block * PAIR, out, shifts, sums);
    }
}
