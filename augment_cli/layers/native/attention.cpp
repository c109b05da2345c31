// The attention core of AA (Bello et al., arXiv 1904.09925, section 3.2), forward and backward, exact, memory O(HW).
//
// A task is a head and a block of queries, which lie along the lanes of two vectors; keys come TILE at a time. Logits of
// a tile are made, exponentiated and multiplied with the values in registers and never stored. They are in powers of two
// (the query carries log2 e and d^(-1/2)). The largest logit of a query is looked for only if the sum of its weights
// shows that it has to be subtracted. The backward pass makes the tiles again from the saved log-sum-exp, a chunk of
// keys at a time.
//
// Relative logits: for each row and each column of the map, tables are laid out along positions (`Tables`), so that
// neighbouring queries find their entries next to each other.
//
// Maps are channels first: q, k (N, heads, d, HW), v (N, heads, e, HW), dense but for the step from sample to sample.
#include "vector.h"
#include <algorithm>
#include <cmath>
#include <cstring>
#include <omp.h>

namespace {

constexpr int CHUNK = TILE * LANES;  // keys whose weights are held in the backward pass
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;
constexpr float SAFE = 1152921504606846976.f;  // 2^60: values times it, and what is lost beside its inverse, are far off

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
    Tables(Shape shape, float *place) : s(shape), columns(place), rows(place + (long)s.width * s.d * column_length()) {}

    Lines of_columns(int query) const {
        return {columns + query % s.width, (long)s.d * column_length(), column_length()};
    }
    Lines of_rows(int query) const { return {rows + (s.height - 1) * s.width + query, -s.width, row_length()}; }

    template <class F> void each(F f) {  // f(an entry here, which table, its row, channel)
        for (int x = 0; x < s.width; ++x)
            for (int c = 0; c < s.d; ++c)
                for (int j = 0; j < column_length(); ++j)
                    f(columns[((long)x * s.d + c) * column_length() + j], 1, x - j % s.width + s.width - 1, c);
        for (int c = 0; c < s.d; ++c)
            for (int m = 0; m < row_length(); ++m)
                f(rows[(long)c * row_length() + m], 0, std::max(2 * (s.height - 1) - m / s.width, 0), c);
    }
};

// What one thread works with. Everything [.][PAIR] is for the queries of the block.
struct Work {
    float *q, *d_q, *d_out, *rows, *columns, *d_rows, *d_columns, *weights, *d_logits, *keys, *d_k, *d_v;
    static long size(Shape s, bool backward) {
        long n = (long)PAIR * (s.d + s.height + s.width);
        if (backward)
            n += (long)PAIR * (s.d + s.e + s.height + s.width + 2 * CHUNK) + (long)s.padded() * (2 * s.d + s.e);
        return n;
    }
    Work(Shape s, float *place, bool backward) {
        auto take = [&](long n) { float *p = place; place += n; return p; };
        q = take((long)PAIR * s.d), rows = take((long)PAIR * s.height), columns = take((long)PAIR * s.width);
        if (!backward) return;
        d_q = take((long)PAIR * s.d), d_out = take((long)PAIR * s.e);
        d_rows = take((long)PAIR * s.height), d_columns = take((long)PAIR * s.width);
        weights = take((long)PAIR * CHUNK), d_logits = take((long)PAIR * CHUNK);
        keys = take((long)s.padded() * s.d), d_k = take((long)s.padded() * s.d), d_v = take((long)s.padded() * s.e);
    }
};

// Some channels of a block of queries, scaled; zeros where the map has ended.
void take_block(const float *map, int channels, int positions, int query, float scale, float *block) {
    int n = std::min(PAIR, positions - query);
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < PAIR; ++i) block[c * PAIR + i] = i < n ? map[(long)c * positions + query + i] * scale : 0.f;
}

// Products of LANES queries with the entries of each line, lane by lane. Shapes: q (d, PAIR), logits (lines, PAIR).
void line_logits(const float *q, int d, Lines entries, int lines, float *logits) {
    constexpr int TOGETHER = 7;
    for (int l = 0; l < lines; l += TOGETHER)
        with_constant<TOGETHER>(lines - l, [&](auto n) {
            constexpr int N = decltype(n)::value;
            vec sums[N] = {};
            for (int c = 0; c < d; ++c) {
                vec a = load(q + c * PAIR);
#pragma GCC unroll 8
                for (int j = 0; j < N; ++j) sums[j] = fused(a, load(entries.at(l + j, c)), sums[j]);
            }
            for (int j = 0; j < N; ++j) store(logits + (l + j) * PAIR, sums[j]);
        });
}

void relative_logits(const Tables &tables, const Work &w, int query) {
    Shape s = tables.s;
    for (int half = 0; half < PAIR; half += LANES) {
        line_logits(w.q + half, s.d, tables.of_columns(query + half), s.width, w.columns + half);
        line_logits(w.q + half, s.d, tables.of_rows(query + half), s.height, w.rows + half);
    }
}

// Adds to the gradients of the queries (d, PAIR) and of the entries. `apart`: lines nearer than this overlap, and what
// was just stored is slow to load again.
void line_logits_backward(const float *q, int d, Lines entries, Lines totals, int lines, int apart, const float *d_logits,
                          float *d_q) {
    constexpr int TOGETHER = 4;
    for (int c = 0; c < d; c += TOGETHER)
        with_constant<TOGETHER>(d - c, [&](auto n) {
            constexpr int N = decltype(n)::value;
            vec queries[N], sums[N];
            for (int j = 0; j < N; ++j) queries[j] = load(q + (c + j) * PAIR), sums[j] = load(d_q + (c + j) * PAIR);
            for (int first = 0; first < apart; ++first)
                for (int l = first; l < lines; l += apart) {
                    vec d_line = load(d_logits + l * PAIR);
#pragma GCC unroll 4
                    for (int j = 0; j < N; ++j) {
                        float *total = totals.at(l, c + j);
                        sums[j] = fused(d_line, load(entries.at(l, c + j)), sums[j]);
                        store(total, fused(d_line, queries[j], load(total)));
                    }
                }
            for (int j = 0; j < N; ++j) store(d_q + (c + j) * PAIR, sums[j]);
        });
}

void relative_logits_backward(const Tables &tables, const Tables &totals, const Work &w, int query) {
    Shape s = tables.s;
    for (int half = 0; half < PAIR; half += LANES) {
        int at = query + half;
        line_logits_backward(w.q + half, s.d, tables.of_columns(at), totals.of_columns(at), s.width, 1,
                             w.d_columns + half, w.d_q + half);
        line_logits_backward(w.q + half, s.d, tables.of_rows(at), totals.of_rows(at), s.height, LANES / s.width + 1,
                             w.d_rows + half, w.d_q + half);
    }
}

// Logits of P keys from `key` on.
template <int P>
inline __attribute__((always_inline)) void logits(const Shape &s, const float *k, const Work &w, int key, vec (&tile)[P][2]) {
    int y = key / s.width, x = key % s.width, positions = s.positions();
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) {
        const float *row = w.rows + y * PAIR, *column = w.columns + x * PAIR;
        tile[j][0] = load(row) + load(column), tile[j][1] = load(row + LANES) + load(column + LANES);
        if (++x == s.width) x = 0, ++y;
    }
    for (int c = 0; c < s.d; ++c) {
        const float *q = w.q + c * PAIR, *keys = k + (long)c * positions + key;
        vec a = load(q), b = load(q + LANES);
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j) {
            vec one = all(keys[j]);
            tile[j][0] = fused(one, a, tile[j][0]), tile[j][1] = fused(one, b, tile[j][1]);
        }
    }
}

template <class F> inline void each_tile(int begin, int end, F f) {
    int key = begin;
    for (; key + TILE <= end; key += TILE) f(Constant<TILE>(), key);
    if (key < end) with_constant<TILE>(end - key, [&](auto n) { f(n, key); });
}

// Takes from logits what is the same for all keys of a query. After the sums, whose rounding then takes no part.
template <int P> inline __attribute__((always_inline)) void subtract(vec (&tile)[P][2], const float *of_queries) {
    vec a = load(of_queries), b = load(of_queries + LANES);
#pragma GCC unroll 16
    for (int j = 0; j < P; ++j) tile[j][0] -= a, tile[j][1] -= b;
}

// Sums of the values, weighted relative to the peaks, and of the weights: sums (e + 1, PAIR). No peaks count as zeros.
void attend(const Shape &s, const float *k, const float *v, const Work &w, const float *peaks, float *sums) {
    int positions = s.positions();
    std::memset(sums, 0, sizeof(float) * PAIR * (s.e + 1));
    each_tile(0, positions, [&](auto n, int key) {
        constexpr int P = decltype(n)::value;
        vec tile[P][2];
        logits<P>(s, k, w, key, tile);
        if (peaks) subtract<P>(tile, peaks);
        vec a = load(sums + s.e * PAIR), b = load(sums + s.e * PAIR + LANES);
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j) {
            tile[j][0] = exp2(tile[j][0]), tile[j][1] = exp2(tile[j][1]);
            a += tile[j][0], b += tile[j][1];
        }
        store(sums + s.e * PAIR, a), store(sums + s.e * PAIR + LANES, b);
        for (int c = 0; c < s.e; ++c) {
            const float *values = v + (long)c * positions + key;
            float *total = sums + c * PAIR;
            a = load(total), b = load(total + LANES);
#pragma GCC unroll 16
            for (int j = 0; j < P; ++j) {
                vec one = all(values[j]);
                a = fused(one, tile[j][0], a), b = fused(one, tile[j][1], b);
            }
            store(total, a), store(total + LANES, b);
        }
    });
}

void find_peaks(const Shape &s, const float *k, const Work &w, float *peaks) {
    vec a = all(-INFINITY), b = a;
    each_tile(0, s.positions(), [&](auto n, int key) {
        constexpr int P = decltype(n)::value;
        vec tile[P][2];
        logits<P>(s, k, w, key, tile);
        for (int j = 0; j < P; ++j) a = larger(tile[j][0], a), b = larger(tile[j][1], b);
    });
    store(peaks, a), store(peaks + LANES, b);
}

bool is_safe(const float *totals, int n) {
    return std::all_of(totals, totals + n, [](float t) { return t > 1 / SAFE && t < SAFE; });
}

// Weights of a chunk of keys and the gradients of their logits, to w.weights and w.d_logits; and the sums of those over
// the rows and the columns of the map.
void weights_backward(const Shape &s, const float *k, const float *v, const Work &w, const float *lses, const float *deltas, int begin,
                      int end) {
    int positions = s.positions();
    each_tile(begin, end, [&](auto n, int key) {
        constexpr int P = decltype(n)::value;
        vec tile[P][2];
        logits<P>(s, k, w, key, tile);
        subtract<P>(tile, lses);
        float *weights = w.weights + (key - begin) * PAIR, *d_logits = w.d_logits + (key - begin) * PAIR;
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j)
            store(weights + j * PAIR, exp2(tile[j][0])), store(weights + j * PAIR + LANES, exp2(tile[j][1]));
        vec a = load(deltas), b = load(deltas + LANES);
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j) tile[j][0] = a, tile[j][1] = b;
        for (int c = 0; c < s.e; ++c) {
            const float *values = v + (long)c * positions + key, *d_out = w.d_out + c * PAIR;
            a = load(d_out), b = load(d_out + LANES);
#pragma GCC unroll 16
            for (int j = 0; j < P; ++j) {
                vec one = all(values[j]);
                tile[j][0] = fused(one, a, tile[j][0]), tile[j][1] = fused(one, b, tile[j][1]);
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < P; ++j)
            for (int half = 0; half < 2; ++half) {
                int i = j * PAIR + half * LANES;
                store(d_logits + i, tile[j][half] * load(weights + i));
            }
    });
    const float *d = w.d_logits;
    for (int key = begin; key < end;) {
        int y = key / s.width, x = key % s.width, last = std::min(end, key - x + s.width);
        float *row = w.d_rows + y * PAIR, *column = w.d_columns + x * PAIR;
        vec a = load(row), b = load(row + LANES);
        for (; key < last; ++key, d += PAIR, column += PAIR) {
            a += load(d), b += load(d + LANES);
            store(column, load(column) + load(d)), store(column + LANES, load(column + LANES) + load(d + LANES));
        }
        store(row, a), store(row + LANES, b);
    }
}

// d_q (d, PAIR) += of a chunk's logits.
void queries_backward(const Shape &s, const Work &w, int begin, int end) {
    for (int c = 0; c < s.d; c += TILE)
        with_constant<TILE>(std::min(s.d - c, TILE), [&](auto n) {
            constexpr int P = decltype(n)::value;
            vec tile[P][2];
#pragma GCC unroll 16
            for (int j = 0; j < P; ++j)
                tile[j][0] = load(w.d_q + (c + j) * PAIR), tile[j][1] = load(w.d_q + (c + j) * PAIR + LANES);
            for (int key = begin; key < end; ++key) {
                const float *d = w.d_logits + (key - begin) * PAIR, *keys = w.keys + (long)key * s.d + c;
                vec a = load(d), b = load(d + LANES);
#pragma GCC unroll 16
                for (int j = 0; j < P; ++j) {
                    vec one = all(keys[j]);
                    tile[j][0] = fused(one, a, tile[j][0]), tile[j][1] = fused(one, b, tile[j][1]);
                }
            }
#pragma GCC unroll 16
            for (int j = 0; j < P; ++j)
                store(w.d_q + (c + j) * PAIR, tile[j][0]), store(w.d_q + (c + j) * PAIR + LANES, tile[j][1]);
        });
}

// totals (channels, padded HW) += queries' numbers (channels, PAIR) times a chunk's numbers (keys, PAIR).
void keys_backward(const float *numbers, int channels, const float *chunk, int begin, int end, int padded, float *totals) {
    for (int key = begin; key < end; key += LANES)
        for (int half = 0; half < PAIR; half += LANES) {
            vec lines[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) lines[i] = load(chunk + (key - begin + i) * PAIR + half);
            transpose(lines);
            for (int c = 0; c < channels; ++c) {
                const float *q = numbers + c * PAIR + half;
                float *total = totals + (long)c * padded + key;
                vec a = load(total), b = all(0.f);
#pragma GCC unroll 16
                for (int i = 0; i < LANES; i += 2)
                    a = fused(all(q[i]), lines[i], a), b = fused(all(q[i + 1]), lines[i + 1], b);
                store(total, a + b);
            }
        }
}

}  // namespace

// Floats of scratch memory that a call needs.
EXPORT long attention_scratch(int heads, int d, int e, int height, int width, int backward, int threads) {
    Shape s{heads, d, e, height, width};
    long tables = Tables(s, nullptr).size();
    return tables + threads * (Work::size(s, backward) + (backward ? tables : (long)PAIR * (e + 2)));
}

// out (N, heads, e, HW); lse (N, heads, HW), in powers of two, unless null.
EXPORT void attention_forward(int batch, int heads, int d, int e, int height, int width, float scale, const float *q,
                              const float *k, const float *v, long q_step, long k_step, long v_step,
                              const float *rel_height, const float *rel_width, float *out, float *lse, float *scratch,
                              int threads) {
    Shape s{heads, d, e, height, width};
    int positions = s.positions(), blocks = round_up(positions, PAIR) / PAIR;
    const float *of_table[] = {rel_height, rel_width};
    Tables tables(s, scratch);
    tables.each([&](float &entry, int which, int row, int c) { entry = of_table[which][row * d + c]; });
    scratch += tables.size();
    long each = Work::size(s, false) + (long)PAIR * (e + 2);
#pragma omp parallel num_threads(threads)
    {
        float *place = scratch + each * omp_get_thread_num();
        Work w(s, place, false);
        float *sums = place + Work::size(s, false), *totals = sums + e * PAIR, *peaks = totals + PAIR;
#pragma omp for schedule(static)
        for (int task = 0; task < batch * heads * blocks; ++task) {
            int query = task % blocks * PAIR, head = task / blocks % heads, n = task / blocks / heads;
            const float *k_ = k + n * k_step + (long)head * d * positions, *v_ = v + n * v_step + (long)head * e * positions;
            int present = std::min(PAIR, positions - query);
            take_block(q + n * q_step + (long)head * d * positions, d, positions, query, scale * LOG2_E, w.q);
            relative_logits(tables, w, query);
            attend(s, k_, v_, w, nullptr, sums);
            bool safe = is_safe(totals, present);
            if (!safe) {
                find_peaks(s, k_, w, peaks);
                attend(s, k_, v_, w, peaks, sums);
            }
            long first = (long)(n * heads + head);
            for (int i = 0; i < present; ++i) {
                float inverse = 1 / totals[i];
                for (int c = 0; c < e; ++c) out[(first * e + c) * positions + query + i] = sums[c * PAIR + i] * inverse;
                if (lse) lse[first * positions + query + i] = std::log2(totals[i]) + (safe ? 0.f : peaks[i]);
            }
        }
    }
}

// Gradients, dense and shaped as what they are of; those of the tables are written too.
EXPORT void attention_backward(int batch, int heads, int d, int e, int height, int width, float scale, const float *q,
                               const float *k, const float *v, long q_step, long k_step, long v_step,
                               const float *rel_height, const float *rel_width, const float *out, const float *lse,
                               const float *d_out, float *d_q, float *d_k, float *d_v, float *d_rel_height,
                               float *d_rel_width, float *scratch, int threads) {
    Shape s{heads, d, e, height, width};
    int positions = s.positions(), padded = s.padded();
    const float *of_table[] = {rel_height, rel_width};
    float *d_of_table[] = {d_rel_height, d_rel_width};
    Tables tables(s, scratch);
    tables.each([&](float &entry, int which, int row, int c) { entry = of_table[which][row * d + c]; });
    scratch += tables.size();
    long each = Work::size(s, true) + tables.size();
    int used = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        used = omp_get_num_threads();
        float *place = scratch + each * omp_get_thread_num();
        std::memset(place, 0, sizeof(float) * each);
        Work w(s, place, true);
        Tables totals(s, place + Work::size(s, true));
        float deltas[PAIR], lses[PAIR];
#pragma omp for schedule(static)
        for (int task = 0; task < batch * heads; ++task) {
            int n = task / heads;
            long at_d = (long)task * d * positions, at_e = (long)task * e * positions;
            const float *q_ = q + n * q_step + (long)(task % heads) * d * positions;
            const float *k_ = k + n * k_step + (long)(task % heads) * d * positions;
            const float *v_ = v + n * v_step + (long)(task % heads) * e * positions;
            for (int c = 0; c < d; ++c)
                for (int i = 0; i < positions; ++i) w.keys[(long)i * d + c] = k_[(long)c * positions + i];
            std::memset(w.d_k, 0, sizeof(float) * padded * (d + e));  // and d_v behind it
            for (int query = 0; query < positions; query += PAIR) {
                int present = std::min(PAIR, positions - query);
                take_block(q_, d, positions, query, scale * LOG2_E, w.q);
                take_block(d_out + at_e, e, positions, query, 1.f, w.d_out);
                relative_logits(tables, w, query);
                std::memset(w.d_q, 0, sizeof(float) * PAIR * d);
                std::memset(w.d_rows, 0, sizeof(float) * PAIR * (height + width));
                for (int i = 0; i < PAIR; ++i) {
                    float delta = 0;
                    for (int c = 0; c < e && i < present; ++c)
                        delta -= w.d_out[c * PAIR + i] * out[at_e + (long)c * positions + query + i];
                    deltas[i] = delta, lses[i] = i < present ? lse[(long)task * positions + query + i] : 0;
                }
                for (int begin = 0; begin < positions; begin += CHUNK) {
                    int end = std::min(begin + CHUNK, positions), full = round_up(end - begin, LANES);
                    weights_backward(s, k_, v_, w, lses, deltas, begin, end);
                    for (float *chunk : {w.weights, w.d_logits})
                        std::memset(chunk + (end - begin) * PAIR, 0, sizeof(float) * PAIR * (full - (end - begin)));
                    queries_backward(s, w, begin, end);
                    keys_backward(w.q, d, w.d_logits, begin, end, padded, w.d_k);
                    keys_backward(w.d_out, e, w.weights, begin, end, padded, w.d_v);
                }
                relative_logits_backward(tables, totals, w, query);
                for (int c = 0; c < d; ++c)
                    for (int i = 0; i < present; ++i) d_q[at_d + (long)c * positions + query + i] = w.d_q[c * PAIR + i] * scale;
            }
            for (int c = 0; c < d; ++c)
                for (int i = 0; i < positions; ++i) d_k[at_d + (long)c * positions + i] = w.d_k[(long)c * padded + i] * LN_2;
            for (int c = 0; c < e; ++c) std::memcpy(d_v + at_e + (long)c * positions, w.d_v + (long)c * padded, sizeof(float) * positions);
        }
    }
    std::memset(d_rel_height, 0, sizeof(float) * (2 * height - 1) * d);
    std::memset(d_rel_width, 0, sizeof(float) * (2 * width - 1) * d);
    for (int t = 0; t < used; ++t) {
        Tables totals(s, scratch + each * t + Work::size(s, true));
        totals.each([&](float &entry, int which, int row, int c) { d_of_table[which][row * d + c] += entry * LN_2; });
    }
}
