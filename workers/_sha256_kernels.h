/* SHA-256 compression over lists of 64-byte blocks.
 *
 * A page's records alternate between headers, which are made on the stack, and page bytes, which are hashed
 * where they lie. So every kernel takes a list of block pointers instead of one contiguous buffer.
 *
 * Here: the interface, portable C, and the choice. _sha256_x86.h and _sha256_arm.h each add one kernel with the
 * processor's own SHA-256 instructions. Their functions carry their own target attribute, so all compiles
 * without -m flags and the module loads on every processor of its architecture; detect_kernel() decides at run
 * time.
 */
#ifndef ENTURBO_SHA256_KERNELS_H
#define ENTURBO_SHA256_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef const uint8_t *const *block_list;

typedef struct {
    const char *name;
    void (*one)(uint32_t state[8], block_list blocks, size_t count);
    void (*two)(uint32_t a[8], uint32_t b[8], block_list blocks_a, block_list blocks_b, size_t count);
} kernel;

static const uint32_t INITIAL_STATE[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* FIPS 180-4, section 4.2.2. Aligned: the kernels load them four at a time. */
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

/* Clang before version 16 declares the ARM intrinsics only if a -m flag allows them everywhere. */
#if !defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_SHA2)
#define ENTURBO_ARM_INTRINSICS 1
#endif

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#include "_sha256_x86.h"
#elif defined(__AARCH64EL__) && defined(__linux__) && defined(__GNUC__) && defined(ENTURBO_ARM_INTRINSICS)
#include "_sha256_arm.h"
#else
static const kernel *detect_accelerated(void) { return NULL; }
#endif

/* The best kernel for this processor. Idempotent; called under the interpreter's import lock. */
static const kernel *detect_kernel(void)
{
    const kernel *accelerated = detect_accelerated();
    return accelerated ? accelerated : &PORTABLE;
}

#endif
