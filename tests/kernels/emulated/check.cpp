// Runs the kernels of one instruction set after another against float64 and prints the largest differences; made to be the
// first and only program of an emulated machine, but it runs anywhere. See the README beside it.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>
#include <x86intrin.h>

#include "sfumato.h"

extern "C" {
int sfumato_isa();
int sfumato_attention(const Attention *a, int isa, int threads, void *parallel);
int sfumato_group_norm(const GroupNorm *a, int isa, int threads, void *parallel);
int sfumato_geglu(const Geglu *a, int isa, int threads, void *parallel);
}

namespace {

const char *const NAMES[] = {"none", "avx2", "avx512", "avx512bf16", "amx"};
std::mt19937 dice(7);
int failures = 0;

int64_t roll(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(dice); }
float gauss() { return std::normal_distribution<float>()(dice); }

float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

uint16_t narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Numbers of a format in memory, in a layout of four dimensions.
struct Tensor {
    int32_t format;
    int64_t size[4], stride[4];
    std::vector<float> wide;
    std::vector<uint16_t> slim;

    Tensor(int32_t format, int64_t a, int64_t b, int64_t c, int64_t d, int layout) : format(format), size{a, b, c, d} {
        int64_t step = layout == 3 ? 2 : 1;  // every other number
        static const int orders[4][4] = {{0, 1, 2, 3}, {0, 2, 1, 3}, {0, 1, 3, 2}, {0, 1, 2, 3}};
        int64_t n = step;
        for (int i = 3; i >= 0; i--) stride[orders[layout][i]] = n, n *= size[orders[layout][i]];
        // ends where its numbers end, so that reading beyond them is seen as reading what is not a number
        wide.assign(format == FLOAT32 ? n + 64 : 0, NAN);
        slim.assign(format == BFLOAT16 ? n + 128 : 0, 0x7fc0);
    }
    int64_t at(int64_t i, int64_t j, int64_t k, int64_t l) const {
        return i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
    }
    double get(int64_t i) const { return format == FLOAT32 ? wide[i] : widen(slim[i]); }
    void set(int64_t i, float x) {
        if (format == FLOAT32) wide[i] = x;
        else slim[i] = narrow(x);
    }
    const void *data() const { return format == FLOAT32 ? (const void *)wide.data() : slim.data(); }
    void *data() { return format == FLOAT32 ? (void *)wide.data() : slim.data(); }
    void fill(float spread) {
        for (int64_t i = 0; i < size[0]; i++)
            for (int64_t j = 0; j < size[1]; j++)
                for (int64_t k = 0; k < size[2]; k++)
                    for (int64_t l = 0; l < size[3]; l++) set(at(i, j, k, l), spread * gauss());
    }
};

void say(const char *form, ...) {
    va_list list;
    va_start(list, form);
    vprintf(form, list);
    va_end(list);
    fflush(stdout);
}

struct Case {
    int64_t B, H, L, K, D, E;
    float scale;
    int mask, causal, layout, threads;
};

// The largest difference from float64 over the largest value; infinite when a number is not one.
double attention(int isa, int32_t format, const Case &c, uint64_t *ticks = nullptr) {
    int all[4] = {c.layout & 3, c.layout >> 2 & 3, c.layout >> 4 & 3, 1};
    Tensor q(format, c.B, c.H, c.L, c.D, all[0]), k(format, c.B, c.H, c.K, c.D, all[1]);
    Tensor v(format, c.B, c.H, c.K, c.E, all[2]), out(format, c.B, c.H, c.L, c.E, all[3]);
    Tensor additive(FLOAT32, 1, c.H, c.L, c.K, 0);
    std::vector<uint8_t> boolean(c.B * c.L * c.K);
    q.fill(1), k.fill(1), v.fill(1), additive.fill(1);
    for (auto &seen : boolean) seen = roll(0, 9) < 6;
    for (auto &x : additive.wide) if (roll(0, 9) < 3) x = -INFINITY;
    Attention a{};
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data();
    a.B = c.B, a.H = c.H, a.L = c.L, a.K = c.K, a.D = c.D, a.E = c.E;
    for (int i = 0; i < 4; i++) {
        a.q_stride[i] = q.stride[i], a.k_stride[i] = k.stride[i];
        a.v_stride[i] = v.stride[i], a.out_stride[i] = out.stride[i];
        if (c.mask == ADDITIVE) a.mask_stride[i] = i ? additive.stride[i] : 0;
    }
    if (c.mask == BOOLEAN) a.mask_stride[0] = c.L * c.K, a.mask_stride[2] = c.K, a.mask_stride[3] = 1;
    a.mask = c.mask == BOOLEAN ? (const void *)boolean.data() : c.mask == ADDITIVE ? additive.data() : nullptr;
    a.scale = c.scale, a.format = format, a.mask_kind = c.mask, a.causal = c.causal;
    uint64_t since = __rdtsc();
    if (sfumato_attention(&a, isa, c.threads, nullptr)) return INFINITY;
    if (ticks) *ticks = __rdtsc() - since;
    double worst = 0, range = 0;
    std::vector<double> p(c.K), sums(c.E);
    for (int64_t b = 0; b < c.B; b++) for (int64_t h = 0; h < c.H; h++) {
        for (int64_t i = 0; i < c.K; i++) for (int64_t e = 0; e < c.E; e++) range = std::max(range, std::fabs(v.get(v.at(b, h, i, e))));
        for (int64_t l = 0; l < c.L; l += ticks ? 97 : 1) {
            double most = -INFINITY, total = 0;
            for (int64_t i = 0; i < c.K; i++) {
                double s = 0;
                for (int64_t d = 0; d < c.D; d++) s += q.get(q.at(b, h, l, d)) * k.get(k.at(b, h, i, d));
                s *= c.scale;
                if (c.mask == ADDITIVE) s += additive.get(additive.at(0, h, l, i));
                if ((c.mask == BOOLEAN && !boolean[(b * c.L + l) * c.K + i]) || (c.causal && i > l)) s = -INFINITY;
                p[i] = s, most = std::max(most, s);
            }
            std::fill(sums.begin(), sums.end(), 0.0);
            for (int64_t i = 0; i < c.K; i++) {
                double w = most == -INFINITY ? 0 : std::exp(p[i] - most);
                total += w;
                for (int64_t e = 0; e < c.E; e++) sums[e] += w * v.get(v.at(b, h, i, e));
            }
            for (int64_t e = 0; e < c.E; e++) {
                double d = std::fabs(out.get(out.at(b, h, l, e)) - (total ? sums[e] / total : 0));
                worst = d <= worst ? worst : std::isfinite(d) ? d : INFINITY;
            }
        }
    }
    return worst / range;
}

void report(int isa, int32_t format, const char *what, int cases, double worst, double bound) {
    bool good = worst < bound;
    failures += !good;
    say("%-10s %-8s %-44s %4d cases  %.2e  (bound %.1e) %s\n", NAMES[isa], format ? "bfloat16" : "float32", what, cases,
        worst, bound, good ? "ok" : "WRONG");
}

void attentions(int isa, int32_t format, int cases) {
    double bound = format == BFLOAT16 ? 1.0 / 256 : 2e-5;  // that of bfloat16 is what its rounding may cost
    double worst = 0;
    for (int i = 0; i < cases; i++) {
        int mask = (int)roll(0, 3);
        Case c{roll(1, 2), roll(1, 3), roll(1, 90), roll(1, 300), roll(1, 90), roll(1, 90), 0, mask % 3, mask == 3,
               (int)roll(0, 63), (int)roll(1, 3)};
        c.scale = (i % 4 == 0 ? -1.0f : 1.0f) / std::sqrt((float)c.D);
        double d = attention(isa, format, c);
        if (!(d < bound)) say("  B%d H%d L%d K%d D%d E%d mask %d causal %d layout %d: %g\n", (int)c.B, (int)c.H, (int)c.L,
                              (int)c.K, (int)c.D, (int)c.E, c.mask, c.causal, c.layout, d);
        worst = std::max(worst, d);
    }
    report(isa, format, "attention, random shapes, strides, masks", cases, worst, bound);
    for (int64_t D : {40, 64, 80, 88, 128, 160}) {
        worst = std::max(attention(isa, format, {1, 2, 200, 200, D, D, 1 / std::sqrt((float)D), 0, 0, 0x15, 2}),
                         attention(isa, format, {1, 2, 130, 77, D, D, 1 / std::sqrt((float)D), 0, 0, 0x15, 1}));
        report(isa, format, ("attention, heads of " + std::to_string(D) + ", 200 and 77 keys").c_str(), 2, worst, bound);
    }
}

void pointwise(int isa, int32_t format, int cases) {
    double bound = format == BFLOAT16 ? 1.0 / 250 : 5e-6, worst = 0, gates = 0;
    for (int i = 0; i < cases; i++) {
        int64_t groups = roll(1, 5), C = groups * roll(2, 20), pixels = roll(1, 400), silu = roll(0, 1);
        Tensor x(format, 1, 1, pixels, C, 0), y(format, 1, 1, pixels, C, 0), weight(format, 1, 1, 1, C, 0), bias(format, 1, 1, 1, C, 0);
        x.fill(1), weight.fill(1), bias.fill(1);
        GroupNorm a{x.data(), weight.data(), bias.data(), y.data(), 1, pixels, C, groups, 1e-2f, (int32_t)silu, format};
        sfumato_group_norm(&a, isa, 2, nullptr);
        for (int64_t g = 0; g < groups; g++) {
            double sum = 0, square = 0, n = (double)(pixels * (C / groups));
            auto each = [&](auto f) {
                for (int64_t p = 0; p < pixels; p++) for (int64_t c = g * C / groups; c < (g + 1) * C / groups; c++) f(p * C + c, c);
            };
            each([&](int64_t i, int64_t) { sum += x.get(i), square += x.get(i) * x.get(i); });
            double mean = sum / n, rstd = 1 / std::sqrt(square / n - mean * mean + (double)1e-2f);
            each([&](int64_t i, int64_t c) {
                double z = (x.get(i) - mean) * rstd * weight.get(c) + bias.get(c);
                if (silu) z /= 1 + std::exp(-z);
                double d = std::fabs(y.get(i) - z) / (1 + std::fabs(z));
                worst = d <= worst ? worst : std::isfinite(d) ? d : INFINITY;
            });
        }
        int64_t rows = roll(1, 9), width = roll(1, 70);
        Tensor h(format, 1, 1, rows, 2 * width, 0), o(format, 1, 1, rows, width, 0);
        h.fill(i % 2 ? 1 : 8);
        Geglu b{h.data(), o.data(), rows, width, 2 * width, format};
        sfumato_geglu(&b, isa, 2, nullptr);
        for (int64_t r = 0; r < rows; r++) for (int64_t j = 0; j < width; j++) {
            double left = h.get(2 * r * width + j), gate = h.get((2 * r + 1) * width + j);
            double z = left * gate * 0.5 * std::erfc(-gate * 0.7071067811865476);
            double d = std::fabs(o.get(r * width + j) - z) / (std::fabs(z) + 1e-6 + (format ? 0 : std::fabs(left) * (1 + std::fabs(gate))));
            if (format && std::fabs(z) < 1e-3) d = std::fabs(o.get(r * width + j) - z);
            gates = d <= gates ? gates : std::isfinite(d) ? d : INFINITY;
        }
    }
    report(isa, format, "group norm, SiLU", cases, worst, bound);
    report(isa, format, "GEGLU", cases, gates, format ? bound : 5e-7);
}

// The console, for a first program that nobody has given one.
void open_console() {
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, nullptr);
    int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3 && console >= 0; i++) dup2(console, i);
}

// Instructions for one head, as the emulator's time stamp counts them.
void count(int isa, int32_t format, int64_t L, int64_t K, int64_t D) {
    uint64_t ticks = 0;
    double d = attention(isa, format, {1, 1, L, K, D, D, 1 / std::sqrt((float)D), 0, 0, 0x15, 1}, &ticks);
    say("%-10s %-8s %dx%dx%d: %llu ticks, difference %.2e\n", NAMES[isa], format ? "bfloat16" : "float32", (int)L, (int)K,
        (int)D, (unsigned long long)ticks, d);
}

}  // namespace

int main(int argc, char **argv) {
    if (getpid() == 1) open_console();
    int cases = argc > 1 && getpid() != 1 ? atoi(argv[1]) : 12, best = sfumato_isa();
    say("best instruction set: %s\n", NAMES[best]);
    // the others share what the narrower ones have
    for (int isa = best; isa >= 3; isa--) count(isa, BFLOAT16, 512, 512, 40);
    for (int isa = best; isa >= 1; isa--) {
        attentions(isa, BFLOAT16, cases);
        if (isa >= 3) continue;
        attentions(isa, FLOAT32, cases);
        pointwise(isa, BFLOAT16, cases);
        pointwise(isa, FLOAT32, cases);
        if (getpid() == 1) break;  // AVX2 needs no emulator
    }
    say(failures ? "%d WRONG\n" : "all right\n", failures);
    if (getpid() == 1) {
        tcdrain(1);
        if (iopl(3) == 0) for (const char *p = "Shutdown"; *p; p++) outb(*p, 0x8900);  // how Bochs is told to end
        reboot(RB_POWER_OFF);
    }
    return failures != 0;
}
