// The attention core of AA (Bello et al., arXiv 1904.09925, section 3.2), forward and backward, exact, memory O(HW).
//
// A task is a head and a block of queries, which lie along the lanes of two vectors; keys come TILE at a time. Logits
// of a tile are made, exponentiated and multiplied with the values in registers and never stored. They are in powers of
// two (the query carries log2 e and d^(-1/2)). The largest logit of a query is looked for only if the sum of its
// weights shows that it has to be subtracted. The backward pass makes the tiles again, a chunk of keys at a time.
//
// A query's weights are 2^(logit - shift) / sum, in both passes. Shift and sum are kept apart: one float32 log-sum-exp
// of magnitude 10^8 is rounded to a multiple of 8, which would make the weights of the backward pass wrong by factors.
//
// Relative logits: for each row and each column of the map, tables are laid out along positions (`Tables`), so that
// neighbouring queries find their entries next to each other.
//
// Maps are channels first: q, k (N, heads, d, HW), v (N, heads, e, HW), dense but for the step from sample to sample.
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include "relative.h"

namespace {

constexpr int CHUNK = TILE * LANES;  // keys whose weights are held in the backward pass
constexpr float LN_2 = 0.6931471805599453f, LOG2_E = 1.4426950408889634f;
constexpr float SAFE =
    1152921504606846976.f;  // 2^60: values times it, and what is lost beside its inverse, are far off

// What one thread works with. What is [.][PAIR] is for the queries of the block.
struct Work {
    float *q, *rows, *columns;                // [d], [H], [W][PAIR]
    float *sums;                              // forward: [e + 2][PAIR], of values and weights, and peaks
    float *d_q, *d_out, *d_rows, *d_columns;  // backward: as q, [e][PAIR], as rows and columns
    float *shifts, *deltas;                   // [PAIR] twice
    float *weights, *d_logits;                // [CHUNK][PAIR] twice
    float *keys, *d_k, *d_v;                  // of the head: [padded HW][d], [d], [e][padded HW]

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

// Some channels of a block of queries, scaled; zeros where the map has ended.
void take_block(const float *map, int channels, int positions, int query, float scale, float *block) {
    int n = std::min(PAIR, positions - query);
    for (int c = 0; c < channels; ++c)
        for (int i = 0; i < PAIR; ++i) block[c * PAIR + i] = i < n ? map[(long)c * positions + query + i] * scale : 0.f;
}

void relative_logits(const Tables &tables, const Work &w, int query) {
    Shape s = tables.s;
    for (int half = 0; half < PAIR; half += LANES) {
        line_logits(w.q + half, s.d, tables.of_columns(query + half), s.width, w.columns + half);
        line_logits(w.q + half, s.d, tables.of_rows(query + half), s.height, w.rows + half);
    }
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

template <class F>
INLINE void each_tile(int begin, int end, F f) {
    int key = begin;
    for (; key + TILE <= end; key += TILE) f(Constant<TILE>(), key);
    if (key < end) with_constant<TILE>(end - key, [&](auto n) { f(n, key); });
}

// Takes from logits what is the same for all keys of a query. After the sums, whose rounding then takes no part.
template <int P>
INLINE void subtract(Tile<P> &tile, const float *of_queries) {
    vec a = load(of_queries), b = load(of_queries + LANES);
    UNROLL for (auto &row : tile.at) row[0] -= a, row[1] -= b;
}

// Sums of the values, weighted relative to the peaks, and of the weights: sums (e + 1, PAIR). No peaks count as zeros.
void attend(const Shape &s, const float *k, const float *v, const Work &w, const float *peaks, float *sums) {
    std::memset(sums, 0, sizeof(float) * PAIR * (s.e + 1));
    each_tile(0, s.positions(), [&](auto n, int key) {
        Tile<decltype(n)::value> tile;
        auto add = [&](float *total, auto each) {
            vec a = load(total), b = load(total + LANES);
            UNROLL for (int j = 0; j < decltype(n)::value; ++j) each(j, a, b);
            store(total, a), store(total + LANES, b);
        };
        logits(s, k, w, key, tile);
        if (peaks) subtract(tile, peaks);
        add(sums + s.e * PAIR, [&](int j, vec &a, vec &b) {
            a += tile.at[j][0] = exp2(tile.at[j][0]), b += tile.at[j][1] = exp2(tile.at[j][1]);
        });
        for (int c = 0; c < s.e; ++c) {
            const float *values = v + (long)c * s.positions() + key;
            add(sums + c * PAIR, [&](int j, vec &a, vec &b) {
                vec value = all(values[j]);
                a = fused(value, tile.at[j][0], a), b = fused(value, tile.at[j][1], b);
            });
        }
    });
}

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

// Weights of a chunk of keys, times the query's sum, and the gradients of their logits, to w.weights and w.d_logits.
void weights_backward(const Shape &s, const float *k, const float *v, const Work &w, int begin, int end) {
    each_tile(begin, end, [&](auto n, int key) {
        Tile<decltype(n)::value> tile, d_tile;
        float *weights = w.weights + (key - begin) * PAIR;
        logits(s, k, w, key, tile);
        subtract(tile, w.shifts);
        UNROLL for (auto &row : tile.at) row[0] = exp2(row[0]), row[1] = exp2(row[1]);
        tile.write(weights);
        d_tile.fill(all(0.f), all(0.f));
        for (int c = 0; c < s.e; ++c)
            d_tile.add_products(v + (long)c * s.positions() + key, load(w.d_out + c * PAIR),
                                load(w.d_out + c * PAIR + LANES));
        subtract(d_tile, w.deltas);
        tile.read(weights);  // there were too many numbers for the registers
        UNROLL for (int j = 0; j < decltype(n)::value; ++j) d_tile.at[j][0] *= tile.at[j][0],
            d_tile.at[j][1] *= tile.at[j][1];
        d_tile.write(w.d_logits + (key - begin) * PAIR);
    });
}

// w.d_rows and w.d_columns += sums of the gradients of a chunk's logits over the rows and the columns of the map.
void lines_backward(const Shape &s, const Work &w, int begin, int end) {
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

// w.d_q += of a chunk's logits.
void queries_backward(const Shape &s, const Work &w, int begin, int end) {
    for (int c = 0; c < s.d; c += TILE)
        with_constant<TILE>(std::min(s.d - c, TILE), [&](auto n) {
            Tile<decltype(n)::value> tile;
            tile.read(w.d_q + c * PAIR);
            for (int key = begin; key < end; ++key) {
                const float *d = w.d_logits + (key - begin) * PAIR;
                tile.add_products(w.keys + (long)key * s.d + c, load(d), load(d + LANES));
            }
            tile.write(w.d_q + c * PAIR);
        });
}

// totals (channels, padded HW) += queries' numbers (channels, PAIR) times a chunk's numbers (keys, PAIR).
void keys_backward(const float *numbers, int channels, const float *chunk, int begin, int end, int padded,
                   float *totals) {
    for (int key = begin; key < end; key += LANES)
        for (int half = 0; half < PAIR; half += LANES) {
            vec lines[LANES];
            UNROLL for (int i = 0; i < LANES; ++i) lines[i] = load(chunk + (key - begin + i) * PAIR + half);
            transpose(lines);
            for (int c = 0; c < channels; ++c) {
                const float *q = numbers + c * PAIR + half;
                float *total = totals + (long)c * padded + key;
                vec a = load(total), b = all(0.f);
                UNROLL for (int i = 0; i < LANES; i += 2) a = fused(all(q[i]), lines[i], a),
                                                          b = fused(all(q[i + 1]), lines[i + 1], b);
                store(total, a + b);
            }
        }
}

// A call's numbers, as augment_cli/layers/native/attention.py declares them; steps are from sample to sample.
struct Attention {
    int batch, heads, d, e, height, width;
    float scale;
    long q_step, k_step, v_step;

    Shape shape() const { return {heads, d, e, height, width}; }
};

// The maps of a call, and where one head's part of each is.
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

// One block of queries: writes its part of out, shifts and sums.
void block_forward(const Maps &maps, const Tables &tables, Work &w, int task, int query, float *out, float *shifts,
                   float *sums) {
    const Shape &s = maps.s;
    const float *k = maps.of_k(task), *v = maps.of_v(task);
    float *totals = w.sums + s.e * PAIR, *peaks = totals + PAIR;
    int positions = s.positions(), present = std::min(PAIR, positions - query);
    take_block(maps.of_q(task), s.d, positions, query, maps.scale * LOG2_E, w.q);
    relative_logits(tables, w, query);
    attend(s, k, v, w, nullptr, w.sums);
    bool safe = is_safe(totals, present);
    if (!safe) {
        find_peaks(s, k, w, peaks);
        attend(s, k, v, w, peaks, w.sums);
    }
    out += maps.at(task, s.e) + query, shifts += maps.at(task, 1) + query, sums += maps.at(task, 1) + query;
    for (int i = 0; i < present; ++i) {
        float inverse = 1 / totals[i];
        for (int c = 0; c < s.e; ++c) out[(long)c * positions + i] = w.sums[c * PAIR + i] * inverse;
        Split split = split_power(totals[i]);
        shifts[i] = safe ? split.exponent : peaks[i];
        sums[i] = safe ? split.significand : totals[i];
    }
}

// Fills w.shifts, w.d_out = d_out / sum and w.deltas = w.d_out . out of a block's queries. Deltas are added up in the
// order in which weights_backward adds up w.d_out . v: where one key has all the weight, out is its v, and the gradient
// of its logit, the difference of the two, is zero, not a rounding error that is multiplied by the query.
void take_queries_backward(const Maps &maps, Work &w, int task, int query, const float *out, const float *shifts,
                           const float *sums, const float *d_out) {
    const Shape &s = maps.s;
    int positions = s.positions(), present = std::min(PAIR, positions - query);
    out += maps.at(task, s.e) + query, shifts += maps.at(task, 1) + query, sums += maps.at(task, 1) + query;
    take_block(d_out + maps.at(task, s.e), s.e, positions, query, 1.f, w.d_out);
    float inverses[PAIR];
    for (int i = 0; i < PAIR; ++i) {
        inverses[i] = i < present ? 1 / sums[i] : 0.f, w.shifts[i] = i < present ? shifts[i] : 0.f;
        w.deltas[i] = 0.f;
    }
    for (int c = 0; c < s.e; ++c) {
        float *row = w.d_out + c * PAIR;
        for (int i = 0; i < present; ++i) {
            row[i] *= inverses[i];
            w.deltas[i] = std::fma(row[i], out[(long)c * positions + i], w.deltas[i]);
        }
    }
}

// Adds to w.d_k, w.d_v and totals; writes the block's part of d_q.
void block_backward(const Maps &maps, const Tables &tables, const Tables &totals, Work &w, int task, int query,
                    const float *out, const float *shifts, const float *sums, const float *d_out, float *d_q) {
    const Shape &s = maps.s;
    int positions = s.positions(), present = std::min(PAIR, positions - query);
    take_block(maps.of_q(task), s.d, positions, query, maps.scale * LOG2_E, w.q);
    take_queries_backward(maps, w, task, query, out, shifts, sums, d_out);
    relative_logits(tables, w, query);
    std::memset(w.d_q, 0, sizeof(float) * PAIR * s.d);
    std::memset(w.d_rows, 0, sizeof(float) * PAIR * (s.height + s.width));  // and d_columns behind it
    for (int begin = 0; begin < positions; begin += CHUNK) {
        int end = std::min(begin + CHUNK, positions), missing = round_up(end - begin, LANES) - (end - begin);
        weights_backward(s, maps.of_k(task), maps.of_v(task), w, begin, end);
        for (float *chunk : {w.weights, w.d_logits})
            std::memset(chunk + (end - begin) * PAIR, 0, sizeof(float) * PAIR * missing);
        lines_backward(s, w, begin, end);
        queries_backward(s, w, begin, end);
        keys_backward(w.q, s.d, w.d_logits, begin, end, s.padded(), w.d_k);
        keys_backward(w.d_out, s.e, w.weights, begin, end, s.padded(), w.d_v);
    }
    relative_logits_backward(tables, totals, w, query);
    d_q += maps.at(task, s.d) + query;
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < present; ++i) d_q[(long)c * positions + i] = w.d_q[c * PAIR + i] * maps.scale;
}

void head_backward(const Maps &maps, const Tables &tables, const Tables &totals, Work &w, int task, const float *out,
                   const float *shifts, const float *sums, const float *d_out, float *d_q, float *d_k, float *d_v) {
    const Shape &s = maps.s;
    int positions = s.positions(), padded = s.padded();
    const float *k = maps.of_k(task);
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < positions; ++i) w.keys[(long)i * s.d + c] = k[(long)c * positions + i];
    std::memset(w.d_k, 0, sizeof(float) * padded * (s.d + s.e));  // and d_v behind it
    for (int query = 0; query < positions; query += PAIR)
        block_backward(maps, tables, totals, w, task, query, out, shifts, sums, d_out, d_q);
    d_k += maps.at(task, s.d), d_v += maps.at(task, s.e);
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < positions; ++i) *d_k++ = w.d_k[(long)c * padded + i] * LN_2;
    for (int c = 0; c < s.e; ++c)
        std::memcpy(d_v + (long)c * positions, w.d_v + (long)c * padded, sizeof(float) * positions);
}

Tables laid_out(const Shape &s, const float *rel_height, const float *rel_width, float *place) {
    Tables tables(s, place);
    tables.each([&](float &entry, bool of_width, int row, int c) {
        entry = (of_width ? rel_width : rel_height)[row * s.d + c];
    });
    return tables;
}

}  // namespace

EXPORT int attention_numbers() { return sizeof(Attention); }

// Floats of scratch memory that a call needs.
EXPORT long attention_forward_scratch(const Attention *a, int threads) {
    const Shape s = a->shape();
    return Tables(s, nullptr).size() + threads * Work::size(s, false);
}

EXPORT long attention_backward_scratch(const Attention *a, int threads) {
    const Shape s = a->shape();
    long tables = Tables(s, nullptr).size();
    return tables + threads * (Work::size(s, true) + tables);
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

// Inputs and results as above, d_out as out; writes gradients, dense, of the shapes of the inputs.
EXPORT void attention_backward(const Attention *a, const float *q, const float *k, const float *v,
                               const float *rel_height, const float *rel_width, const float *out, const float *shifts,
                               const float *sums, const float *d_out, float *d_q, float *d_k, float *d_v,
                               float *d_rel_height, float *d_rel_width, float *scratch, int threads) {
    const Maps maps(*a, q, k, v);
    const Shape &s = maps.s;
    const Tables tables = laid_out(s, rel_height, rel_width, scratch);
    scratch += tables.size();
    int tasks = a->batch * a->heads;
    long each = Work::size(s, true) + tables.size();
    int used = 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        used = omp_get_num_threads();
        float *place = scratch + each * omp_get_thread_num();
        Work w(s, place, true);
        Tables totals(s, place + Work::size(s, true));
        std::memset(totals.columns, 0, sizeof(float) * totals.size());
#pragma omp for schedule(static)
        for (int task = 0; task < tasks; ++task)
            head_backward(maps, tables, totals, w, task, out, shifts, sums, d_out, d_q, d_k, d_v);
    }
    std::memset(d_rel_height, 0, sizeof(float) * (2 * s.height - 1) * s.d);
    std::memset(d_rel_width, 0, sizeof(float) * (2 * s.width - 1) * s.d);
    for (int t = 0; t < used; ++t)
        Tables(s, scratch + each * t + Work::size(s, true)).each([&](float &entry, bool of_width, int row, int c) {
            (of_width ? d_rel_width : d_rel_height)[row * s.d + c] += entry * LN_2;
        });
}
