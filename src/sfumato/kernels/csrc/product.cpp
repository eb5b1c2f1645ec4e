// Products of pictures or tokens with a matrix, convolutions among them, compiled once for each instruction set: WIDTH
// floats a vector, ROWS x 2 vectors of sums in registers, KERNEL the name of the table it exports.
//
// A convolution is a product whose rows are gathered: each tap of the filter reads another pixel, those outside of the
// picture read zeros, so nothing is laid out anew. A panel is 2 * WIDTH columns of the answer, with the weights of a
// stretch of the inner dimension one column a lane; weights come so packed, or are packed a stretch at a time.
// K inner numbers (taps x channels), N columns.
#include "sfumato.h"
#include "vec.h"

namespace {

constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t DEPTH = 384;          // inner numbers at a time: a panel of them is half of a first cache
constexpr int64_t HEIGHT = 16 * ROWS;   // rows at a time: DEPTH numbers of each stay in the second cache
constexpr int64_t PLAIN_HEIGHT = 512;   // the same where each time weights have to be packed

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t parts(int64_t n, int64_t most) { return (n + most - 1) / most; }

INLINE Vec load_wide(const float *p, int64_t n) {
    if (n >= WIDTH) return load(p);
    Vec v{};
    if (n > 0) memcpy(&v, p, 4 * n);
    return v;
}

INLINE void store_wide(float *p, Vec v, int64_t n) {
    if (n >= WIDTH) store(p, v);
    else if (n > 0) memcpy(p, &v, 4 * n);
}

// Where the rows begin that an answer's rows are made of, a tap after the other; `height` is the distance of taps.
struct Gathered {
    const float **at;
    int64_t height;
};

void gather(const Product &a, int64_t first, int64_t count, const float *zeros, Gathered g) {
    int64_t H = a.H << a.doubled, W = a.W << a.doubled;  // as the filter sees the picture
    for (int64_t i = 0; i < count; i++) {
        int64_t m = first + i, ox = m % a.out_W, oy = m / a.out_W % a.out_H, b = m / a.out_W / a.out_H;
        for (int64_t u = 0; u < a.kernel; u++) {
            int64_t y = oy * a.stride + u - a.padding;
            for (int64_t v = 0; v < a.kernel; v++) {
                int64_t x = ox * a.stride + v - a.padding;
                bool inside = y >= 0 && y < H && x >= 0 && x < W;
                int64_t row = (b * a.H + (y >> a.doubled)) * a.W + (x >> a.doubled);
                g.at[(u * a.kernel + v) * g.height + i] = inside ? a.x + row * a.x_stride : zeros;
            }
        }
    }
}

// R rows of a panel: y = what earlier stretches gave + x[lo ... hi - 1] * panel, in the end with bias and `add`.
template <int R>
void tile(const Product &a, const Gathered &g, int64_t i, int64_t row, int64_t column, int64_t lo, int64_t hi,
          const float *panel) {
    int64_t wide = a.N - column, taps = a.kernel * a.kernel;
    float *y = a.y + row * a.y_stride + column;
    Vec sums[R][2]{};
    if (lo > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            sums[r][0] = load_wide(y + r * a.y_stride, wide);
            sums[r][1] = load_wide(y + r * a.y_stride + WIDTH, wide - WIDTH);
        }
    }
    int64_t tap = lo / a.C, c = lo % a.C;
    for (int64_t k = lo; k < hi; tap++, c = 0) {
        int64_t depth = least(hi - k, a.C - c);
        const float *x[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) x[r] = g.at[tap * g.height + i + r] + c;
        for (int64_t j = 0; j < depth; j++, panel += PANEL) {
            Vec p0 = load(panel), p1 = load(panel + WIDTH);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                Vec v = splat(x[r][j]);
                sums[r][0] += v * p0;
                sums[r][1] += v * p1;
            }
        }
        k += depth;
    }
    if (hi == taps * a.C) {
        Vec b0{}, b1{};
        if (a.bias) b0 = load_wide(a.bias + column, wide), b1 = load_wide(a.bias + column + WIDTH, wide - WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            sums[r][0] += b0;
            sums[r][1] += b1;
            if (a.add) {
                const float *p = a.add + (row + r) * a.add_stride + column;
                sums[r][0] += load_wide(p, wide);
                sums[r][1] += load_wide(p + WIDTH, wide - WIDTH);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store_wide(y + r * a.y_stride, sums[r][0], wide);
        store_wide(y + r * a.y_stride + WIDTH, sums[r][1], wide - WIDTH);
    }
}

// to[k * PANEL + n] = from[n * K + k] for n < PANEL; columns from `have` on are 0.
void pack(const float *from, int64_t K, int64_t depth, int64_t have, float *to) {
    for (int64_t k = 0; k < depth; k += 8) {
        int64_t deep = least(8, depth - k);
        for (int64_t n = 0; n < PANEL; n += 8) {
            Vec8 square[8];
            for (int64_t i = 0; i < 8; i++) {
                const float *p = from + (n + i) * K + k;
                if (n + i < have && deep == 8) {
                    square[i] = load8(p);
                } else {
                    square[i] = Vec8{};
                    if (n + i < have) memcpy(&square[i], p, 4 * deep);
                }
            }
            transpose8(square);
            for (int64_t j = 0; j < deep; j++) store8(to + (k + j) * PANEL + n, square[j]);
        }
    }
}

#define BY_ROWS(n, ...) \
    switch (n) { case 1: tile<1>(__VA_ARGS__); break; case 2: tile<2>(__VA_ARGS__); break; \
                 case 3: tile<3>(__VA_ARGS__); break; case 4: tile<4>(__VA_ARGS__); break; \
                 case 5: tile<5>(__VA_ARGS__); break; FURTHER_ROWS(__VA_ARGS__) }
#if ROWS == 6
#define FURTHER_ROWS(...) default: tile<6>(__VA_ARGS__);
#else
#define FURTHER_ROWS(...) \
    case 6: tile<6>(__VA_ARGS__); break; case 7: tile<7>(__VA_ARGS__); break; case 8: tile<8>(__VA_ARGS__); break; \
    case 9: tile<9>(__VA_ARGS__); break; case 10: tile<10>(__VA_ARGS__); break; case 11: tile<11>(__VA_ARGS__); break; \
    default: tile<12>(__VA_ARGS__);
#endif

int64_t height_of(const Product &a) { return a.packed ? HEIGHT : PLAIN_HEIGHT; }

size_t scratch(const Product &a) {
    int64_t pointers = a.kernel * a.kernel * height_of(a) * (int64_t)(sizeof(float *) / sizeof(float));
    return DEPTH * PANEL + pointers + a.C + WIDTH;
}

void run(const Product &a, int64_t first, int64_t last, int64_t left, int64_t right, float *scratch) {
    int64_t K = a.kernel * a.kernel * a.C, stretches = parts(K, DEPTH), height = height_of(a);
    Gathered g{(const float **)(scratch + DEPTH * PANEL), height};
    float *zeros = scratch + DEPTH * PANEL + a.kernel * a.kernel * height * (int64_t)(sizeof(float *) / sizeof(float));
    memset(zeros, 0, 4 * a.C);
    for (int64_t row = first; row < last; row += height) {
        int64_t count = least(height, last - row), tiles = parts(count, ROWS);
        gather(a, row, count, zeros, g);
        for (int64_t s = 0; s < stretches; s++) {
            int64_t lo = s * K / stretches, hi = (s + 1) * K / stretches;
            for (int64_t column = left; column < right; column += PANEL) {
                const float *panel = a.weight + column * K + lo * PANEL;
                if (!a.packed) {
                    pack(a.weight + column * K + lo, K, hi - lo, a.N - column, scratch);
                    panel = scratch;
                }
                for (int64_t t = 0; t < tiles; t++) {
                    int64_t i = t * count / tiles, R = (t + 1) * count / tiles - i;
                    BY_ROWS(R, a, g, i, row + i, column, lo, hi, panel)
                }
            }
        }
    }
}

}  // namespace

extern const ProductKernel KERNEL;
const ProductKernel KERNEL = {PANEL, scratch, run};
