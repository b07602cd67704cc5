/* SHA-256 compression over lists of 64-byte blocks.
 *
 * A page's records alternate between headers, which are made on the stack, and page bytes, which are hashed
 * where they lie. So every kernel takes a list of block pointers instead of one contiguous buffer.
 *
 * sha256rnds2 has more latency than throughput: one chain leaves about half of the unit idle. The two-lane
 * kernel advances two independent chains in lockstep and fills it.
 *
 * The SHA-NI functions carry their own target attribute, so the file compiles without -m flags and the module
 * loads on every x86-64; detect_kernel() decides at run time.
 */
#ifndef ENTURBO_SHA256_KERNELS_H
#define ENTURBO_SHA256_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define ENTURBO_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif

typedef const uint8_t *const *block_list;

typedef struct {
    const char *name;
    void (*one)(uint32_t state[8], block_list blocks, size_t count);
    void (*two)(uint32_t a[8], uint32_t b[8], block_list blocks_a, block_list blocks_b, size_t count);
} kernel;

static const uint32_t INITIAL_STATE[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* FIPS 180-4, section 4.2.2. Aligned: the SHA-NI kernels add them from memory, four at a time. */
static const uint32_t K[64] __attribute__((aligned(64))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* ---- portable C -------------------------------------------------------------------------------------- */

static inline uint32_t rotate_right(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

static void compress_portable(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64];
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
               (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t s0 = rotate_right(w[i - 15], 7) ^ rotate_right(w[i - 15], 18) ^ (w[i - 15] >> 3);
        uint32_t s1 = rotate_right(w[i - 2], 17) ^ rotate_right(w[i - 2], 19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    for (int i = 0; i < 64; i++) {
        uint32_t s1 = rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25);
        uint32_t t1 = h + s1 + (g ^ (e & (f ^ g))) + K[i] + w[i];
        uint32_t s0 = rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22);
        uint32_t t2 = s0 + ((a & b) | (c & (a | b)));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void portable_one(uint32_t state[8], block_list blocks, size_t count)
{
    for (size_t i = 0; i < count; i++)
        compress_portable(state, blocks[i]);
}

static void portable_two(uint32_t a[8], uint32_t b[8], block_list blocks_a, block_list blocks_b, size_t count)
{
    portable_one(a, blocks_a, count);
    portable_one(b, blocks_b, count);
}

static const kernel PORTABLE = {"portable", portable_one, portable_two};

/* ---- SHA-NI ------------------------------------------------------------------------------------------ */
#ifdef ENTURBO_X86

#define NI __attribute__((target("sha,sse4.1,ssse3")))

/* SHA instructions have only a legacy SSE encoding. If someone left the upper halves of the YMM registers
 * dirty, each of them pays for it, on some processors sixty-fold. */
__attribute__((target("avx"), noinline)) static void clear_upper_halves(void) { _mm256_zeroupper(); }

static int has_avx;

/* Four rounds are two sha256rnds2; w0 holds the four schedule words they use. */
#define ROUNDS_FIRST(s0, s1, w0, m, i)                                                                        \
    m = _mm_add_epi32(w0, _mm_load_si128((const __m128i *)(K + 4 * (i))));                                    \
    s1 = _mm_sha256rnds2_epu32(s1, s0, m);
#define ROUNDS_SECOND(s0, s1, m) s0 = _mm_sha256rnds2_epu32(s0, s1, _mm_shuffle_epi32(m, 0x0e));
/* w1 becomes the schedule words of the next four rounds; w3 are those of the four before. */
#define SCHEDULE(w0, w1, w3) w1 = _mm_sha256msg2_epu32(_mm_add_epi32(w1, _mm_alignr_epi8(w0, w3, 4)), w0);
#define SCHEDULE_EARLY(w0, w3) w3 = _mm_sha256msg1_epu32(w3, w0);

#define LOAD(block, i) \
    _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(block) + (i)), BIG_ENDIAN_WORDS)
#define BIG_ENDIAN_WORDS _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL)

/* The instructions want the state as (a b e f) and (c d g h). */
NI static inline void load_state(const uint32_t state[8], __m128i *abef, __m128i *cdgh)
{
    __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xb1);
    __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state + 1), 0x1b);
    *abef = _mm_alignr_epi8(dcba, hgfe, 8);
    *cdgh = _mm_blend_epi16(hgfe, dcba, 0xf0);
}

NI static inline void store_state(uint32_t state[8], __m128i abef, __m128i cdgh)
{
    __m128i feba = _mm_shuffle_epi32(abef, 0x1b);
    __m128i dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((__m128i *)state + 1, _mm_alignr_epi8(dchg, feba, 8));
}

#define ONE_QUAD(i, w0, w1, w3)                                                                               \
    ROUNDS_FIRST(s0, s1, w0, m, i)                                                                            \
    if ((i) >= 3 && (i) < 15) { SCHEDULE(w0, w1, w3) }                                                        \
    ROUNDS_SECOND(s0, s1, m)                                                                                  \
    if ((i) >= 1 && (i) < 13) { SCHEDULE_EARLY(w0, w3) }

#define FOUR_ONE_QUADS(i)                                                                                     \
    ONE_QUAD(i, w0, w1, w3) ONE_QUAD(i + 1, w1, w2, w0) ONE_QUAD(i + 2, w2, w3, w1) ONE_QUAD(i + 3, w3, w0, w2)

NI static void sha_ni_one(uint32_t state[8], block_list blocks, size_t count)
{
    __m128i s0, s1, m, w0, w1, w2, w3;
    if (has_avx)
        clear_upper_halves();
    load_state(state, &s0, &s1);
    for (size_t n = 0; n < count; n++) {
        const uint8_t *block = blocks[n];
        __m128i old0 = s0, old1 = s1;
        w0 = LOAD(block, 0), w1 = LOAD(block, 1), w2 = LOAD(block, 2), w3 = LOAD(block, 3);
        FOUR_ONE_QUADS(0) FOUR_ONE_QUADS(4) FOUR_ONE_QUADS(8) FOUR_ONE_QUADS(12)
        s0 = _mm_add_epi32(s0, old0), s1 = _mm_add_epi32(s1, old1);
    }
    store_state(state, s0, s1);
}

#define TWO_QUAD(i, w0, w1, w3)                                                                               \
    ROUNDS_FIRST(a0, a1, a##w0, m, i)                                                                         \
    ROUNDS_FIRST(b0, b1, b##w0, n, i)                                                                         \
    if ((i) >= 3 && (i) < 15) { SCHEDULE(a##w0, a##w1, a##w3) SCHEDULE(b##w0, b##w1, b##w3) }                 \
    ROUNDS_SECOND(a0, a1, m)                                                                                  \
    ROUNDS_SECOND(b0, b1, n)                                                                                  \
    if ((i) >= 1 && (i) < 13) { SCHEDULE_EARLY(a##w0, a##w3) SCHEDULE_EARLY(b##w0, b##w3) }

#define FOUR_TWO_QUADS(i)                                                                                     \
    TWO_QUAD(i, w0, w1, w3) TWO_QUAD(i + 1, w1, w2, w0) TWO_QUAD(i + 2, w2, w3, w1) TWO_QUAD(i + 3, w3, w0, w2)

NI static void sha_ni_two(uint32_t a[8], uint32_t b[8], block_list blocks_a, block_list blocks_b, size_t count)
{
    __m128i a0, a1, aw0, aw1, aw2, aw3, m;
    __m128i b0, b1, bw0, bw1, bw2, bw3, n;
    if (has_avx)
        clear_upper_halves();
    load_state(a, &a0, &a1);
    load_state(b, &b0, &b1);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *pa = blocks_a[i], *pb = blocks_b[i];
        __m128i old_a0 = a0, old_a1 = a1, old_b0 = b0, old_b1 = b1;
        aw0 = LOAD(pa, 0), aw1 = LOAD(pa, 1), aw2 = LOAD(pa, 2), aw3 = LOAD(pa, 3);
        bw0 = LOAD(pb, 0), bw1 = LOAD(pb, 1), bw2 = LOAD(pb, 2), bw3 = LOAD(pb, 3);
        FOUR_TWO_QUADS(0) FOUR_TWO_QUADS(4) FOUR_TWO_QUADS(8) FOUR_TWO_QUADS(12)
        a0 = _mm_add_epi32(a0, old_a0), a1 = _mm_add_epi32(a1, old_a1);
        b0 = _mm_add_epi32(b0, old_b0), b1 = _mm_add_epi32(b1, old_b1);
    }
    store_state(a, a0, a1);
    store_state(b, b0, b1);
}

static const kernel SHA_NI = {"sha-ni x2", sha_ni_one, sha_ni_two};
#endif /* ENTURBO_X86 */

/* The best kernel for this processor. Idempotent; called under the interpreter's import lock. */
static const kernel *detect_kernel(void)
{
#ifdef ENTURBO_X86
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        unsigned features = ecx, sse = bit_SSSE3 | bit_SSE4_1, avx = bit_OSXSAVE | bit_AVX;
        has_avx = (features & avx) == avx;
        if ((features & sse) == sse && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_SHA))
            return &SHA_NI;
    }
#endif
    return &PORTABLE;
}

#endif
