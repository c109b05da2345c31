// Vectors of LANES floats, with the operations that the kernels use beside + - *. Compiled for AVX-512 and for AVX2.
#pragma once
#include <immintrin.h>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef __AVX512F__
constexpr int LANES = 16;
constexpr int TILE = 14;  // rows of a tile: 28 of 32 registers, the others for operands
using vec = __m512;
static inline vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
static inline vec all(float a) { return _mm512_set1_ps(a); }
static inline vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline float sum(vec a) { return _mm512_reduce_add_ps(a); }
static inline vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec nearest(vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec times_power(vec a, vec n) { return _mm512_scalef_ps(a, n); }
#else
constexpr int LANES = 8;
constexpr int TILE = 6;  // 12 of 16 registers
using vec = __m256;
static inline vec load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
static inline vec all(float a) { return _mm256_set1_ps(a); }
static inline vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline float sum(vec a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
static inline vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec nearest(vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec times_power(vec a, vec n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return a * _mm256_castsi256_ps(exponent);
}
#endif

constexpr int PAIR = 2 * LANES;  // floats in a row of a tile

static inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Call f with n, 1 <= n <= N, as a compile-time constant.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int N, class F>
static inline void with_constant(int n, F f) {
    if constexpr (N > 1)
        if (n < N) return with_constant<N - 1>(n, f);
    f(Constant<N>());
}

// P rows of PAIR numbers in registers; [P][PAIR] in memory.
template <int P>
struct Tile {
    vec at[P][2];

    INLINE void fill(vec a, vec b) { UNROLL for (auto &row : at) row[0] = a, row[1] = b; }
    INLINE void read(const float *block) {
        UNROLL for (int j = 0; j < P; ++j) at[j][0] = load(block + j * PAIR), at[j][1] = load(block + j * PAIR + LANES);
    }
    INLINE void write(float *block) const {
        UNROLL for (int j = 0; j < P; ++j) store(block + j * PAIR, at[j][0]), store(block + j * PAIR + LANES, at[j][1]);
    }
    // row j += numbers[j] (a, b)
    INLINE void add_products(const float *numbers, vec a, vec b) {
        UNROLL for (int j = 0; j < P; ++j) {
            vec number = all(numbers[j]);
            at[j][0] = fused(number, a, at[j][0]), at[j][1] = fused(number, b, at[j][1]);
        }
    }
};

// 2^a to about one unit in the last place, by a sixth-degree polynomial on [-1/2, 1/2]. NaN stays NaN.
static inline vec exp2(vec a) {
    a = larger(all(-126.f), a);  // max returns its second operand if one is NaN
#ifndef __AVX512F__
    a = _mm256_min_ps(all(127.f), a);
#endif
    vec whole = nearest(a), f = a - whole;
    vec p = fused(all(1.546144777e-4f), f, all(1.339086681e-3f));
    p = fused(p, f, all(9.618056938e-3f));
    p = fused(p, f, all(5.550356954e-2f));
    p = fused(p, f, all(2.402265072e-1f));
    p = fused(p, f, all(6.931471825e-1f));
    p = fused(p, f, all(1.f));
    return times_power(p, whole);
}

// A normal positive number as significand 2^exponent, 1 <= significand < 2. Unlike std::frexp, compilers vectorise it.
struct Split {
    float significand, exponent;
};
static inline Split split_power(float a) {
    unsigned bits, one = 0x3f800000, fraction = 0x7fffff;
    std::memcpy(&bits, &a, sizeof bits);
    float exponent = (int)(bits >> 23) - 127;
    bits = (bits & fraction) | one;
    std::memcpy(&a, &bits, sizeof bits);
    return {a, exponent};
}

// Transpose LANES x LANES numbers. Each step swaps blocks of half the width across the diagonal.
typedef int ints __attribute__((vector_size(4 * LANES)));
template <int WIDTH = LANES / 2>
static inline __attribute__((always_inline)) void transpose(vec (&rows)[LANES]) {
    ints upper, lower;
    UNROLL
    for (int l = 0; l < LANES; ++l) {
        upper[l] = l & WIDTH ? LANES + l - WIDTH : l;
        lower[l] = l & WIDTH ? LANES + l : l + WIDTH;
    }
    UNROLL
    for (int i = 0; i < LANES; ++i)
        if (!(i & WIDTH)) {
            vec a = rows[i], b = rows[i | WIDTH];
            rows[i] = __builtin_shuffle(a, b, upper);
            rows[i | WIDTH] = __builtin_shuffle(a, b, lower);
        }
    if constexpr (WIDTH > 1) transpose<WIDTH / 2>(rows);
}
