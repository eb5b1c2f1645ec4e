// Group norm with SiLU, layer norm, and GEGLU: what goes through memory once or twice and computes little. Compiled like
// attention.cpp, once for each instruction set.
#include "sfumato.h"
#include "vec.h"

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int64_t SHORT = 128;  // pixels that are summed up in float32 before the sums go on in float64

// The first n floats at p, the others 0.
INLINE Vec load_some(const float *p, int64_t n) {
    Vec v{};
    memcpy(&v, p, 4 * n);
    return v;
}

// x / (1 + e**-x); below -88 the quotient is 0 to float32's smallest numbers.
INLINE Vec silu(Vec x) { return x / (exp2(smaller(splat(127.0f), x * -LOG2E)) + 1.0f); }

// `sums` of N vectors of channels from c on, over the pixels start ... stop - 1; n channels in the last vector.
template <int N>
INLINE void add_moments(const float *x, int64_t start, int64_t stop, int64_t C, int64_t c, int64_t n, double *sums) {
    Vec sum[N]{}, square[N]{};
    for (int64_t i = start; i < stop; i++) {
        const float *p = x + i * C + c;
        for (int j = 0; j < N; j++) {
            Vec v = n == WIDTH ? load(p + j * WIDTH) : load_some(p, n);
            sum[j] += v;
            square[j] += v * v;
        }
    }
    for (int64_t j = 0; j < (N - 1) * WIDTH + n; j++) {
        sums[c + j] += sum[j / WIDTH][j % WIDTH];
        sums[C + c + j] += square[j / WIDTH][j % WIDTH];
    }
}

void moments(const float *x, int64_t pixels, int64_t C, double *sums) {
    memset(sums, 0, sizeof(double) * 2 * C);
    for (int64_t start = 0; start < pixels; start += SHORT) {
        int64_t stop = start + SHORT < pixels ? start + SHORT : pixels, c = 0;
        for (; c + 4 * WIDTH <= C; c += 4 * WIDTH) add_moments<4>(x, start, stop, C, c, WIDTH, sums);
        for (; c + WIDTH <= C; c += WIDTH) add_moments<1>(x, start, stop, C, c, WIDTH, sums);
        if (c < C) add_moments<1>(x, start, stop, C, c, C - c, sums);
    }
}

void normalise(const float *x, float *y, int64_t pixels, int64_t C, const float *scale, const float *shift, bool act) {
    for (int64_t i = 0; i < pixels; i++, x += C, y += C) {
        for (int64_t c = 0; c < C; c += WIDTH) {
            int64_t n = C - c < WIDTH ? C - c : WIDTH;
            if (n == WIDTH) {
                Vec v = load(x + c) * load(scale + c) + load(shift + c);
                store(y + c, act ? silu(v) : v);
            } else {
                Vec v = load_some(x + c, n) * load_some(scale + c, n) + load_some(shift + c, n);
                if (act) v = silu(v);
                memcpy(y + c, &v, 4 * n);
            }
        }
    }
}

// x * Phi(x), with the error function of Abramowitz and Stegun 7.1.26: Phi is right to 2e-7.
INLINE Vec gelu(Vec x) {
    Vec z = larger(x, -x) * 0.70710678f;
    Vec t = 1.0f / (z * 0.3275911f + 1.0f);
    Vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    Vec tail = p * t * exp2(z * z * -LOG2E) * 0.5f;  // 1 - Phi(|x|)
    Vec phi = x < 0.0f ? tail : 1.0f - tail;
    return x * phi;
}

void geglu(const float *x, const float *gate, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, load(x + i) * gelu(load(gate + i)));
    if (i < n) {
        Vec v = load_some(x + i, n - i) * gelu(load_some(gate + i, n - i));
        memcpy(y + i, &v, 4 * (n - i));
    }
}

INLINE float total(Vec v) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += v[i];
    return sum;
}

void layer_norm(const float *x, float *y, int64_t n, const float *weight, const float *bias, float eps) {
    int64_t whole = n / WIDTH * WIDTH, rest = n - whole;
    Vec sum = load_some(x + whole, rest), square{};
    for (int64_t i = 0; i < whole; i += WIDTH) sum += load(x + i);
    float mean = total(sum) / n;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        Vec v = load(x + i) - mean;
        square += v * v;
    }
    float squares = total(square);
    for (int64_t i = whole; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    float rstd = 1.0f / __builtin_sqrtf(squares / n + eps);
    for (int64_t i = 0; i < whole; i += WIDTH) {
        store(y + i, (load(x + i) - mean) * rstd * load(weight + i) + load(bias + i));
    }
    for (int64_t i = whole; i < n; i++) y[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
}

}  // namespace

extern const PointwiseKernel KERNEL;
const PointwiseKernel KERNEL = {moments, normalise, geglu, layer_norm};
