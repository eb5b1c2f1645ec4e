// Group norm with SiLU, layer norm, and GEGLU: what goes through memory once or twice and computes little. Compiled like
// attention.cpp, once for each instruction set.
#include "sfumato.h"
#include "vec.h"

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int64_t SHORT = 128;  // pixels that are summed up in float32 before the sums go on in float64

// The first n numbers at p, fewer than a vector has, the others 0.
template <class T>
INLINE Vec load_some(const T *p, int64_t n) {
    T all[WIDTH] = {};
    memcpy(all, p, sizeof(T) * n);
    return load(all);
}

template <class T>
INLINE void store_some(T *p, Vec v, int64_t n) {
    T all[WIDTH];
    store(all, v);
    memcpy(p, all, sizeof(T) * n);
}

// x / (1 + e**-x); below -88 the quotient is 0 to float32's smallest numbers.
INLINE Vec silu(Vec x) { return x / (exp2(smaller(splat(127.0f), x * -LOG2E)) + 1.0f); }

// `sums` of N vectors of channels from c on, over the pixels start ... stop - 1; n channels in the last vector.
template <int N, class T>
INLINE void add_moments(const T *x, int64_t start, int64_t stop, int64_t C, int64_t c, int64_t n, double *sums) {
    Vec sum[N]{}, square[N]{};
    for (int64_t i = start; i < stop; i++) {
        const T *p = x + i * C + c;
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

template <class T>
void moments(const void *from, int64_t pixels, int64_t C, double *sums) {
    const T *x = (const T *)from;
    memset(sums, 0, sizeof(double) * 2 * C);
    for (int64_t start = 0; start < pixels; start += SHORT) {
        int64_t stop = start + SHORT < pixels ? start + SHORT : pixels, c = 0;
        for (; c + 4 * WIDTH <= C; c += 4 * WIDTH) add_moments<4>(x, start, stop, C, c, WIDTH, sums);
        for (; c + WIDTH <= C; c += WIDTH) add_moments<1>(x, start, stop, C, c, WIDTH, sums);
        if (c < C) add_moments<1>(x, start, stop, C, c, C - c, sums);
    }
}

template <class T>
void normalise(const void *from, void *to, int64_t pixels, int64_t C, const float *scale, const float *shift, bool act) {
    const T *x = (const T *)from;
    T *y = (T *)to;
    for (int64_t i = 0; i < pixels; i++, x += C, y += C) {
        for (int64_t c = 0; c < C; c += WIDTH) {
            int64_t n = C - c < WIDTH ? C - c : WIDTH;
            if (n == WIDTH) {
                Vec v = load(x + c) * load(scale + c) + load(shift + c);
                store(y + c, act ? silu(v) : v);
            } else {
                Vec v = load_some(x + c, n) * load_some(scale + c, n) + load_some(shift + c, n);
                store_some(y + c, act ? silu(v) : v, n);
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

template <class T>
void geglu(const void *from, const void *by, void *to, int64_t n) {
    const T *x = (const T *)from, *gate = (const T *)by;
    T *y = (T *)to;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, load(x + i) * gelu(load(gate + i)));
    if (i < n) store_some(y + i, load_some(x + i, n - i) * gelu(load_some(gate + i, n - i)), n - i);
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

extern const PointwiseKernel KERNEL[2];  // by format
const PointwiseKernel KERNEL[2] = {{moments<float>, normalise<float>, geglu<float>, layer_norm},
                                   {moments<uint16_t>, normalise<uint16_t>, geglu<uint16_t>, nullptr}};
