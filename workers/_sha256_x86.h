/* The SHA-NI kernels; part of _sha256_kernels.h.
 *
 * sha256rnds2 has more latency than throughput: one chain leaves about half of the unit idle. The two-lane
 * kernel advances two independent chains in lockstep and fills it.
 */
#ifndef ENTURBO_SHA256_X86_H
#define ENTURBO_SHA256_X86_H

#include <cpuid.h>
#include <immintrin.h>

#define NI __attribute__((target("sha,sse4.1,ssse3")))

/* SHA instructions have only a legacy SSE encoding. If someone left the upper halves of the YMM registers
 * dirty, each of them pays for it. So both kernels begin with vzeroupper, out of
 * line: nothing may be moved before it, and the kernels' own code needs no AVX. */
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

/* AVX is there for use once the system keeps the YMM registers too, which XCR0 tells. */
static int detect_avx(unsigned features)
{
    const unsigned needed = bit_OSXSAVE | bit_AVX, sse_and_ymm = 6;
    uint32_t low, high;
    if ((features & needed) != needed)
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & sse_and_ymm) == sse_and_ymm;
}

/* NULL: this processor has no SHA extensions. */
static const kernel *detect_accelerated(void)
{
    const unsigned sse = bit_SSSE3 | bit_SSE4_1;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & sse) != sse)
        return NULL;
    has_avx = detect_avx(ecx);
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_SHA) ? &SHA_NI : NULL;
}

#endif
