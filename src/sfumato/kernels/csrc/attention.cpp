// Attention with a running softmax (Dao et al. 2022; Milakov and Gimelshein 2018), compiled once for each instruction
// set: WIDTH floats a vector, ROWS x 2 vectors of sums in registers, KERNEL the name of the table it exports.
//
// A panel is 2 * WIDTH queries, one a lane. Scores are kept transposed, a key a row, so that maximum, sum and rescaling
// of the softmax work lane by lane and keys and values are broadcast: no sum across lanes anywhere.
// D width of queries and keys, E of values, K keys, `block` keys at a time.
#include "sfumato.h"
#include "vec.h"

namespace {

constexpr int64_t PANEL = 2 * WIDTH;
constexpr int64_t DEPTH = 256;       // of a product along D at a time: its queries stay in the first cache
constexpr int64_t BLOCK = 192;       // most keys at a time: the scores of a panel, too
constexpr int64_t MEMORY = 65536;    // floats of keys and values at a time: half of a second cache of 512 KB
constexpr float HIDDEN = -1e30f;     // a maximum before any key was seen
constexpr float LOG2E = 1.44269504f;
constexpr int64_t SLACK = 16;        // floats that packing may write beyond its end

INLINE Vec8 eight(const float *p) { return load8(p); }
INLINE Vec8 eight(const uint16_t *p) {
    typedef uint16_t Half8 __attribute__((vector_size(16)));
    typedef uint32_t Word8 __attribute__((vector_size(32)));
    Half8 h;
    memcpy(&h, p, sizeof h);
    return (Vec8)(__builtin_convertvector(h, Word8) << 16);
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
INLINE int64_t tiles(int64_t n) { return (n + ROWS - 1) / ROWS; }

// to[c * ld + r] = factor * from[r * row + c * col] for c < cols, r < rows; rows from `have` on repeat the last one.
// Each column's write may reach up to 7 floats too far: into the next one, which comes later, at the end into the slack.
template <class T>
void pack_transposed(const T *from, int64_t row, int64_t col, int64_t have, int64_t rows, int64_t cols, float factor,
                     float *to, int64_t ld) {
    constexpr int64_t SQUARES = (PANEL > ROWS ? PANEL : ROWS + 7) / 8;
    int64_t squares = (rows + 7) / 8;
    for (int64_t c = 0; c < cols; c += 8) {
        int64_t wide = least(8, cols - c);
        Vec8 square[SQUARES][8];
        for (int64_t s = 0; s < squares; s++) {
            for (int64_t i = 0; i < 8; i++) {
                const T *p = from + least(8 * s + i, have - 1) * row + c * col;
                if (col == 1 && wide == 8) {
                    square[s][i] = eight(p) * factor;
                } else {
                    Vec8 v{};
                    for (int64_t j = 0; j < wide; j++) v[j] = to_float(p[j * col]) * factor;
                    square[s][i] = v;
                }
            }
            transpose8(square[s]);
        }
        for (int64_t j = 0; j < wide; j++) {
            for (int64_t s = 0; s < squares; s++) store8(to + (c + j) * ld + 8 * s, square[s][j]);
        }
    }
}

// Values as column tiles: to[lo * keys + key * n + i] = from[key][lo + i] for the n columns of the tile that starts at lo.
template <class T>
void pack_values(const T *from, int64_t row, int64_t col, int64_t keys, int64_t E, float *to) {
    int64_t n = tiles(E);
    for (int64_t i = 0; i < n; i++) {
        int64_t lo = i * E / n, wide = (i + 1) * E / n - lo;
        float *p = to + lo * keys;
        for (int64_t key = 0; key < keys; key++, p += wide) {
            const T *q = from + key * row + lo * col;
            if (col == 1 && lo + 8 <= E) {
                store8(p, eight(q));
                for (int64_t j = 8; j < wide; j++) p[j] = to_float(q[j]);
            } else {
                for (int64_t j = 0; j < wide; j++) p[j] = to_float(q[j * col]);
            }
        }
    }
}

// sums[R][2] += a[depth][R] (broadcast) * b[depth][PANEL], the inner loop of everything here.
template <int R>
INLINE void multiply(const float *a, const float *b, int64_t depth, Vec sums[R][2]) {
    for (int64_t i = 0; i < depth; i++, a += R, b += PANEL) {
        Vec b0 = load(b), b1 = load(b + WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vec x = splat(a[r]);
            sums[r][0] += x * b0;
            sums[r][1] += x * b1;
        }
    }
}

// R keys' scores of a panel, added to what earlier parts of D gave; `most` follows their maximum.
template <int R>
void score_tile(const float *keys, const float *queries, int64_t depth, bool first, float *scores, Vec most[2]) {
    Vec sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        sums[r][0] = first ? Vec{} : load(scores + r * PANEL);
        sums[r][1] = first ? Vec{} : load(scores + r * PANEL + WIDTH);
    }
    multiply<R>(keys, queries, depth, sums);
    Vec m0 = most[0], m1 = most[1];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(scores + r * PANEL, sums[r][0]);
        store(scores + r * PANEL + WIDTH, sums[r][1]);
        m0 = larger(sums[r][0], m0);
        m1 = larger(sums[r][1], m1);
    }
    most[0] = m0, most[1] = m1;
}

// R columns of the output of a panel: out = out * keep + values^T probabilities.
template <int R>
void value_tile(const float *values, const float *probabilities, int64_t keys, const Vec keep[2], float *out) {
    Vec sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        sums[r][0] = load(out + r * PANEL) * keep[0];
        sums[r][1] = load(out + r * PANEL + WIDTH) * keep[1];
    }
    multiply<R>(values, probabilities, keys, sums);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
        store(out + r * PANEL, sums[r][0]);
        store(out + r * PANEL + WIDTH, sums[r][1]);
    }
}

// Calls f<n>(...) for n = 1 ... ROWS.
#if ROWS == 6
#define BY_ROWS(n, f, ...) \
    switch (n) { case 1: f<1>(__VA_ARGS__); break; case 2: f<2>(__VA_ARGS__); break; case 3: f<3>(__VA_ARGS__); break; \
                 case 4: f<4>(__VA_ARGS__); break; case 5: f<5>(__VA_ARGS__); break; default: f<6>(__VA_ARGS__); }
#else
#define BY_ROWS(n, f, ...) \
    switch (n) { case 1: f<1>(__VA_ARGS__); break; case 2: f<2>(__VA_ARGS__); break; case 3: f<3>(__VA_ARGS__); break; \
                 case 4: f<4>(__VA_ARGS__); break; case 5: f<5>(__VA_ARGS__); break; case 6: f<6>(__VA_ARGS__); break; \
                 case 7: f<7>(__VA_ARGS__); break; case 8: f<8>(__VA_ARGS__); break; case 9: f<9>(__VA_ARGS__); break; \
                 case 10: f<10>(__VA_ARGS__); break; case 11: f<11>(__VA_ARGS__); break; default: f<12>(__VA_ARGS__); }
#endif

// What one panel carries from one block of keys to the next.
struct Panel {
    float most[PANEL], sum[PANEL];
};

struct Shape {
    int64_t block;              // keys at a time
    int64_t panels;
    int64_t keys, values, scores, queries, outputs, states, total;  // places in the scratch, in floats
    Shape(const Attention &a, int64_t count) {
        int64_t fit = MEMORY / (a.D + a.E) / ROWS * ROWS;
        block = least(a.K, fit < 4 * ROWS ? 4 * ROWS : fit > BLOCK ? BLOCK : fit);
        panels = (count + PANEL - 1) / PANEL;
        int64_t at = 0;
        auto take = [&](int64_t floats) { int64_t here = at; at += round_up(floats + SLACK, 16); return here; };
        keys = take(block * a.D);
        values = take(block * a.E);
        scores = take(block * PANEL);
        queries = take(panels * PANEL * a.D);
        outputs = take(panels * PANEL * a.E);
        states = take(panels * (int64_t)(sizeof(Panel) / sizeof(float)));
        total = at;
    }
};

// Scores (keys first, in units of log 2) of the panel's queries, with what the mask says; their maximum into `most`.
void masked(const Attention &a, int64_t b, int64_t h, int64_t query, int64_t rows, int64_t key, int64_t keys,
            float *scores, Vec most[2]) {
    const int64_t *s = a.mask_stride;
    int64_t origin = b * s[0] + h * s[1] + query * s[2];
    Vec m0 = splat(HIDDEN), m1 = splat(HIDDEN);
    for (int64_t i = 0; i < keys; i++, scores += PANEL) {
        int64_t at = origin + (key + i) * s[3];
        for (int64_t r = 0; r < rows; r++) {
            bool seen = !a.causal || key + i <= query + r;
            if (a.mask_kind == BOOLEAN) seen = seen && ((const uint8_t *)a.mask)[at + r * s[2]];
            if (a.mask_kind == ADDITIVE) scores[r] += LOG2E * ((const float *)a.mask)[at + r * s[2]];
            if (!seen) scores[r] = -__builtin_inff();
        }
        m0 = larger(load(scores), m0);
        m1 = larger(load(scores + WIDTH), m1);
    }
    most[0] = m0, most[1] = m1;
}

// One panel against one block of keys.
void panel_block(const Attention &a, int64_t b, int64_t h, int64_t query, int64_t rows, int64_t key, int64_t keys,
                 const float *packed_k, const float *packed_v, float *scores, const float *q, float *out, Panel &p) {
    Vec most[2];
    int64_t n = tiles(keys);
    for (int64_t d = 0; d < a.D; d += DEPTH) {
        int64_t depth = least(DEPTH, a.D - d);
        most[0] = most[1] = splat(HIDDEN);  // only the last part's maximum is one of whole scores
        for (int64_t i = 0; i < n; i++) {
            int64_t lo = i * keys / n, R = (i + 1) * keys / n - lo;
            BY_ROWS(R, score_tile, packed_k + lo * a.D + d * R, q + d * PANEL, depth, d == 0,
                    scores + lo * PANEL, most)
        }
    }
    if (a.mask_kind != NO_MASK || (a.causal && key + keys > query + 1)) masked(a, b, h, query, rows, key, keys, scores, most);
    Vec keep[2];
    for (int i = 0; i < 2; i++) {
        Vec before = load(p.most + i * WIDTH);
        Vec now = larger(most[i], before);
        keep[i] = exp2(before - now);
        store(p.most + i * WIDTH, now);
        most[i] = now;
    }
    Vec s0 = load(p.sum) * keep[0], s1 = load(p.sum + WIDTH) * keep[1];
    for (int64_t i = 0; i < keys; i++) {
        Vec p0 = exp2(load(scores + i * PANEL) - most[0]), p1 = exp2(load(scores + i * PANEL + WIDTH) - most[1]);
        store(scores + i * PANEL, p0);
        store(scores + i * PANEL + WIDTH, p1);
        s0 += p0;
        s1 += p1;
    }
    store(p.sum, s0);
    store(p.sum + WIDTH, s1);
    n = tiles(a.E);
    for (int64_t i = 0; i < n; i++) {
        int64_t lo = i * a.E / n, R = (i + 1) * a.E / n - lo;
        BY_ROWS(R, value_tile, packed_v + lo * keys, scores, keys, keep, out + lo * PANEL)
    }
}

// out[row][e] = from[e][row] / sum[row]; a query that saw no key gets 0.
template <class T>
void finish(const float *from, const Panel &p, int64_t rows, int64_t E, T *to, int64_t row, int64_t col) {
    float share[PANEL];
    for (int64_t r = 0; r < PANEL; r++) share[r] = p.sum[r] == 0 ? 0.0f : 1.0f / p.sum[r];
    for (int64_t e = 0; e < E; e += 8) {
        int64_t wide = least(8, E - e);
        for (int64_t r = 0; r < rows; r += 8) {
            Vec8 square[8];
            for (int64_t i = 0; i < 8; i++) square[i] = load8(from + (e + least(i, wide - 1)) * PANEL + r) * load8(share + r);
            transpose8(square);
            for (int64_t i = 0; i < least(8, rows - r); i++) {
                T *at = to + (r + i) * row + e * col;
                if (sizeof(T) == 4 && col == 1 && wide == 8) {
                    memcpy(at, &square[i], 32);
                } else {
                    for (int64_t j = 0; j < wide; j++) from_float(square[i][j], at + j * col);
                }
            }
        }
    }
}

template <class T>
void run_as(const Attention &a, int64_t b, int64_t h, int64_t first, int64_t count, float *scratch) {
    Shape s(a, count);
    auto head = [&](const void *p, const int64_t *stride) { return (const T *)p + b * stride[0] + h * stride[1]; };
    const T *q = head(a.q, a.q_stride) + first * a.q_stride[2], *k = head(a.k, a.k_stride), *v = head(a.v, a.v_stride);
    T *out = (T *)head(a.out, a.out_stride) + first * a.out_stride[2];
    Panel *states = (Panel *)(scratch + s.states);
    for (int64_t i = 0; i < s.panels; i++) {
        pack_transposed(q + i * PANEL * a.q_stride[2], a.q_stride[2], a.q_stride[3], least(PANEL, count - i * PANEL), PANEL,
                        a.D, a.scale * LOG2E, scratch + s.queries + i * PANEL * a.D, PANEL);
        for (int64_t r = 0; r < PANEL; r++) states[i].most[r] = HIDDEN, states[i].sum[r] = 0.0f;
    }
    memset(scratch + s.outputs, 0, 4 * s.panels * PANEL * a.E);
    int64_t end = a.causal ? least(a.K, first + count) : a.K;
    for (int64_t key = 0; key < end; key += s.block) {
        int64_t keys = least(s.block, end - key), n = tiles(keys);
        for (int64_t i = 0; i < n; i++) {
            int64_t lo = i * keys / n, R = (i + 1) * keys / n - lo;
            pack_transposed(k + (key + lo) * a.k_stride[2], a.k_stride[2], a.k_stride[3], R, R, a.D, 1.0f,
                            scratch + s.keys + lo * a.D, R);
        }
        pack_values(v + key * a.v_stride[2], a.v_stride[2], a.v_stride[3], keys, a.E, scratch + s.values);
        for (int64_t i = 0; i < s.panels; i++) {
            int64_t query = first + i * PANEL, rows = least(PANEL, count - i * PANEL);
            panel_block(a, b, h, query, rows, key, keys, scratch + s.keys, scratch + s.values, scratch + s.scores,
                        scratch + s.queries + i * PANEL * a.D, scratch + s.outputs + i * PANEL * a.E, states[i]);
        }
    }
    for (int64_t i = 0; i < s.panels; i++) {
        finish(scratch + s.outputs + i * PANEL * a.E, states[i], least(PANEL, count - i * PANEL), a.E,
               out + i * PANEL * a.out_stride[2], a.out_stride[2], a.out_stride[3]);
    }
}

void run(const Attention &a, int64_t b, int64_t h, int64_t first, int64_t count, float *scratch) {
    if (a.format == BFLOAT16) run_as<uint16_t>(a, b, h, first, count, scratch);
    else run_as<float>(a, b, h, first, count, scratch);
}

size_t scratch(const Attention &a, int64_t count) { return Shape(a, count).total; }

}  // namespace

extern const AttentionKernel KERNEL;
const AttentionKernel KERNEL = {PANEL, scratch, run};
