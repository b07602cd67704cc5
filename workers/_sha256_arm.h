/* The ARMv8 SHA-2 kernels; part of _sha256_kernels.h.
 *
 * UNTESTED ON REAL HARDWARE. tests/kernels/driver.c holds them to the portable kernel under QEMU (`make arm`):
 * that shows their digests, not their speed, and whether two lanes gain anything is not known for any core.
 *
 * Little-endian only: the byte swap at the load assumes it.
 */
#ifndef ENTURBO_SHA256_ARM_H
#define ENTURBO_SHA256_ARM_H

#include <arm_neon.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

/* GCC's intrinsics up to version 13 ask for all of +crypto; nothing but SHA-256 is generated from it. */
#ifdef __clang__
#define SHA2 __attribute__((target("sha2")))
#else
#define SHA2 __attribute__((target("+crypto")))
#endif

/* Four rounds; w0 holds the four schedule words they use, `t` and `old` are scratch. */
#define ARM_ROUNDS(s0, s1, w0, t, old, i)                                                                     \
    t = vaddq_u32(w0, vld1q_u32(K + 4 * (i)));                                                                \
    old = s0;                                                                                                 \
    s0 = vsha256hq_u32(s0, s1, t);                                                                            \
    s1 = vsha256h2q_u32(s1, old, t);
/* w0, already used, becomes the schedule words of the rounds after w3. */
#define ARM_SCHEDULE(w0, w1, w2, w3) w0 = vsha256su1q_u32(vsha256su0q_u32(w0, w1), w2, w3);

#define ARM_LOAD(block, i) vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8((block) + 16 * (i))))

#define ARM_ONE_QUAD(i, w0, w1, w2, w3)                                                                       \
    ARM_ROUNDS(s0, s1, w0, t, old, i)                                                                         \
    if ((i) < 12) { ARM_SCHEDULE(w0, w1, w2, w3) }

#define ARM_FOUR_ONE_QUADS(i)                                                                                 \
    ARM_ONE_QUAD(i, w0, w1, w2, w3) ARM_ONE_QUAD(i + 1, w1, w2, w3, w0)                                       \
    ARM_ONE_QUAD(i + 2, w2, w3, w0, w1) ARM_ONE_QUAD(i + 3, w3, w0, w1, w2)

SHA2 static void armv8_one(uint32_t state[8], block_list blocks, size_t count)
{
    uint32x4_t s0 = vld1q_u32(state), s1 = vld1q_u32(state + 4), w0, w1, w2, w3, t, old;
    for (size_t n = 0; n < count; n++) {
        const uint8_t *block = blocks[n];
        uint32x4_t old0 = s0, old1 = s1;
        w0 = ARM_LOAD(block, 0), w1 = ARM_LOAD(block, 1), w2 = ARM_LOAD(block, 2), w3 = ARM_LOAD(block, 3);
        ARM_FOUR_ONE_QUADS(0) ARM_FOUR_ONE_QUADS(4) ARM_FOUR_ONE_QUADS(8) ARM_FOUR_ONE_QUADS(12)
        s0 = vaddq_u32(s0, old0), s1 = vaddq_u32(s1, old1);
    }
    vst1q_u32(state, s0), vst1q_u32(state + 4, s1);
}

#define ARM_TWO_QUAD(i, w0, w1, w2, w3)                                                                       \
    ARM_ROUNDS(a0, a1, a##w0, t, old_a, i)                                                                    \
    ARM_ROUNDS(b0, b1, b##w0, u, old_b, i)                                                                    \
    if ((i) < 12) { ARM_SCHEDULE(a##w0, a##w1, a##w2, a##w3) ARM_SCHEDULE(b##w0, b##w1, b##w2, b##w3) }

#define ARM_FOUR_TWO_QUADS(i)                                                                                 \
    ARM_TWO_QUAD(i, w0, w1, w2, w3) ARM_TWO_QUAD(i + 1, w1, w2, w3, w0)                                       \
    ARM_TWO_QUAD(i + 2, w2, w3, w0, w1) ARM_TWO_QUAD(i + 3, w3, w0, w1, w2)

SHA2 static void armv8_two(uint32_t a[8], uint32_t b[8], block_list blocks_a, block_list blocks_b, size_t count)
{
    uint32x4_t a0 = vld1q_u32(a), a1 = vld1q_u32(a + 4), aw0, aw1, aw2, aw3, t, old_a;
    uint32x4_t b0 = vld1q_u32(b), b1 = vld1q_u32(b + 4), bw0, bw1, bw2, bw3, u, old_b;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *pa = blocks_a[i], *pb = blocks_b[i];
        uint32x4_t old_a0 = a0, old_a1 = a1, old_b0 = b0, old_b1 = b1;
        aw0 = ARM_LOAD(pa, 0), aw1 = ARM_LOAD(pa, 1), aw2 = ARM_LOAD(pa, 2), aw3 = ARM_LOAD(pa, 3);
        bw0 = ARM_LOAD(pb, 0), bw1 = ARM_LOAD(pb, 1), bw2 = ARM_LOAD(pb, 2), bw3 = ARM_LOAD(pb, 3);
        ARM_FOUR_TWO_QUADS(0) ARM_FOUR_TWO_QUADS(4) ARM_FOUR_TWO_QUADS(8) ARM_FOUR_TWO_QUADS(12)
        a0 = vaddq_u32(a0, old_a0), a1 = vaddq_u32(a1, old_a1);
        b0 = vaddq_u32(b0, old_b0), b1 = vaddq_u32(b1, old_b1);
    }
    vst1q_u32(a, a0), vst1q_u32(a + 4, a1);
    vst1q_u32(b, b0), vst1q_u32(b + 4, b1);
}

static const kernel ARMV8 = {"armv8 x2", armv8_one, armv8_two};

/* NULL: this processor has no SHA-256 instructions. */
static const kernel *detect_accelerated(void) { return getauxval(AT_HWCAP) & HWCAP_SHA2 ? &ARMV8 : NULL; }

#endif
