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
struct GroupNorm {
    const float *x, *weight, *bias;
    float *y;
    int64_t B, pixels, C, groups;
    float eps;
    int32_t silu;
};

// GEGLU: x (rows, 2 * width) -> y (rows, width) = x[:, :width] * gelu(x[:, width:]), rows of x `stride` apart.
struct Geglu {
    const float *x;
    float *y;
    int64_t rows, width, stride;
};

// One instruction set's share of the two above.
struct PointwiseKernel {
    // Sums, then sums of squares, of each of the C channels: 2 * C numbers.
    void (*moments)(const float *x, int64_t pixels, int64_t C, double *sums);
    // y = scale * x + shift by channel, then SiLU if `silu`.
    void (*normalise)(const float *x, float *y, int64_t pixels, int64_t C, const float *scale, const float *shift,
                      bool silu);
    // y = x * gelu(gate), n numbers.
    void (*geglu)(const float *x, const float *gate, float *y, int64_t n);
};
