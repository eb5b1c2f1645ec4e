// Attention in bfloat16 with a running softmax (Dao et al. 2022; Milakov and Gimelshein 2018) for processors that multiply
// bfloat16 matrices: compiled once for AMX and once for AVX512's pairwise products. Sums, maxima and exponentials are float32.
//
// A panel is 32 queries. For each block of keys, packed once for all panels of a task, three panels are worked on side by
// side: one's scores and another's output are tile products, while the one between them takes its exponentials in vectors.
// The two kinds of instructions do not depend on each other there, so that the processor may run them at the same time.
// D width of queries and keys, E of values; wide_D and wide_E the same up to whole tiles, with zeros.
#include <cmath>

#include "sfumato.h"
#include "tiles.h"

namespace {

constexpr int64_t PANEL = 2 * TILE;
constexpr int64_t BLOCK = 128;           // most keys at a time: three panels' scores about fill a first cache of 48 KB
constexpr int64_t ROW = BLOCK + TILE;    // floats from a query's scores to the next one's, an odd number of cache lines
constexpr int64_t PARTS = 4;             // into which the work on a panel is cut to be interleaved
constexpr float HIDDEN = -1e30f;         // a maximum before any key was seen
constexpr float LOG2E = 1.44269504f;
constexpr float LEAST = 1e-30f;          // least factor of the scores: 0 would make a number of a hidden key's infinity

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one panel carries from one block of keys to the next, and how much of it the last block left.
struct Panel {
    float most[PANEL], sum[PANEL], keep[PANEL];
};

struct Shape {
    int64_t panels, block, wide_D, wide_E;
    int64_t keys, values, scores, lanes, queries, outputs, states, total;  // places in the scratch, in floats
    Shape(const Attention &a, int64_t count) {
        panels = (count + PANEL - 1) / PANEL;
        block = least(round_up(a.K, DEPTH), BLOCK);
        wide_D = round_up(a.D, DEPTH), wide_E = round_up(a.E, TILE);
        int64_t at = 0;
        auto take = [&](int64_t floats) { int64_t here = at; at += round_up(floats, 16); return here; };
        keys = take(block * wide_D / 2);
        values = take(block * wide_E / 2);
        scores = take(3 * PANEL * ROW);
        lanes = take(PANEL * TILE);
        queries = take(panels * PANEL * wide_D / 2);
        outputs = take(panels * PANEL * wide_E);
        states = take(panels * (int64_t)(sizeof(Panel) / sizeof(float)));
        total = at;
    }
};

// Rows of queries one after the other, with the opposite sign if `minus`; rows from `have` on are 0.
void pack_queries(const uint16_t *from, int64_t row, int64_t col, int64_t have, int64_t D, int64_t wide_D, bool minus,
                  uint16_t *to) {
    typedef uint16_t Half32 __attribute__((vector_size(64)));
    for (int64_t r = 0; r < PANEL; r++) {
        for (int64_t d = 0; d < wide_D; d += DEPTH, to += DEPTH) {
            Half32 h = some<Half32>(from + r * row + d * col, r < have ? D - d : 0, col);
            if (minus) h ^= 0x8000;
            memcpy(to, &h, sizeof h);
        }
    }
}

// Keys as the right factor of `product`: a column a key, from `have` on 0.
void pack_keys(const uint16_t *from, int64_t row, int64_t col, int64_t have, int64_t keys, int64_t D, int64_t wide_D,
               uint16_t *to) {
    for (int64_t key = 0; key < keys; key += TILE) {
        for (int64_t d = 0; d < wide_D; d += DEPTH, to += FACTORS) {
            Word square[TILE];
            for (int64_t i = 0; i < TILE; i++) {
                square[i] = some<Word>(from + (key + i) * row + d * col, key + i < have ? D - d : 0, col);
            }
            transpose16(square);
            memcpy(to, square, sizeof square);
        }
    }
}

// Values as the right factor of `product`: a row a key, from `have` on 0.
void pack_values(const uint16_t *from, int64_t row, int64_t col, int64_t have, int64_t keys, int64_t E, uint16_t *to) {
    for (int64_t e = 0; e < E; e += TILE) {
        for (int64_t key = 0; key < keys; key += 2, to += DEPTH) {
            const uint16_t *p = from + key * row + e * col;
            Half first = some<Half>(p, key < have ? E - e : 0, col);
            Half second = some<Half>(p + row, key + 1 < have ? E - e : 0, col);
            Word both = __builtin_convertvector(first, Word) | __builtin_convertvector(second, Word) << 16;
            memcpy(to, &both, sizeof both);
        }
    }
}

// A block of packed keys and values against the panels of a task; `part` counts from 0 to PARTS - 1.
struct Block {
    const Attention &a;
    const Shape &s;
    float *scratch;
    int64_t b, h, first, count;  // the task's queries
    int64_t key, have, keys;     // the block's first key, how many there are, and with the padding
    float factor;                // from products to scores in units of log 2

    float *scores(int64_t panel) const { return scratch + s.scores + panel % 3 * PANEL * ROW; }
    float *output(int64_t panel) const { return scratch + s.outputs + panel * PANEL * s.wide_E; }
    Panel &state(int64_t panel) const { return ((Panel *)(scratch + s.states))[panel]; }
    bool masked(int64_t panel) const {
        return a.mask_kind != NO_MASK || (a.causal && key + have > first + panel * PANEL + 1);
    }

    void multiply_keys(int64_t panel, int64_t part) const {
        const uint16_t *q = (const uint16_t *)(scratch + s.queries) + panel * PANEL * s.wide_D;
        const uint16_t *k = (const uint16_t *)(scratch + s.keys);
        int64_t n = keys / PANEL;
        for (int64_t i = part * n / PARTS; i < (part + 1) * n / PARTS; i++) {
            product<2>(q, s.wide_D, k + i * PANEL * s.wide_D, TILE * s.wide_D, s.wide_D / DEPTH,
                       scores(panel) + i * PANEL, ROW, false);
        }
    }

    void multiply_values(int64_t panel, int64_t part) const {
        const uint16_t *v = (const uint16_t *)(scratch + s.values), *weights = (const uint16_t *)scores(panel);
        int64_t n = (s.wide_E + PANEL - 1) / PANEL;
        for (int64_t i = part * n / PARTS; i < (part + 1) * n / PARTS; i++) {
            auto run = (i + 1) * PANEL <= s.wide_E ? product<2> : product<1>;
            run(weights, 2 * ROW, v + i * PANEL * keys, TILE * keys, keys / DEPTH, output(panel) + i * PANEL, s.wide_E, true);
        }
    }

    // What the mask says of the products, which become scores.
    void mask(int64_t panel) const {
        const int64_t *stride = a.mask_stride;
        int64_t query = first + panel * PANEL, rows = least(PANEL, count - panel * PANEL);
        for (int64_t r = 0; r < rows; r++) {
            float *p = scores(panel) + r * ROW;
            int64_t at = b * stride[0] + h * stride[1] + (query + r) * stride[2] + key * stride[3];
            for (int64_t i = 0; i < have; i++, at += stride[3]) {
                bool seen = !a.causal || key + i <= query + r;
                if (a.mask_kind == BOOLEAN) seen = seen && ((const uint8_t *)a.mask)[at];
                p[i] *= factor;
                if (a.mask_kind == ADDITIVE) p[i] += LOG2E * ((const float *)a.mask)[at];
                if (!seen) p[i] = -__builtin_inff();
            }
        }
    }

    // The panel's new maxima, and what of the earlier sums is left by them.
    void follow(int64_t panel) const {
        if (masked(panel)) mask(panel);
        Panel &p = state(panel);
        float scale = masked(panel) ? 1.0f : factor;
        for (int64_t half = 0; half < PANEL; half += TILE) {
            float *from = scores(panel) + half * ROW;
            for (int64_t i = 0; i < TILE; i++) {
                for (int64_t j = have; j < keys; j += TILE) store(from + i * ROW + j, splat(-__builtin_inff()));
            }
            Vec best[TILE];
#pragma GCC unroll 16
            for (int64_t i = 0; i < TILE; i++) best[i] = splat(HIDDEN);
            for (int64_t j = 0; j < keys; j += TILE) {
#pragma GCC unroll 16
                for (int64_t i = 0; i < TILE; i++) best[i] = larger(load(from + i * ROW + j), best[i]);
            }
            Vec before = load(p.most + half);
            Vec now = larger(across(best, larger) * scale, before);
            store(p.keep + half, exp2(before - now));
            store(p.most + half, now);
        }
    }

    // Scores become weights, which take their place; the output so far is scaled by what is left of it.
    void weigh(int64_t panel, int64_t part) const {
        const Panel &p = state(panel);
        float scale = masked(panel) ? 1.0f : factor, *lanes = scratch + s.lanes;
        for (int64_t r = part * PANEL / PARTS; r < (part + 1) * PANEL / PARTS; r++) {
            const float *from = scores(panel) + r * ROW;
            uint16_t *to = (uint16_t *)from;
            Vec less = splat(-p.most[r]), even{}, odd{};
            for (int64_t j = 0; j < keys; j += DEPTH) {
                Vec x = rough_exp2(load(from + j) * scale + less), y = rough_exp2(load(from + j + TILE) * scale + less);
                store_pair(to + j, x, y);
                even += x;
                odd += y;
            }
            store(lanes + r * TILE, even + odd);
            if (p.keep[r] == 1.0f) continue;
            float *o = output(panel) + r * s.wide_E;
            for (int64_t e = 0; e < s.wide_E; e += TILE) store(o + e, load(o + e) * p.keep[r]);
        }
    }

    void add_weights(int64_t panel) const {
        Panel &p = state(panel);
        for (int64_t half = 0; half < PANEL; half += TILE) {
            Vec rows[TILE];
            memcpy(rows, scratch + s.lanes + half * TILE, sizeof rows);
            Vec sum = across(rows, [](Vec x, Vec y) { return x + y; });
            store(p.sum + half, load(p.sum + half) * load(p.keep + half) + sum);
        }
    }

    void run() const {
        for (int64_t i = 0; i < s.panels + 2; i++) {
            bool weighing = i >= 1 && i - 1 < s.panels;
            if (weighing) follow(i - 1);
            for (int64_t part = 0; part < PARTS; part++) {
                if (i < s.panels) multiply_keys(i, part);
                if (i >= 2) multiply_values(i - 2, part);
                if (weighing) weigh(i - 1, part);
            }
            if (weighing) add_weights(i - 1);
        }
    }
};

// Output over sum, for the queries of a panel; a query that saw no key gets 0.
void finish(const float *from, const Panel &p, int64_t rows, int64_t E, int64_t wide_E, uint16_t *to, int64_t row,
            int64_t col) {
    for (int64_t r = 0; r < rows; r++) {
        float share = p.sum[r] == 0 ? 0.0f : 1.0f / p.sum[r];
        for (int64_t e = 0; e < E; e += TILE) {
            store_some(to + r * row + e * col, load(from + r * wide_E + e) * share, E - e, col);
        }
    }
}

void run(const Attention &a, int64_t b, int64_t h, int64_t first, int64_t count, float *scratch) {
    Shape s(a, count);
    auto head = [&](const void *p, const int64_t *stride) { return (const uint16_t *)p + b * stride[0] + h * stride[1]; };
    const uint16_t *q = head(a.q, a.q_stride) + first * a.q_stride[2];
    const uint16_t *k = head(a.k, a.k_stride), *v = head(a.v, a.v_stride);
    uint16_t *out = (uint16_t *)head(a.out, a.out_stride) + first * a.out_stride[2];
    float factor = std::fabs(a.scale) * LOG2E;
    Block block{a, s, scratch, b, h, first, count, 0, 0, 0, factor < LEAST ? LEAST : factor};
    for (int64_t i = 0; i < s.panels; i++) {
        pack_queries(q + i * PANEL * a.q_stride[2], a.q_stride[2], a.q_stride[3], least(PANEL, count - i * PANEL), a.D,
                     s.wide_D, a.scale < 0, (uint16_t *)(scratch + s.queries) + i * PANEL * s.wide_D);
        Panel &p = block.state(i);
        for (int64_t r = 0; r < PANEL; r++) p.most[r] = HIDDEN, p.sum[r] = 0.0f;
    }
    memset(scratch + s.outputs, 0, 4 * s.panels * PANEL * s.wide_E);
    int64_t end = a.causal ? least(a.K, first + count) : a.K;
    Tiles tiles;
    for (block.key = 0; block.key < end; block.key += s.block) {
        block.have = least(s.block, end - block.key);
        block.keys = round_up(block.have, DEPTH);
        pack_keys(k + block.key * a.k_stride[2], a.k_stride[2], a.k_stride[3], block.have, block.keys, a.D, s.wide_D,
                  (uint16_t *)(scratch + s.keys));
        pack_values(v + block.key * a.v_stride[2], a.v_stride[2], a.v_stride[3], block.have, block.keys, a.E,
                    (uint16_t *)(scratch + s.values));
        block.run();
    }
    for (int64_t i = 0; i < s.panels; i++) {
        finish(block.output(i), block.state(i), least(PANEL, count - i * PANEL), a.E, s.wide_E,
               out + i * PANEL * a.out_stride[2], a.out_stride[2], a.out_stride[3]);
    }
}

size_t scratch(const Attention &a, int64_t count) { return Shape(a, count).total; }

}  // namespace

extern const AttentionKernel KERNEL;
const AttentionKernel KERNEL = {PANEL, scratch, run};
