/* The kernels and the lanes without Python: for sanitizers, for processors that are only emulated, and for
 * the time that dirty vector registers cost. Built by check_asan and check_arm beside it, never by the suite.
 *
 *   driver check [KERNEL]   vectors, then random blocks, states and spans; KERNEL: the name that must be found
 *   driver dirty            the time of a merge after each state of the upper YMM halves; fails if it grows
 *   driver overflow         reads past a buffer: a sanitizer that is at work ends this
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "_sha256_lanes.h"
#include "_sha256_nt.h"

static uint64_t seed = 0x9e3779b97f4a7c15;

static uint64_t random_below(uint64_t limit)
{
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17; /* xorshift64 */
    return (seed * 0x2545f4914f6cdd1d >> 32) % limit;
}

static void fill(void *to, size_t count)
{
    for (size_t i = 0; i < count; i++)
        ((uint8_t *)to)[i] = (uint8_t)random_below(256);
}

static void require(int holds, const char *kernel, const char *what, uint64_t round)
{
    if (holds)
        return;
    printf("%s: %s differ (round %llu)\n", kernel, what, (unsigned long long)round);
    exit(1);
}

/* Its own heap block of exactly `size` bytes, so that a sanitizer sees one byte too many. */
static uint8_t *exact(size_t size)
{
    uint8_t *at = malloc(size ? size : 1);
    if (!at)
        abort();
    return at;
}

/* ---- the examples of FIPS 180-2, appendix B, in each lane --------------------------------------------- */

static const struct {
    const char *text;
    size_t times;
    uint32_t digest[8];
} EXAMPLES[] = {
    {"abc", 1, {0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223, 0xb00361a3, 0x96177a9c, 0xb410ff61, 0xf20015ad}},
    {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
     {0x248d6a61, 0xd20638b8, 0xe5c02693, 0x0c3e6039, 0xa33ce459, 0x64ff2167, 0xf6ecedd4, 0x19db06c1}},
    {"a", 1000000, {0xcdc76e5c, 0x9914fb92, 0x81a1c7e2, 0x84d73e67, 0xf1809a48, 0xa497200e, 0x046d39cc, 0xc7112cd0}},
};

static void check_examples(const kernel *kernel)
{
    for (size_t n = 0; n < sizeof EXAMPLES / sizeof *EXAMPLES; n++) {
        size_t part = strlen(EXAMPLES[n].text), length = part * EXAMPLES[n].times, blocks = (length + 9 + 63) / 64;
        uint8_t *message = calloc(blocks, 64), *other = calloc(blocks, 64);
        const uint8_t **list = calloc(blocks, sizeof *list), **zeros = calloc(blocks, sizeof *zeros);
        for (size_t i = 0; i < EXAMPLES[n].times; i++)
            memcpy(message + i * part, EXAMPLES[n].text, part);
        message[length] = 0x80;
        for (int i = 0; i < 8; i++)
            message[blocks * 64 - 1 - i] = (uint8_t)((uint64_t)length * 8 >> (8 * i));
        for (size_t i = 0; i < blocks; i++)
            list[i] = message + 64 * i, zeros[i] = other + 64 * i;
        for (int lane = 0; lane < 3; lane++) {
            uint32_t state[8], beside[8] = {0};
            memcpy(state, INITIAL_STATE, sizeof state);
            if (lane == 0)
                run_buffer(kernel, state, message, blocks);
            else if (lane == 1)
                kernel->two(state, beside, list, zeros, blocks);
            else
                kernel->two(beside, state, zeros, list, blocks);
            require(!memcmp(state, EXAMPLES[n].digest, sizeof state), kernel->name, "digests of the examples", n);
        }
        if (length % 64 == 0) {
            uint32_t state[8];
            uint8_t digest[32];
            memcpy(state, INITIAL_STATE, sizeof state);
            run_buffer(kernel, state, message, length / 64);
            final_digest(kernel, state, length, digest);
            for (int i = 0; i < 32; i++)
                require(digest[i] == (uint8_t)(EXAMPLES[n].digest[i / 4] >> (24 - 8 * (i % 4))), kernel->name,
                        "padded digests", n);
        }
        free(message), free(other), free(list), free(zeros);
    }
}

/* ---- random states and scattered, unaligned blocks: each kernel against the portable one ---------------- */

#define MAX_BLOCKS 40

static void check_kernels(const kernel *kernel)
{
    for (uint64_t round = 0; round < 1500; round++) {
        size_t count = random_below(MAX_BLOCKS + 1);
        uint8_t *held[2 * MAX_BLOCKS];
        const uint8_t *list[2 * MAX_BLOCKS];
        for (size_t i = 0; i < 2 * count; i++) {
            size_t at = random_below(64);
            held[i] = exact(at + 64);
            fill(held[i], at + 64);
            list[i] = held[i] + at;
        }
        uint32_t wanted[2][8], one[8], two[2][8];
        fill(wanted, sizeof wanted);
        memcpy(one, wanted, sizeof one);
        memcpy(two, wanted, sizeof two);
        portable_one(wanted[0], list, count);
        portable_one(wanted[1], list + count, count);
        kernel->one(one, list, count);
        kernel->two(two[0], two[1], list, list + count, count);
        require(!memcmp(one, wanted, sizeof one), kernel->name, "states of one lane", round);
        require(!memcmp(two, wanted, sizeof two), kernel->name, "states of two lanes", round);
        for (size_t i = 0; i < 2 * count; i++)
            free(held[i]);
    }
}

/* ---- spans of any shape: the lanes against records written one after the other -------------------------- */

static void append(uint32_t state[8], uint64_t *length, const uint8_t *block)
{
    portable_one(state, &block, 1);
    *length += 64;
}

static void append_header(uint32_t state[8], uint64_t *length, const char *tag, uint64_t offset, uint64_t flags)
{
    uint8_t block[64] = {0};
    memcpy(block, tag, strlen(tag));
    store_le(block + 8, offset, 8);
    store_le(block + 16, flags, 8);
    append(state, length, block);
}

static void append_page(const span *span, uint64_t page, uint32_t state[8], uint64_t *length)
{
    if (!span->entries) {
        append_header(state, length, "EADD", (page + (uint64_t)span->base) * 4096, span->flags);
        return;
    }
    const uint8_t *entry = span->entries + page * 32;
    uint64_t offset = (uint64_t)read_u32(entry + 8) * 4096;
    append_header(state, length, "EADD", offset, read_u16(entry));
    for (unsigned chunk = 0; chunk < 16; chunk++) {
        if (!(read_u16(entry + 2) >> chunk & 1))
            continue;
        append_header(state, length, "EEXTEND", offset + chunk * 256, 0);
        for (int i = 0; i < 4; i++)
            append(state, length, span->data + page * 4096 + chunk * 256 + 64 * i);
    }
}

static void append_span(const span *span, uint32_t state[8], uint64_t *length)
{
    for (uint64_t k = 0; k < span->blocks; k++)
        for (uint64_t i = 0; i < span->block; i++)
            if (span->first + k * span->stride + i < span->end)
                append_page(span, span->first + k * span->stride + i, state, length);
}

static span random_span(uint8_t **held_entries, uint8_t **held_data)
{
    static const unsigned MASKS[] = {0, 1, 0x8000, 0xffff, 0xffff};
    uint64_t pages = random_below(40), shift = random_below(64);
    span span = {.first = random_below(pages + 2), .block = 1 + random_below(20), .blocks = random_below(9)};
    span.stride = span.block + random_below(3) * random_below(20);
    span.end = random_below(pages + 1);
    *held_entries = *held_data = NULL;
    if (random_below(4) == 0) {
        span.base = (int64_t)random_below(1 << 30), span.flags = random_below(1 << 16);
        span.end = random_below(700), span.block *= 16, span.stride *= 16;
        return span;
    }
    *held_entries = exact(shift + pages * 32), *held_data = exact(shift + pages * 4096);
    fill(*held_entries, shift + pages * 32), fill(*held_data, shift + pages * 4096);
    for (uint64_t page = 0; page < pages; page++)
        store_le(*held_entries + shift + page * 32 + 2, MASKS[random_below(5)], 2);
    span.entries = *held_entries + shift, span.data = *held_data + shift;
    return span;
}

#define MAX_JOBS 6

static void check_lanes(const kernel *kernel)
{
    for (uint64_t round = 0; round < 150; round++) {
        size_t count = random_below(MAX_JOBS + 1);
        uint8_t *held[MAX_JOBS][2];
        uint32_t wanted[MAX_JOBS][8];
        uint64_t lengths[MAX_JOBS] = {0};
        job jobs[MAX_JOBS] = {0};
        for (size_t i = 0; i < count; i++) {
            jobs[i].span = random_span(&held[i][0], &held[i][1]);
            fill(jobs[i].state, sizeof jobs[i].state); /* a resumed chain */
            memcpy(wanted[i], jobs[i].state, sizeof wanted[i]);
            append_span(&jobs[i].span, wanted[i], &lengths[i]);
        }
        require(run_lanes(kernel, jobs, count), kernel->name, "results of spans that have their data", round);
        for (size_t i = 0; i < count; i++) {
            require(!memcmp(jobs[i].state, wanted[i], 32), kernel->name, "states of spans", round);
            require(jobs[i].length == lengths[i], kernel->name, "lengths of spans", round);
            free(held[i][0]), free(held[i][1]);
        }
    }
}

static void check_copies(void)
{
    for (uint64_t round = 0; round < 500; round++) {
        size_t size = random_below(700), to = random_below(64), from = random_below(64);
        uint8_t *target = exact(to + size), *source = exact(from + size);
        fill(source, from + size);
        copy_nt(target + to, source + from, size);
        require(!memcmp(target + to, source + from, size), "copy_nt", "bytes", round);
        zero_nt(target + to, size);
        for (size_t i = 0; i < size; i++)
            require(target[to + i] == 0, "zero_nt", "bytes", round);
        free(target), free(source);
    }
}

static int check(const char *name)
{
    const kernel *found = detect_kernel(), *both[] = {&PORTABLE, found};
    if (name && strcmp(found->name, name)) {
        printf("expected the kernel %s, found %s\n", name, found->name);
        return 1;
    }
    for (int i = 0; i < 1 + (found != &PORTABLE); i++) {
        check_examples(both[i]);
        check_kernels(both[i]);
        check_lanes(both[i]);
        printf("%s: examples, one lane, two lanes and spans agree\n", both[i]->name);
    }
    check_copies();
    return 0;
}

/* ---- dirty upper halves ---------------------------------------------------------------------------------- */

#ifdef __x86_64__
/* As assembly, so that no compiler cleans up behind it. */
void make_dirty(const uint32_t *word);
__asm__(".text\nmake_dirty:\n"
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n vbroadcastss (%rdi), %ymm\\n\n .endr\n ret");

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

#define MERGE_BLOCKS 34 /* ECREATE, and about as much again for 32 domains' digests and headers */
#define ROUNDS 3000

static int by_value(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

enum { CLEAN, DIRTY, UNGUARDED, CASES };

/* The time of one or two lanes by each case in turns, so that a busy machine meets all of them. */
static int measure_dirty(const kernel *kernel, int lanes)
{
    static const char *const NAMES[] = {"clean", "dirty", "dirty, without vzeroupper"};
    static double times[CASES][ROUNDS];
    static uint8_t bytes[MERGE_BLOCKS * 64];
    const uint8_t *list[MERGE_BLOCKS];
    uint32_t states[CASES][2][8];
    for (int i = 0; i < MERGE_BLOCKS; i++)
        list[i] = bytes + 64 * i;
    for (int round = 0; round < ROUNDS; round++)
        for (int which = 0; which < CASES; which++) {
            uint32_t(*state)[8] = states[which];
            memcpy(state[0], INITIAL_STATE, 32), memcpy(state[1], INITIAL_STATE, 32);
            clear_upper_halves();
            has_avx = which != UNGUARDED;
            double start = nanoseconds();
            if (which != CLEAN)
                make_dirty(INITIAL_STATE);
            if (lanes == 1)
                kernel->one(state[0], list, MERGE_BLOCKS);
            else
                kernel->two(state[0], state[1], list, list, MERGE_BLOCKS);
            times[which][round] = nanoseconds() - start;
            has_avx = 1;
        }
    for (int which = 0; which < CASES; which++) {
        qsort(times[which], ROUNDS, sizeof(double), by_value);
        require(!memcmp(states[which], states[CLEAN], sizeof states[which]), kernel->name, "states", (uint64_t)which);
        printf("%d lane%s, %-26s best %6.0f ns, median %6.0f ns\n", lanes, lanes > 1 ? "s" : " ", NAMES[which],
               times[which][0], times[which][ROUNDS / 2]);
    }
    return times[DIRTY][0] < 1.2 * times[CLEAN][0]; /* the best of thousands is steady, also on a busy machine */
}

static int dirty(void)
{
    const kernel *kernel = detect_kernel();
    if (kernel == &PORTABLE || !has_avx) {
        printf("dirty: no SHA extensions or no AVX here, nothing to measure\n");
        return 0;
    }
    int one = measure_dirty(kernel, 1), two = measure_dirty(kernel, 2);
    if (!one || !two)
        printf("dirty upper halves slow the kernel down\n");
    return !one || !two;
}
#else
static int dirty(void)
{
    printf("dirty: these registers are x86's\n");
    return 0;
}
#endif

static int overflow(void)
{
    uint8_t *short_by_one = exact(63);
    const uint8_t *list[] = {short_by_one};
    uint32_t state[8] = {0};
    fill(short_by_one, 63);
    detect_kernel()->one(state, list, 1);
    printf("%08x: nobody noticed\n", (unsigned)state[0]);
    free(short_by_one);
    return 0;
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "check";
    if (!strcmp(what, "check"))
        return check(count > 2 ? arguments[2] : NULL);
    if (!strcmp(what, "dirty"))
        return dirty();
    if (!strcmp(what, "overflow"))
        return overflow();
    fprintf(stderr, "usage: driver check [KERNEL] | dirty | overflow\n");
    return 2;
}
