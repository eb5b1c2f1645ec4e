// Products of bfloat16 matrices in the shape of AMX tiles, 16 rows of 64 bytes, on whatever the file is compiled for:
// tiles, AVX512's pairwise products, or plain vectors (the last is for tests of the logic on other processors).
#pragma once
#include "vec.h"

namespace {

constexpr int64_t TILE = 16;           // rows, and columns of sums
constexpr int64_t DEPTH = 32;          // factors a row, which is what one tile product adds up
constexpr int64_t FACTORS = TILE * DEPTH;

#if defined(__AMX_BF16__)

// All eight tiles at their full size, for as long as this lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } all;
        _tile_loadconfig(&all);
    }
    ~Tiles() { _tile_release(); }
};

// What the compiler keeps from moving: it does not know that tiles are loaded from memory.
INLINE void settle() { asm volatile("" ::: "memory"); }

#else

struct Tiles {
    Tiles() {}
};

// sum + the products of the two numbers in a with those in each lane of b.
INLINE Vec pair_product(Vec sum, uint32_t a, Word b) {
#if defined(__AVX512BF16__)
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    return sum + to_float((uint16_t)(a >> 16)) * (Vec)(b & 0xffff0000) + to_float((uint16_t)a) * (Vec)(b << 16);
#endif
}

// One tile of the sums below.
INLINE void tile_product(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t steps, float *c, int64_t ldc, bool add) {
    Vec sums[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) sums[i] = add ? load(c + i * ldc) : Vec{};
    for (int64_t pair = 0; pair < steps * DEPTH / 2; pair++) {
        Word row;
        memcpy(&row, b + pair * 2 * TILE, sizeof row);
#pragma GCC unroll 16
        for (int i = 0; i < TILE; i++) {
            uint32_t x;
            memcpy(&x, a + i * lda + 2 * pair, sizeof x);
            sums[i] = pair_product(sums[i], x, row);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) store(c + i * ldc, sums[i]);
}

#endif

// c (2 TILE, N TILE) = or += a (2 TILE, steps DEPTH) b (steps DEPTH, N TILE). Rows of a and c are lda and ldc apart. b is N
// times, ldb apart, `steps` tiles [DEPTH / 2][TILE][2]: two factors that follow each other down a column lie side by side.
template <int N>
INLINE void product(const uint16_t *a, int64_t lda, const uint16_t *b, int64_t ldb, int64_t steps, float *c, int64_t ldc,
                    bool add) {
#if defined(__AMX_BF16__)
    settle();
    float *low = c + TILE * ldc;
    if (add) {
        _tile_loadd(0, c, 4 * ldc);
        _tile_loadd(1, low, 4 * ldc);
        if (N == 2) {
            _tile_loadd(2, c + TILE, 4 * ldc);
            _tile_loadd(3, low + TILE, 4 * ldc);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (N == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (int64_t i = 0; i < steps; i++, a += DEPTH, b += FACTORS) {
        _tile_loadd(6, b, 2 * DEPTH);
        _tile_loadd(4, a, 2 * lda);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + TILE * lda, 2 * lda);
        _tile_dpbf16ps(1, 5, 6);
        if (N == 2) {
            _tile_loadd(7, b + ldb, 2 * DEPTH);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 4 * ldc);
    _tile_stored(1, low, 4 * ldc);
    if (N == 2) {
        _tile_stored(2, c + TILE, 4 * ldc);
        _tile_stored(3, low + TILE, 4 * ldc);
    }
    settle();
#else
    for (int i = 0; i < 2; i++) {
        for (int n = 0; n < N; n++) {
            tile_product(a + i * TILE * lda, lda, b + n * ldb, steps, c + i * TILE * ldc + n * TILE, ldc, add);
        }
    }
#endif
}

// The first n of up to 32 or 16 bfloat16 numbers that are `col` apart, the others 0; n may exceed what there is room for.
template <class V>
INLINE V some(const uint16_t *p, int64_t n, int64_t col) {
    constexpr int64_t ROOM = sizeof(V) / 2;
    V v{};
    if (n <= 0) return v;
    if (col == 1 && n >= ROOM) {
        memcpy(&v, p, sizeof v);
        return v;
    }
#if defined(__AVX512BW__)
    if (col == 1) {
        if constexpr (ROOM == 32) return (V)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
        else return (V)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    }
#endif
    uint16_t all[ROOM] = {};
    for (int64_t i = 0; i < (n < ROOM ? n : ROOM); i++) all[i] = p[i * col];
    memcpy(&v, all, sizeof v);
    return v;
}

// The first n of 16 numbers to bfloat16, `col` apart.
INLINE void store_some(uint16_t *p, Vec v, int64_t n, int64_t col) {
    uint16_t all[TILE];
#if defined(__AVX512BF16__)
    __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (col == 1) return _mm256_mask_storeu_epi16(p, (__mmask16)(n >= TILE ? 0xffff : (1u << n) - 1), half);
    memcpy(all, &half, sizeof all);
#else
    store(all, v);
#endif
    for (int64_t i = 0; i < (n < TILE ? n : TILE); i++) p[i * col] = all[i];
}

// Two times 16 numbers to bfloat16, one after the other.
INLINE void store_pair(uint16_t *p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    memcpy(p, &both, sizeof both);
#else
    store(p, a);
    store(p + TILE, b);
#endif
}

// 2**x to 1e-4 of it, which is far below what rounding it to bfloat16 costs; 0 for minus infinity, NaN stays NaN.
// A minimax polynomial of degree 3 on [0, 1) for what is above the whole number, then the exponent.
INLINE Vec rough_exp2(Vec x) {
#if defined(__AVX512BF16__)
    Vec f = (Vec)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
    Vec p = ((f * 7.80245226e-2f + 2.26067155e-1f) * f + 6.95833541e-1f) * f + 9.99925218e-1f;
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return exp2(x);
#endif
}

// Swaps what lies off the diagonal in the squares of 2 S x 2 S numbers that rows a and b, S apart, take part in.
template <int S, class V>
INLINE void exchange(V &a, V &b) {
#define UPPER(i) ((i) & S ? 16 + ((i) ^ S) : (i))
#define LOWER(i) ((i) & S ? 16 + (i) : (i) ^ S)
#define SIXTEEN(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
    V upper = shuffle<SIXTEEN(UPPER)>(a, b);
    b = shuffle<SIXTEEN(LOWER)>(a, b);
    a = upper;
#undef UPPER
#undef LOWER
#undef SIXTEEN
}

template <int S, class V>
INLINE void exchange_all(V r[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        if (!(i & S)) exchange<S>(r[i], r[i + S]);
    }
}

// Rows to columns of a 16 x 16 square.
INLINE void transpose16(Word r[16]) {
    exchange_all<1>(r);
    exchange_all<2>(r);
    exchange_all<4>(r);
    exchange_all<8>(r);
}

// Lane i of the answer: all lanes of row i joined by f.
template <int S = 1, class F>
INLINE Vec across(Vec r[16], F f) {
    if constexpr (S == 16) {
        return r[0];
    } else {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i % (2 * S)) continue;
            exchange<S>(r[i], r[i + S]);
            r[i] = f(r[i], r[i + S]);
        }
        return across<2 * S>(r, f);
    }
}

}  // namespace
