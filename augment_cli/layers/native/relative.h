// The tables of relative positions laid out for vectors of queries, and products with them.
#pragma once
#include <algorithm>

#include "vector.h"

namespace {

struct Shape {
    int heads, d, e, height, width;
    int positions() const { return height * width; }
    int padded() const { return round_up(positions(), PAIR); }
};

// Entries of a table for LANES queries side by side: of line l (a row or a column of the map) and channel c.
struct Lines {
    float *start;
    long line_step, channel_step;
    float *at(int l, int c) const { return start + l * line_step + c * channel_step; }
};

// A table's entries laid out along queries, for the columns of the map and for its rows:
//   columns[x][c][j] = rel_width[x - j mod W], for the key's column x and a query in column j mod W
//   rows[c][m]       = rel_height[2 (H - 1) - m div W], for a query m - (H - 1) W positions after the key's row begins
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

    template <class F>
    void each(F f) {  // f(an entry here, whether of rel_width, its row, channel)
        for (int x = 0; x < s.width; ++x)
            for (int c = 0; c < s.d; ++c)
                for (int j = 0; j < column_length(); ++j)
                    f(columns[((long)x * s.d + c) * column_length() + j], true, x - j % s.width + s.width - 1, c);
        for (int c = 0; c < s.d; ++c)
            for (int m = 0; m < row_length(); ++m)
                f(rows[(long)c * row_length() + m], false, std::max(2 * (s.height - 1) - m / s.width, 0), c);
    }
};

// Products of LANES queries with the entries of each line, lane by lane. Shapes: q (d, PAIR), logits (lines, PAIR).
void line_logits(const float *q, int d, Lines entries, int lines, float *logits) {
    constexpr int TOGETHER = 7;
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

// Adds to the gradients of the queries (d, PAIR) and of the entries. `apart`: lines nearer than this overlap, and what
// was just stored is slow to load again.
void line_logits_backward(const float *q, int d, Lines entries, Lines totals, int lines, int apart,
                          const float *d_logits, float *d_q) {
    constexpr int TOGETHER = 4;
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
