// Vectors of WIDTH floats (8 or 16) in the compiler's own vector types, so that one source serves every instruction set.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t IVec __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Word __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Half __attribute__((vector_size(2 * WIDTH)));  // bfloat16 numbers
typedef float Vec8 __attribute__((vector_size(32)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

// bfloat16 to float32 and back: to the nearest, ties to even; NaN stays NaN.
INLINE float to_float(float x) { return x; }
INLINE float to_float(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE void from_float(float x, float *to) { *to = x; }
INLINE void from_float(float x, uint16_t *to) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE Vec widened(Half h) { return (Vec)(__builtin_convertvector(h, Word) << 16); }
INLINE Half narrowed(Vec x) {
    Word bits = (Word)x, unordered = (Word)(x != x);
    Word rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((rounded & ~unordered) | (unordered & 0x7fc0), Half);
}

INLINE Vec load(const uint16_t *p) {
    Half h;
    memcpy(&h, p, sizeof h);
    return widened(h);
}

INLINE void store(uint16_t *p, Vec v) {
    Half h = narrowed(v);
    memcpy(p, &h, sizeof h);
}

INLINE Vec splat(float x) { return x - Vec{}; }

// The larger one; b where either is NaN.
INLINE Vec larger(Vec a, Vec b) {
#if WIDTH == 16 && defined(__AVX512F__)
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif WIDTH == 8 && defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// The smaller one; b where either is NaN.
INLINE Vec smaller(Vec a, Vec b) { return -larger(-a, -b); }

// 2**x for x <= 127. Below -126.5 exactly 0; NaN stays NaN. Relative error below 1.8e-7 elsewhere, found by
// every third of the floats from -126 to 0.
// x = n + f with n whole and |f| <= 1/2; 2**f is a polynomial of degree 5, nearly minimax.
INLINE Vec exp2(Vec x) {
    const float shifter = 12582912.0f + 127.0f;  // 1.5 * 2**23: adding it rounds x and leaves n + 127 in the low bits
    x = larger(splat(-127.0f), x);
    Vec shifted = x + shifter;
    Vec f = x - (shifted - shifter);
    Vec p = f * 1.326472731e-3f + 9.671512991e-3f;
    p = p * f + 5.550733581e-2f;
    p = p * f + 2.402224243e-1f;
    p = p * f + 6.931470037e-1f;
    p = p * f + 1.0f;
    return p * (Vec)((IVec)shifted << 23);
}

INLINE Vec8 load8(const float *p) {
    Vec8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store8(float *p, Vec8 v) { memcpy(p, &v, sizeof v); }

// The lanes i... of a and b, those of b counted on from those of a.
template <int... i, class V>
INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, i...);
#else
    typedef int32_t Lanes __attribute__((vector_size(sizeof(V))));
    return __builtin_shuffle(a, b, Lanes{i...});
#endif
}

// Rows to columns of an 8 x 8 square.
INLINE void transpose8(Vec8 r[8]) {
    Vec8 a[8], b[8];
#define LOW(x, y) shuffle<0, 8, 1, 9, 4, 12, 5, 13>(x, y)
#define HIGH(x, y) shuffle<2, 10, 3, 11, 6, 14, 7, 15>(x, y)
    for (int i = 0; i < 8; i += 2) {
        a[i] = LOW(r[i], r[i + 1]);
        a[i + 1] = HIGH(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a[i + j], a[i + j + 2]);
        }
    }
    for (int i = 0; i < 4; i++) {
        r[i] = shuffle<0, 1, 2, 3, 8, 9, 10, 11>(b[i], b[i + 4]);
        r[i + 4] = shuffle<4, 5, 6, 7, 12, 13, 14, 15>(b[i], b[i + 4]);
    }
#undef LOW
#undef HIGH
}

}  // namespace
