/* What one thread of this machine can do at most, for limits.py: compiled at run time, called from several threads.
 *
 *     multiply_add(rounds) 12 registers, each r = r * a + b     12 independent chains hide the latency of every CPU
 *     dot(rounds)          12 registers, each r += u8 . s8      the widest integer dot product the compiler may use
 *     read_all(p, bytes)   every cache line once, in 1, 2 or 4 streams side by side, whatever the CPU follows best
 *
 * Each writes when it began and ended (monotonic nanoseconds) to span[0] and span[1]. `chains` and `lanes` tell what a
 * round is worth, `dot_name` which instruction served.
 */
#include <cstdint>
#include <ctime>

#if defined(__x86_64__)
#include <immintrin.h>
#define IN_REGISTER "+v"
#elif defined(__aarch64__)
#include <arm_neon.h>
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+m"
#endif

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define OFFERED extern "C" __attribute__((visibility("default")))

typedef float floats __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));
typedef int64_t words __attribute__((vector_size(WIDTH)));

static const int CHAINS = 12;

static int64_t now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

OFFERED int chains() { return CHAINS; }
OFFERED int lanes() { return WIDTH / 4; }

OFFERED float multiply_add(int64_t rounds, int64_t *span) {
    floats a, b, r[CHAINS];
    for (int i = 0; i < WIDTH / 4; i++) a[i] = 0.999f, b[i] = 0.001f;
    for (int c = 0; c < CHAINS; c++) r[c] = b * (float)c;
    span[0] = now();
    for (int64_t n = 0; n < rounds; n++)
        for (int c = 0; c < CHAINS; c++) r[c] = r[c] * a + b;
    span[1] = now();
    for (int c = 1; c < CHAINS; c++) r[0] += r[c];
    return r[0][0];
}

#if defined(__AVX512VNNI__)
static const char *const name = "avx512 vpdpbusd";
static ints dot_add(ints sum, ints u, ints s) { return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, (__m512i)s); }
#elif defined(__AVXVNNI__)
static const char *const name = "avx vpdpbusd";
static ints dot_add(ints sum, ints u, ints s) { return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)u, (__m256i)s); }
#elif defined(__AVX2__) && WIDTH == 32
static const char *const name = "avx2 maddubs, madd, add";
static ints dot_add(ints sum, ints u, ints s) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
static const char *const name = "neon sdot";
static ints dot_add(ints sum, ints u, ints s) { return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)u, (int8x16_t)s); }
#else
static const char *const name = "portable: shift, multiply, add";
static ints dot_add(ints sum, ints u, ints s) {
    for (int shift = 0; shift < 32; shift += 8) sum += ((u >> shift) & 255) * ((s << (24 - shift)) >> 24);
    return sum;
}
#endif

OFFERED const char *dot_name() { return name; }

OFFERED int32_t dot(int64_t rounds, int64_t *span) {
    ints u, s, r[CHAINS];
    for (int i = 0; i < WIDTH / 4; i++) u[i] = 0x01020304, s[i] = 0x01ff01ff;
    for (int c = 0; c < CHAINS; c++) r[c] = u * c;
    span[0] = now();
    for (int64_t n = 0; n < rounds; n++)
        for (int c = 0; c < CHAINS; c++) {
            __asm__ volatile("" : IN_REGISTER(u)); // or a constant product would leave the loop
            r[c] = dot_add(r[c], u, s);
        }
    span[1] = now();
    for (int c = 1; c < CHAINS; c++) r[0] += r[c];
    return r[0][0];
}

template <int STREAMS>
static int64_t read_streams(const char *start, int64_t bytes, int64_t *span) {
    words r[STREAMS][2] = {};
    const int64_t share = bytes / STREAMS / (8 * WIDTH) * (8 * WIDTH);
    span[0] = now();
    for (int64_t at = 0; at < share; at += 8 * WIDTH)
        for (int s = 0; s < STREAMS; s++)
            for (int i = 0; i < 8; i++) r[s][i % 2] ^= *(const words *)(start + s * share + at + i * WIDTH);
    span[1] = now();
    for (int s = 1; s < STREAMS; s++) r[0][0] ^= r[s][0];
    for (int s = 0; s < STREAMS; s++) r[0][0] ^= r[s][1];
    return r[0][0][0];
}

OFFERED int64_t read_all(const char *start, int64_t bytes, int streams, int64_t *span) {
    if (streams == 1) return read_streams<1>(start, bytes, span);
    return streams == 2 ? read_streams<2>(start, bytes, span) : read_streams<4>(start, bytes, span);
}
