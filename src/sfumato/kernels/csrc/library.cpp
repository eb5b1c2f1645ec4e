// The entry points that Python calls: which instruction sets there are, threads, and one function for each kernel.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "sfumato.h"

extern const AttentionKernel attention_avx2, attention_avx512, tiles_avx512bf16, tiles_amx;
extern const PointwiseKernel pointwise_avx2[2], pointwise_avx512[2];
extern const ProductKernel product_avx2, product_avx512;

namespace {

// The kernels of an instruction set, by format; null where the compiler could not make them.
struct Kernels {
    const AttentionKernel *attention[2];
    const PointwiseKernel *pointwise;
    const ProductKernel *product;  // only for float32
};

#ifdef HAVE_AVX512BF16
#define PAIRS &tiles_avx512bf16
#else
#define PAIRS nullptr
#endif
#ifdef HAVE_AMX
#define TILES &tiles_amx
#else
#define TILES nullptr
#endif

enum Isa { NONE, AVX2, AVX512, AVX512BF16, AMX, ISAS };  // library.py counts the same way
constexpr Kernels KERNELS[ISAS] = {
    {},
    {{&attention_avx2, &attention_avx2}, pointwise_avx2, &product_avx2},
    {{&attention_avx512, &attention_avx512}, pointwise_avx512, &product_avx512},
    {{&attention_avx512, PAIRS}, pointwise_avx512, &product_avx512},
    {{&attention_avx512, TILES}, pointwise_avx512, &product_avx512},
};

constexpr bool known(int isa, int format) { return isa > NONE && isa < ISAS && (format == FLOAT32 || format == BFLOAT16); }

// GNU OpenMP's entry to a parallel region. Taking PyTorch's own by address means one pool of threads, not two.
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

struct Work {
    void (*step)(void *, int64_t);
    void *data;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
};

void work_off(void *p) {
    Work &work = *(Work *)p;
    try {
        for (int64_t i; (i = work.next++) < work.count;) work.step(work.data, i);
    } catch (const std::bad_alloc &) {
        work.failed = true;
    }
}

// step(0) ... step(count - 1) in any order on some threads; false when memory ran out.
template <class F>
bool for_each(int64_t count, int threads, void *parallel, F step) {
    Work work{[](void *p, int64_t i) { (*(F *)p)(i); }, &step, count};
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        work_off(&work);
    } else if (parallel) {
        ((Parallel)parallel)(work_off, &work, threads, 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(work_off, &work);
        work_off(&work);
        for (auto &other : others) other.join();
    }
    return !work.failed;
}

// Memory of a thread, kept from call to call: fresh pages would cost more than what is done with them.
float *scratch(size_t floats) {
    struct Buffer {
        float *at = nullptr;
        size_t size = 0;
        ~Buffer() { free(at); }
    };
    static thread_local Buffer buffer;
    if (buffer.size < floats) {
        free(buffer.at);
        buffer.size = (floats + 1023) / 1024 * 1024;
        buffer.at = (float *)aligned_alloc(64, 4 * buffer.size);
        if (!buffer.at) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.at;
}

// Whether this CPU has the tiles, and the system lets this process use them: Linux wants to be asked, once for all threads.
bool tiles_allowed() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 24 & 1) == 0 || (d >> 22 & 1) == 0) return false;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned STATE = 3u << 17;  // configuration and contents of the tiles
    if ((low & STATE) != STATE) return false;
    constexpr long PERMISSION = 0x1023, CONTENTS = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, PERMISSION, CONTENTS) == 0;
}

bool has_pairs() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// Into how many tasks to cut `count` rows of `width` floats: enough for the threads, none too small to be worth one.
int64_t tasks(int64_t count, int64_t width, int threads) {
    int64_t worth = count * width / 16384, wanted = 4 * (int64_t)threads;
    if (threads <= 1) wanted = 1;
    int64_t n = worth < wanted ? worth : wanted;
    return n < 1 ? 1 : n > count ? count : n;
}

double number(const void *p, int32_t format, int64_t i) {
    if (format == FLOAT32) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised whenever a struct or a function changes; Python refuses another one.
EXPORT int sfumato_version() { return 3; }

// What the library was built of, for build.py to find in the file.
EXPORT const char *sfumato_mark() { return MARK; }

// The best instruction set of this CPU that there is code for: 0 none, 1 AVX2 with FMA, 2 AVX512 (F, BW, DQ, VL), 3 with
// AVX512's bfloat16 products, 4 with AMX tiles for bfloat16, too.
EXPORT int sfumato_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return NONE;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!wide) return AVX2;
    if (!has_pairs()) return AVX512;
#ifdef HAVE_AMX
    if (tiles_allowed()) return AMX;
#endif
#ifdef HAVE_AVX512BF16
    return AVX512BF16;
#else
    return AVX512;
#endif
}

// These answer 0: done; 1: no such instruction set; 2: out of memory. `parallel` is GOMP_parallel or null.
EXPORT int sfumato_attention(const Attention *a, int isa, int threads, void *parallel) {
    const AttentionKernel *k = known(isa, a->format) ? KERNELS[isa].attention[a->format] : nullptr;
    if (!k) return 1;
    int64_t heads = a->B * a->H, panels = (a->L + k->panel - 1) / k->panel;
    // Long runs of queries share the packing of keys and values; four a thread even out the end.
    int64_t most = 262144 / (a->D + a->E) / k->panel, share = heads * panels / (4 * (threads < 1 ? 1 : threads));
    int64_t run = share < most ? share : most;
    run = run < 1 ? 1 : run > panels ? panels : run;
    int64_t runs = (panels + run - 1) / run;
    int64_t size = (panels + runs - 1) / runs * k->panel;  // queries in a task
    bool done = for_each(heads * runs, threads, parallel, [&](int64_t i) {
        int64_t head = i / runs, first = i % runs * size;
        if (first >= a->L) return;
        int64_t count = a->L - first < size ? a->L - first : size;
        k->run(*a, head / a->H, head % a->H, first, count, scratch(k->scratch(*a, count)));
    });
    return done ? 0 : 2;
}

EXPORT int sfumato_group_norm(const GroupNorm *a, int isa, int threads, void *parallel) {
    if (!known(isa, a->format)) return 1;
    const PointwiseKernel *k = &KERNELS[isa].pointwise[a->format];
    int64_t C = a->C, wide = C / a->groups, size = a->format == FLOAT32 ? 4 : 2;
    if (a->B * a->pixels * C < 32768) threads = 1;  // waiting for another thread twice would cost more
    int64_t parts = tasks(a->pixels, C, threads);
    std::vector<double> sums(a->B * parts * 2 * C);
    std::vector<float> affine(a->B * 2 * C);
    auto part = [&](int64_t i, auto work) {
        int64_t b = i / parts, j = i % parts, lo = j * a->pixels / parts, hi = (j + 1) * a->pixels / parts;
        work(b, (b * a->pixels + lo) * C * size, hi - lo);
    };
    for_each(a->B * parts, threads, parallel, [&](int64_t i) {
        part(i, [&](int64_t, int64_t at, int64_t pixels) { k->moments((const char *)a->x + at, pixels, C, &sums[i * 2 * C]); });
    });
    for (int64_t b = 0; b < a->B; b++) {
        for (int64_t g = 0; g < a->groups; g++) {
            double sum = 0, square = 0, n = (double)a->pixels * wide;
            for (int64_t j = b * parts; j < (b + 1) * parts; j++) {
                for (int64_t c = g * wide; c < (g + 1) * wide; c++) sum += sums[j * 2 * C + c], square += sums[(j * 2 + 1) * C + c];
            }
            double mean = sum / n, variance = square / n - mean * mean;
            double rstd = 1.0 / std::sqrt((variance < 0 ? 0 : variance) + a->eps);
            float *scale = &affine[b * 2 * C], *shift = scale + C;
            for (int64_t c = g * wide; c < (g + 1) * wide; c++) {
                double weight = number(a->weight, a->format, c);
                scale[c] = (float)(weight * rstd);
                shift[c] = (float)(number(a->bias, a->format, c) - mean * rstd * weight);
            }
        }
    }
    for_each(a->B * parts, threads, parallel, [&](int64_t i) {
        part(i, [&](int64_t b, int64_t at, int64_t pixels) {
            const float *scale = &affine[b * 2 * C];
            k->normalise((const char *)a->x + at, (char *)a->y + at, pixels, C, scale, scale + C, a->silu);
        });
    });
    return 0;
}

EXPORT int sfumato_geglu(const Geglu *a, int isa, int threads, void *parallel) {
    if (!known(isa, a->format)) return 1;
    const PointwiseKernel *k = &KERNELS[isa].pointwise[a->format];
    int64_t parts = tasks(a->rows, a->width, threads), size = a->format == FLOAT32 ? 4 : 2;
    for_each(parts, threads, parallel, [&](int64_t i) {
        for (int64_t r = i * a->rows / parts; r < (i + 1) * a->rows / parts; r++) {
            const char *x = (const char *)a->x + r * a->stride * size;
            k->geglu(x, x + a->width * size, (char *)a->y + r * a->width * size, a->width);
        }
    });
    return 0;
}

EXPORT int sfumato_layer_norm(const LayerNorm *a, int isa, int threads, void *parallel) {
    if (!known(isa, FLOAT32)) return 1;
    const PointwiseKernel *k = &KERNELS[isa].pointwise[FLOAT32];
    int64_t parts = tasks(a->rows, a->width, threads);
    for_each(parts, threads, parallel, [&](int64_t i) {
        for (int64_t r = i * a->rows / parts; r < (i + 1) * a->rows / parts; r++) {
            k->layer_norm(a->x + r * a->width, a->y + r * a->width, a->width, a->weight, a->bias, a->eps);
        }
    });
    return 0;
}

// Columns of a panel of packed weights; 0 where there is no such instruction set.
EXPORT int sfumato_panel(int isa) {
    const ProductKernel *k = known(isa, FLOAT32) ? KERNELS[isa].product : nullptr;
    return k ? (int)k->panel : 0;
}

EXPORT int sfumato_product(const Product *a, int isa, int threads, void *parallel) {
    const ProductKernel *k = known(isa, FLOAT32) ? KERNELS[isa].product : nullptr;
    if (!k) return 1;
    int64_t rows = a->B * a->out_H * a->out_W, panels = (a->N + k->panel - 1) / k->panel;
    int64_t wanted = tasks(rows * a->kernel * a->kernel * a->C / 64, a->N, threads);
    // Columns are parted first: packed weights are then read once, and others packed once.
    int64_t across = panels < wanted ? panels : wanted, down = (wanted + across - 1) / across;
    if (down > (rows + 23) / 24) down = (rows + 23) / 24;
    bool done = for_each(across * down, threads, parallel, [&](int64_t i) {
        int64_t p = i % across, q = i / across, right = (p + 1) * panels / across * k->panel;
        k->run(*a, q * rows / down, (q + 1) * rows / down, p * panels / across * k->panel, right < a->N ? right : a->N,
               scratch(k->scratch(*a)));
    });
    return done ? 0 : 2;
}
