/* Filling memory that will not be read again soon by this core: stores that go past the caches.
 *
 * Non-temporal stores are not ordered with later ones, so each function ends with sfence: a page may be
 * declared VALID by an ordinary store right after the call.
 */
#ifndef ENTURBO_SHA256_NT_H
#define ENTURBO_SHA256_NT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

#define NT_ALIGN 16
#define NT_STEP 64

static size_t bytes_to_alignment(const uint8_t *to, size_t count)
{
    size_t head = (size_t)(-(uintptr_t)to & (NT_ALIGN - 1));
    return head < count ? head : count;
}

static void copy_nt(uint8_t *to, const uint8_t *from, size_t count)
{
    size_t head = bytes_to_alignment(to, count);
    memcpy(to, from, head);
    to += head, from += head, count -= head;
    for (; count >= NT_STEP; to += NT_STEP, from += NT_STEP, count -= NT_STEP) {
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2), d = _mm_loadu_si128((const __m128i *)from + 3);
        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c);
        _mm_stream_si128((__m128i *)to + 3, d);
    }
    memcpy(to, from, count);
    _mm_sfence();
}

static void zero_nt(uint8_t *to, size_t count)
{
    size_t head = bytes_to_alignment(to, count);
    const __m128i zero = _mm_setzero_si128();
    memset(to, 0, head);
    to += head, count -= head;
    for (; count >= NT_STEP; to += NT_STEP, count -= NT_STEP)
        for (int i = 0; i < NT_STEP / NT_ALIGN; i++)
            _mm_stream_si128((__m128i *)to + i, zero);
    memset(to, 0, count);
    _mm_sfence();
}

#else

static void copy_nt(uint8_t *to, const uint8_t *from, size_t count) { memcpy(to, from, count); }

static void zero_nt(uint8_t *to, size_t count) { memset(to, 0, count); }

#endif
#endif
