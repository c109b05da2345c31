// The attention core of AA, as attention.h describes it: the backward pass.
//
// It forms the weights again, a chunk of keys at a time. With w = 2^(logit - shift) / sum, for a query i and a key j:
//
//   d_v_j           += w_ij d_out_i
//   d_logit_ij       = w_ij (d_out_i . v_j - d_out_i . out_i)
//   d_q_i           += d_logit_ij k_j           d_k_j      += d_logit_ij q_i
//   d_row_i[y_j]    += d_logit_ij               d_column_i[x_j] += d_logit_ij
//
// and from d_rows and d_columns the gradients of the tables, and the rest of d_q. Logits are in powers of two, so their
// gradients are in units of ln 2, by which d_k and the tables' gradients are multiplied at the end.
#include "attention.h"

#include <omp.h>

#include <cmath>

namespace {

// Gradients that a call writes: d_q, d_k (N, heads, d, HW), d_v (N, heads, e, HW).
struct Gradients {
    float *q, *k, *v;
};

// Results of the forward pass, out (N, heads, e, HW), shifts and sums (N, heads, HW), and the gradient of out.
struct Results {
    const float *out, *shifts, *sums, *d_out;
};

// Results for a block of queries: w.shifts [PAIR], w.d_out [e][PAIR] = d_out / sum, w.deltas [PAIR] = w.d_out . out.
//
// Deltas are summed in the order in which `weights_backward` sums w.d_out . v. Where one key has all the weight, out is
// its v, and the gradient of its logit, the difference of the two, is exactly zero, and not a rounding error that is
// then multiplied by the query.
void take_results(const Maps &maps, Work &w, int task, int query, const Results &results) {
    const Shape &s = maps.s;
    int positions = s.positions(), present = std::min(PAIR, positions - query);
    const float *out = results.out + maps.at(task, s.e) + query;
    const float *shifts = results.shifts + maps.at(task, 1) + query, *sums = results.sums + maps.at(task, 1) + query;
    take_block(results.d_out + maps.at(task, s.e), s.e, positions, query, 1.f, w.d_out);
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

// A chunk of keys [begin, end): w.weights [keys][PAIR], weights times the query's sum, and w.d_logits [keys][PAIR].
void weights_backward(const Shape &s, const float *k, const float *v, const Work &w, int begin, int end) {
    each_tile(begin, end, [&](auto n, int key) {
        Tile<decltype(n)::value> tile, d_tile;
        float *weights = w.weights + (key - begin) * PAIR;
        // weights of the tile, [keys][PAIR]
        logits(s, k, w, key, tile);
        subtract(tile, w.shifts);
        UNROLL for (auto &row : tile.at) row[0] = exp2(row[0]), row[1] = exp2(row[1]);
        tile.write(weights);
        // their gradients, v (e, HW) . w.d_out [e][PAIR], less the deltas [PAIR]
        d_tile.fill(all(0.f), all(0.f));
        for (int c = 0; c < s.e; ++c)
            d_tile.add_products(v + (long)c * s.positions() + key, load(w.d_out + c * PAIR),
                                load(w.d_out + c * PAIR + LANES));
        subtract(d_tile, w.deltas);
        // gradients of the logits, [keys][PAIR]
        tile.read(weights);  // the registers do not hold both tiles
        UNROLL for (int j = 0; j < decltype(n)::value; ++j) d_tile.at[j][0] *= tile.at[j][0],
            d_tile.at[j][1] *= tile.at[j][1];
        d_tile.write(w.d_logits + (key - begin) * PAIR);
    });
}

// A chunk's w.d_logits [keys][PAIR], summed over rows and over columns of the map: adds to w.d_rows [H][PAIR] and to
// w.d_columns [W][PAIR].
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

// A chunk's w.d_logits [keys][PAIR] times w.keys (HW, d): adds to w.d_q [d][PAIR].
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

// A chunk's numbers [keys][PAIR] times the queries' [channels][PAIR], summed over the queries: adds to totals
// (channels, padded HW). LANES keys are transposed at a time, so that the keys lie along the lanes.
void keys_backward(const float *queries, int channels, const float *chunk, int begin, int end, int padded,
                   float *totals) {
    for (int key = begin; key < end; key += LANES)
        for (int half = 0; half < PAIR; half += LANES) {
            vec lines[LANES];
            UNROLL for (int i = 0; i < LANES; ++i) lines[i] = load(chunk + (key - begin + i) * PAIR + half);
            transpose(lines);
            for (int c = 0; c < channels; ++c) {
                const float *q = queries + c * PAIR + half;
                float *total = totals + (long)c * padded + key;
                vec a = load(total), b = all(0.f);
                UNROLL for (int i = 0; i < LANES; i += 2) a = fused(all(q[i]), lines[i], a),
                                                          b = fused(all(q[i + 1]), lines[i + 1], b);
                store(total, a + b);
            }
        }
}

// Gradients through the relative logits: w.d_rows [H][PAIR] and w.d_columns [W][PAIR], with w.q [d][PAIR] and the
// tables; adds to w.d_q [d][PAIR] and to `totals`, laid out like the tables.
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

// One block of queries: writes its part of d_q (d, HW); adds to w.d_k (d, padded HW), w.d_v (e, padded HW) and to
// `totals`.
void block_backward(const Maps &maps, const Tables &tables, const Tables &totals, Work &w, int task, int query,
                    const Results &results, float *d_q) {
    const Shape &s = maps.s;
    const float *q = maps.of_q(task), *k = maps.of_k(task), *v = maps.of_v(task);
    int positions = s.positions(), present = std::min(PAIR, positions - query);

    // 1. queries: q (d, HW) to w.q [d][PAIR]
    take_block(q, s.d, positions, query, maps.scale * LOG2_E, w.q);

    // 2. results: d_out, out (e, HW), shifts, sums (HW) to w.d_out [e][PAIR], w.deltas [PAIR], w.shifts [PAIR]
    take_results(maps, w, task, query, results);

    // 3. relative logits, as forward: w.q and the tables to w.rows [H][PAIR], w.columns [W][PAIR]
    relative_logits(tables, w, query);

    // 4. attention, a chunk of keys at a time
    std::memset(w.d_q, 0, sizeof(float) * PAIR * s.d);
    std::memset(w.d_rows, 0, sizeof(float) * PAIR * (s.height + s.width));  // d_columns lies behind d_rows
    for (int begin = 0; begin < positions; begin += CHUNK) {
        int end = std::min(begin + CHUNK, positions), missing = round_up(end - begin, LANES) - (end - begin);

        // 4a. weights and gradients of the logits: w.weights, w.d_logits [keys][PAIR], zeros up to a whole vector
        weights_backward(s, k, v, w, begin, end);
        for (float *chunk : {w.weights, w.d_logits})
            std::memset(chunk + (end - begin) * PAIR, 0, sizeof(float) * PAIR * missing);

        // 4b. relative logits: w.d_logits to w.d_rows [H][PAIR], w.d_columns [W][PAIR]
        lines_backward(s, w, begin, end);

        // 4c. queries: w.d_logits, w.keys (HW, d) to w.d_q [d][PAIR]
        queries_backward(s, w, begin, end);

        // 4d. keys: w.q [d][PAIR], w.d_logits to w.d_k (d, padded HW)
        keys_backward(w.q, s.d, w.d_logits, begin, end, s.padded(), w.d_k);

        // 4e. values: w.d_out [e][PAIR], w.weights to w.d_v (e, padded HW)
        keys_backward(w.d_out, s.e, w.weights, begin, end, s.padded(), w.d_v);
    }

    // 5. tables: w.d_rows, w.d_columns to `totals` and w.d_q [d][PAIR]
    relative_logits_backward(tables, totals, w, query);

    // 6. gradient of the queries: w.d_q to d_q (d, HW)
    d_q += maps.at(task, s.d) + query;
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < present; ++i) d_q[(long)c * positions + i] = w.d_q[c * PAIR + i] * maps.scale;
}

// One head: writes its d_q, d_k (d, HW) and d_v (e, HW), and adds to `totals`.
void head_backward(const Maps &maps, const Tables &tables, const Tables &totals, Work &w, int task,
                   const Results &results, const Gradients &grads) {
    const Shape &s = maps.s;
    int positions = s.positions(), padded = s.padded();

    // 1. keys: k (d, HW) to w.keys (HW, d)
    const float *k = maps.of_k(task);
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < positions; ++i) w.keys[(long)i * s.d + c] = k[(long)c * positions + i];

    // 2. blocks of queries: d_q (d, HW), w.d_k (d, padded HW), w.d_v (e, padded HW)
    std::memset(w.d_k, 0, sizeof(float) * padded * (s.d + s.e));  // d_v lies behind d_k
    for (int query = 0; query < positions; query += PAIR)
        block_backward(maps, tables, totals, w, task, query, results, grads.q);

    // 3. results: w.d_k, w.d_v to d_k (d, HW), d_v (e, HW)
    float *d_k = grads.k + maps.at(task, s.d), *d_v = grads.v + maps.at(task, s.e);
    for (int c = 0; c < s.d; ++c)
        for (int i = 0; i < positions; ++i) *d_k++ = w.d_k[(long)c * padded + i] * LN_2;
    for (int c = 0; c < s.e; ++c)
        std::memcpy(d_v + (long)c * positions, w.d_v + (long)c * padded, sizeof(float) * positions);
}

}  // namespace

// Floats of scratch memory that a call needs.
EXPORT long attention_backward_scratch(const Attention *a, int threads) {
    const Shape s = a->shape();
    long tables = Tables(s, nullptr).size();
    return tables + threads * (Work::size(s, true) + tables);
}

// Inputs and results of attention_forward, and d_out (N, heads, e, HW), to dense gradients in the inputs' shapes. Each
// thread has gradients of the tables of its own, which are added up at the end.
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

    // 1. heads: d_q, d_k, d_v, and each thread's part of the tables' gradients
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
            head_backward(maps, tables, totals, w, task, {out, shifts, sums, d_out}, {d_q, d_k, d_v});
    }

    // 2. tables: the threads' parts to d_rel_height (2H - 1, d) and d_rel_width (2W - 1, d)
    std::memset(d_rel_height, 0, sizeof(float) * (2 * s.height - 1) * s.d);
    std::memset(d_rel_width, 0, sizeof(float) * (2 * s.width - 1) * s.d);
    for (int t = 0; t < used; ++t)
        Tables(s, scratch + each * t + Work::size(s, true)).each([&](float &entry, bool of_width, int row, int c) {
            (of_width ? d_rel_width : d_rel_height)[row * s.d + c] += entry * LN_2;
        });
}
