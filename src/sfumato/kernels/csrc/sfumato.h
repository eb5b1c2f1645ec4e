// What the kernels and the Python side agree on. Sizes and strides count elements, not bytes.
#pragma once
#include <cstddef>
#include <cstdint>

enum Format : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };
enum Mask : int32_t { NO_MASK = 0, BOOLEAN = 1, ADDITIVE = 2 };

// Scaled dot-product attention: q (B, H, L, D), k (B, H, K, D), v (B, H, K, E) -> out (B, H, L, E).
// Strides are those of the four dimensions. A boolean mask (bytes) is true where a query sees a key; an additive one is
// float32. `causal`: query i sees the keys 0 to i.
struct Attention {
    const void *q, *k, *v, *mask;
    void *out;
    int64_t B, H, L, K, D, E;
    int64_t q_stride[4], k_stride[4], v_stride[4], mask_stride[4], out_stride[4];
    float scale;
    int32_t format, mask_kind, causal;
};

// One instruction set's attention. `run` does the queries first ... first + count - 1 of head (b, h).
struct AttentionKernel {
    int64_t panel;  // queries that are worked on at once
    size_t (*scratch)(const Attention &a, int64_t count);  // floats that `run` needs, 64-byte aligned
    void (*run)(const Attention &a, int64_t b, int64_t h, int64_t first, int64_t count, float *scratch);
};

// Group norm, with SiLU if `silu`, of a channels-last picture x (B, pixels, C) -> y, both contiguous; weight, bias (C).
// All four are of one format.
struct GroupNorm {
    const void *x, *weight, *bias;
    void *y;
    int64_t B, pixels, C, groups;
    float eps;
    int32_t silu, format;
};

// GEGLU: x (rows, 2 * width) -> y (rows, width) = x[:, :width] * gelu(x[:, width:]), rows of x `stride` apart.
struct Geglu {
    const void *x;
    void *y;
    int64_t rows, width, stride;
    int32_t format;
};

// Layer norm of the rows of x (rows, width), both contiguous.
struct LayerNorm {
    const float *x, *weight, *bias;
    float *y;
    int64_t rows, width;
    float eps;
};

// One instruction set's share of the three above, for one format.
struct PointwiseKernel {
    // Sums, then sums of squares, of each of the C channels: 2 * C numbers.
    void (*moments)(const void *x, int64_t pixels, int64_t C, double *sums);
    // y = scale * x + shift by channel, then SiLU if `silu`.
    void (*normalise)(const void *x, void *y, int64_t pixels, int64_t C, const float *scale, const float *shift, bool silu);
    // y = x * gelu(gate), n numbers.
    void (*geglu)(const void *x, const void *gate, void *y, int64_t n);
    // One row of n numbers; only for float32.
    void (*layer_norm)(const float *x, float *y, int64_t n, const float *weight, const float *bias, float eps);
};

// A convolution of a channels-last picture x (B, H, W, C) with square filters, or with kernel = 1 a product of rows:
// y (B, out_H, out_W, N) = x * weight + bias + add; bias and add may be null. Rows of x, add and y are apart by strides.
// weight: (N, K) with K = (kernel, kernel, C); `packed`: panels of columns, each (K, panel), the last filled with zeros.
// `doubled`: 1 where each pixel counts as a square of four, as after repeating rows and columns.
struct Product {
    const float *x, *weight, *bias, *add;
    float *y;
    int64_t B, H, W, C, out_H, out_W, N, kernel, stride, padding;
    int64_t x_stride, add_stride, y_stride;
    int32_t packed, doubled;
};

// One instruction set's product. `run` does the rows first ... last - 1 and, from a multiple of the panel on, the
// columns left ... right - 1.
struct ProductKernel {
    int64_t panel;
    size_t (*scratch)(const Product &a);  // floats that `run` needs
    void (*run)(const Product &a, int64_t first, int64_t last, int64_t left, int64_t right, float *scratch);
};
