// The attention core of AA (Bello et al., arXiv 1904.09925, section 3.2), forward and backward, exact, memory O(HW).
//
//   logit[i, j] = q_i . (k_j + rel_height[y_j - y_i + H - 1] + rel_width[x_j - x_i + W - 1]) d^(-1/2)
//   out_i       = sum_j softmax_j(logit[i, j]) v_j
//
// for each of N samples and heads, with d key channels and e value channels, on a map of H x W positions. Maps are
// channels first, q, k (N, heads, d, HW) and v (N, heads, e, HW), and dense but for the step from sample to sample.
// attention_reference.cpp has the same in plain loops.
//
// The fast kernels work on one block of PAIR queries of one head at a time. The queries lie along the lanes of two
// vectors, and keys come in tiles of TILE. In the comments [n][PAIR] is an array with n numbers for each query of the
// block, and HW the positions of the map.
//
// - The logits of a tile are formed, exponentiated and multiplied by the values in registers. They are never stored.
// - Logits are in powers of two: w.q carries log2(e) d^(-1/2).
// - A query's largest logit is found and subtracted only if the sum of its weights comes near overflow or underflow.
// - A query's weights are 2^(logit - shift) / sum in both passes. Shift and sum are separate numbers: one float32
//   log-sum-exp of magnitude 10^8 is rounded to a multiple of 8, and the weights would be wrong by factors.
// - Relative logits are formed once for each row and column of the map. `Tables` lays out the tables along positions,
// so
//   that the entries for neighbouring queries are neighbours in memory.
#pragma once
#include <algorithm>
#include <cstring>

#include "relative.h"

namespace {

constexpr int CHUNK = TILE * LANES;  // keys whose weights the backward pass holds: a multiple of both
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;

// Numbers of a call, as augment_cli/layers/native/attention.py declares them. Steps are floats from sample to sample.
struct Attention {
    int batch, heads, d, e, height, width;
    float scale;  // d^(-1/2)
    long q_step, k_step, v_step;

    Shape shape() const { return {heads, d, e, height, width}; }
};

// Inputs of a call. A task is one head of one sample, n heads + head; `of_q(task)` is its part of q, (d, HW).
struct Maps {
    Shape s;
    float scale;
    const float *q, *k, *v;
    long q_step, k_step, v_step;

    Maps(const Attention &a, const float *q, const float *k, const float *v)
        : s(a.shape()), scale(a.scale), q(q), k(k), v(v), q_step(a.q_step), k_step(a.k_step), v_step(a.v_step) {}
    long at(int task, int channels) const { return (long)task * channels * s.positions(); }
    const float *of_q(int task) const { return q + task / s.heads * q_step + at(task % s.heads, s.d); }
    const float *of_k(int task) const { return k + task / s.heads * k_step + at(task % s.heads, s.d); }
    const float *of_v(int task) const { return v + task / s.heads * v_step + at(task % s.heads, s.e); }
};

// Scratch memory of one thread.
struct Work {
    float *q;                   // [d][PAIR]: queries times scale and log2(e)
    float *rows, *columns;      // [H][PAIR], [W][PAIR]: relative logits
    float *sums;                // forward: [e + 2][PAIR]: weighted values, then sums of weights, then largest logits
    float *d_q, *d_out;         // backward: [d][PAIR]; [e][PAIR], divided by the sums of weights
    float *d_rows, *d_columns;  // [H][PAIR], [W][PAIR]
    float *shifts, *deltas;     // [PAIR], [PAIR]
    float *weights, *d_logits;  // [CHUNK][PAIR], [CHUNK][PAIR]
    float *keys, *d_k, *d_v;    // of the whole head: (HW, d), (d, padded HW), (e, padded HW)

    Work(const Shape &s, float *place, bool backward) { lay_out(s, place, backward); }
    static long size(const Shape &s, bool backward) { return Work(s, nullptr, backward).taken; }

  private:
    long taken = 0;
    void lay_out(const Shape &s, float *place, bool backward) {
        auto take = [&](long n) { return taken += n, place + (taken - n); };
        q = take((long)PAIR * s.d), rows = take((long)PAIR * s.height), columns = take((long)PAIR * s.width);
        if (!backward) {
            sums = take((long)PAIR * (s.e + 2));
            return;
        }
        d_q = take((long)PAIR * s.d), d_out = take((long)PAIR * s.e);
        d_rows = take((long)PAIR * s.height), d_columns = take((long)PAIR * s.width);
        shifts = take(PAIR), deltas = take(PAIR);
        weights = take((long)PAIR * CHUNK), d_logits = take((long)PAIR * CHUNK);
        keys = take((long)s.padded() * s.d), d_k = take((long)s.padded() * s.d), d_v = take((long)s.padded() * s.e);
    }
};

// Copy a block of queries, map (channels, HW) to block [channels][PAIR], times scale; zeros behind the end of the map.
void take_block(const float *map, int channels, int positions, int query, float scale, float *block) {
    int n = std::min(PAIR, positions - query);
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < PAIR; ++i) block[c * PAIR + i] = i < n ? map[(long)c * positions + query + i] * scale : 0.f;
}

// Products of the block's queries with the tables: w.q [d][PAIR] to w.rows [H][PAIR] and w.columns [W][PAIR].
void relative_logits(const Tables &tables, const Work &w, int query) {
    Shape s = tables.s;
    for (int half = 0; half < PAIR; half += LANES) {
        line_logits(w.q + half, s.d, tables.of_columns(query + half), s.width, w.columns + half);
        line_logits(w.q + half, s.d, tables.of_rows(query + half), s.height, w.rows + half);
    }
}

// Logits of P keys from `key` on: tile [P][PAIR] = w.rows[y] + w.columns[x] + k (d, HW) . w.q [d][PAIR].
template <int P>
INLINE void logits(const Shape &s, const float *k, const Work &w, int key, Tile<P> &tile) {
    int y = key / s.width, x = key % s.width;
    UNROLL for (int j = 0; j < P; ++j) {
        const float *row = w.rows + y * PAIR, *column = w.columns + x * PAIR;
        tile.at[j][0] = load(row) + load(column), tile.at[j][1] = load(row + LANES) + load(column + LANES);
        if (++x == s.width) x = 0, ++y;
    }
    for (int c = 0; c < s.d; ++c)
        tile.add_products(k + (long)c * s.positions() + key, load(w.q + c * PAIR), load(w.q + c * PAIR + LANES));
}

// Call f(number of keys, as a constant; first key) for the keys [begin, end), TILE at a time.
template <class F>
INLINE void each_tile(int begin, int end, F f) {
    int key = begin;
    for (; key + TILE <= end; key += TILE) f(Constant<TILE>(), key);
    if (key < end) with_constant<TILE>(end - key, [&](auto n) { f(n, key); });
}

// Subtract one number for each query, [PAIR], from every row of a tile. This comes after the products are summed, so
// that their rounding does not depend on it.
template <int P>
INLINE void subtract(Tile<P> &tile, const float *of_queries) {
    vec a = load(of_queries), b = load(of_queries + LANES);
    UNROLL for (auto &row : tile.at) row[0] -= a, row[1] -= b;
}

Tables laid_out(const Shape &s, const float *rel_height, const float *rel_width, float *place) {
    Tables tables(s, place);
    tables.each([&](float &entry, bool of_width, int row, int c) {
        entry = (of_width ? rel_width : rel_height)[row * s.d + c];
    });
    return tables;
}

}  // namespace
