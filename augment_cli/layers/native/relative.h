// Tables of relative positions, laid out for vectors of queries, and products of queries with them.
#pragma once
#include <algorithm>

#include "vector.h"

namespace {

struct Shape {
    int heads, d, e, height, width;
    int positions() const { return height * width; }
    int padded() const { return round_up(positions(), PAIR); }
};

// Entries of a table for LANES neighbouring queries: `at(l, c)` are those for line l, a row or a column of the map, and
// channel c.
struct Lines {
    float *start;
    long line_step, channel_step;
    float *at(int l, int c) const { return start + l * line_step + c * channel_step; }
};

// Both tables, with queries along the lanes. rel_height (2H - 1, d) and rel_width (2W - 1, d) become
//   rows    [d][(2H - 1) W + PAIR]: rows[c][m] = rel_height[2 (H - 1) - m div W][c], for a query that is
//                                   m - (H - 1) W positions behind the first position of the key's row
//   columns [W][d][W + LANES]:      columns[x][c][j] = rel_width[x - j mod W + W - 1][c], for a key in column x and a
//                                   query in column j mod W
struct Tables {
    Shape s;
    float *columns, *rows;
    int column_length() const { return s.width + LANES; }
    int row_length() const { return (2 * s.height - 1) * s.width + PAIR; }
    long size() const { return (long)s.width * s.d * column_length() + (long)s.d * row_length(); }
    Tables(const Shape &shape, float *place)
        : s(shape), columns(place), rows(place + (long)s.width * s.d * column_length()) {}

    Lines of_columns(int query) const {
        return {columns + query % s.width, (long)s.d * column_length(), column_length()};
    }
    Lines of_rows(int query) const { return {rows + (s.height - 1) * s.width + query, -s.width, row_length()}; }

    // Call f(entry, whether it is rel_width's, its row in that table, its channel) for every entry.
    template <class F>
    void each(F f) {
        for (int x = 0; x < s.width; ++x)
            for (int c = 0; c < s.d; ++c)
                for (int j = 0; j < column_length(); ++j)
                    f(columns[((long)x * s.d + c) * column_length() + j], true, x - j % s.width + s.width - 1, c);
        for (int c = 0; c < s.d; ++c)
            for (int m = 0; m < row_length(); ++m)
                f(rows[(long)c * row_length() + m], false, std::max(2 * (s.height - 1) - m / s.width, 0), c);
    }
};

// Relative logits of LANES queries with each line: q [d][PAIR] and the entries to logits [lines][PAIR].
void line_logits(const float *q, int d, Lines entries, int lines, float *logits) {
    constexpr int TOGETHER = 7;  // lines at once: their sums and operands fit the 16 registers of AVX2
    for (int l = 0; l < lines; l += TOGETHER)
        with_constant<TOGETHER>(lines - l, [&](auto n) {
            constexpr int N = decltype(n)::value;
            vec sums[N] = {};
            for (int c = 0; c < d; ++c) {
                vec a = load(q + c * PAIR);
                UNROLL for (int j = 0; j < N; ++j) sums[j] = fused(a, load(entries.at(l + j, c)), sums[j]);
            }
            for (int j = 0; j < N; ++j) store(logits + (l + j) * PAIR, sums[j]);
        });
}

// Gradients through `line_logits`: q [d][PAIR], the entries and d_logits [lines][PAIR]; adds to d_q [d][PAIR] and to
// `totals`, laid out like the entries. Lines less than `apart` from one another overlap in memory. They are taken in
// turns, because a load of what was just stored is slow.
void line_logits_backward(const float *q, int d, Lines entries, Lines totals, int lines, int apart,
                          const float *d_logits, float *d_q) {
    constexpr int TOGETHER = 4;  // channels at once: queries, sums and operands fit the 16 registers of AVX2
    for (int c = 0; c < d; c += TOGETHER)
        with_constant<TOGETHER>(d - c, [&](auto n) {
            constexpr int N = decltype(n)::value;
            vec queries[N], sums[N];
            for (int j = 0; j < N; ++j) queries[j] = load(q + (c + j) * PAIR), sums[j] = load(d_q + (c + j) * PAIR);
            for (int first = 0; first < apart; ++first)
                for (int l = first; l < lines; l += apart) {
                    vec d_line = load(d_logits + l * PAIR);
                    UNROLL for (int j = 0; j < N; ++j) {
                        float *total = totals.at(l, c + j);
                        sums[j] = fused(d_line, load(entries.at(l, c + j)), sums[j]);
                        store(total, fused(d_line, queries[j], load(total)));
                    }
                }
            for (int j = 0; j < N; ++j) store(d_q + (c + j) * PAIR, sums[j]);
        });
}

}  // namespace
