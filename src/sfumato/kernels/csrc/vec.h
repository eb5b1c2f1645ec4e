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
typedef float Vec8 __attribute__((vector_size(32)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float *p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, Vec v) { memcpy(p, &v, sizeof v); }

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

// Rows to columns of an 8 x 8 square.
INLINE void transpose8(Vec8 r[8]) {
    Vec8 a[8], b[8];
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
    for (int i = 0; i < 8; i += 2) {
        a[i] = LOW(r[i], r[i + 1]);
        a[i + 1] = HIGH(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    }
    for (int i = 0; i < 4; i++) {
        r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#undef LOW
#undef HIGH
}

}  // namespace
