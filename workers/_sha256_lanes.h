/* From pages to blocks: a lane walks the pages of one span and keeps a short queue of 64-byte blocks.
 *
 * Page bytes are queued by their address, EADD and EEXTEND headers are written into the lane itself. run_lanes()
 * keeps two lanes in lockstep over the shorter of their queues, gives a lane that ran out the next job, and
 * ends a lone remainder with the one-lane kernel. So lanes may differ in length and in shape.
 *
 * No Python in here: all of it runs without the GIL. Bounds are the caller's to check.
 */
#ifndef ENTURBO_SHA256_LANES_H
#define ENTURBO_SHA256_LANES_H

#include "_sha256_kernels.h"

#define PAGE_SIZE 4096
#define CHUNK_SIZE 256
#define CHUNKS 16
#define BLOCK_SIZE 64
#define ENTRY_SIZE 32
#define RECORD_SIZE_MEASURED (BLOCK_SIZE + CHUNKS * (BLOCK_SIZE + CHUNK_SIZE))
#define PAGE_BLOCKS (RECORD_SIZE_MEASURED / BLOCK_SIZE)
#define PAGE_HEADERS (1 + CHUNKS)
#define QUEUE (4 * PAGE_BLOCKS)
#define HEADERS 128 /* <= QUEUE */

/* Pages [first + k * stride, min(first + k * stride + block, end)) for k in 0 .. blocks - 1. */
typedef struct {
    const uint8_t *entries; /* EPCM entries; NULL: EADD-only pages with `flags`, page p at linear base + p */
    const uint8_t *data;    /* page p at p * PAGE_SIZE; NULL: no page may be measured */
    uint64_t first, block, stride, blocks, end;
    uint64_t flags;
    int64_t base;
} span;

typedef struct {
    span span;
    uint32_t state[8];
    uint64_t length;
} job;

typedef struct {
    job *job;
    uint64_t start, page, stop, blocks; /* of the current block; blocks still to come */
    size_t head, count, headers_used;
    const uint8_t *queue[QUEUE];
    uint8_t headers[HEADERS][BLOCK_SIZE] __attribute__((aligned(64)));
} lane;

static inline void store_le(uint8_t *at, uint64_t value, int bytes)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(at, &value, (size_t)bytes);
#else
    for (int i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> (8 * i));
#endif
}

static inline uint8_t *new_header(lane *lane, const char tag[8], uint64_t offset)
{
    uint8_t *header = lane->headers[lane->headers_used++];
    memset(header, 0, BLOCK_SIZE);
    memcpy(header, tag, 8);
    store_le(header + 8, offset, 8);
    lane->queue[lane->count++] = header;
    return header;
}

/* Entries stand in shared memory and another process may write them while we read: each field is read once,
 * so that what is hashed is one value of it, and no bound ever depends on a second read. */
static inline unsigned read_u16(const uint8_t *at)
{
    const volatile uint8_t *byte = at;
    unsigned low = byte[0];
    return low | (unsigned)byte[1] << 8;
}

static inline uint32_t read_u32(const uint8_t *at) { return read_u16(at) | (uint32_t)read_u16(at + 2) << 16; }

/* Queues the records of one page. False: it is measured, but the span has no data. */
static int queue_page(lane *lane, uint64_t page)
{
    const span *span = &lane->job->span;
    const uint8_t *entry = span->entries + page * ENTRY_SIZE;
    unsigned flags = read_u16(entry), chunks = read_u16(entry + 2);
    uint64_t offset = (uint64_t)read_u32(entry + 8) * PAGE_SIZE;
    if (chunks && !span->data)
        return 0;
    store_le(new_header(lane, "EADD\0\0\0", offset) + 16, flags, 8);
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (!(chunks >> chunk & 1))
            continue;
        new_header(lane, "EEXTEND", offset + (uint64_t)chunk * CHUNK_SIZE);
        const uint8_t *bytes = span->data + page * PAGE_SIZE + (size_t)chunk * CHUNK_SIZE;
        for (int i = 0; i < CHUNK_SIZE / BLOCK_SIZE; i++)
            lane->queue[lane->count++] = bytes + i * BLOCK_SIZE;
    }
    return 1;
}

/* The headers of an EADD-only span differ in their offset alone: all else is written once, by start_job(). */
static void prepare_eadds(lane *lane)
{
    lane->headers_used = 0;
    for (int i = 0; i < HEADERS; i++)
        store_le(new_header(lane, "EADD\0\0\0", 0) + 16, lane->job->span.flags, 8);
}

static void start_job(lane *lane, job *job)
{
    const span *span = &job->span;
    lane->job = job;
    lane->start = span->first;
    lane->page = lane->stop = 0;
    lane->blocks = span->blocks;
    lane->head = lane->count = 0;
    if (!span->entries)
        prepare_eadds(lane);
}

/* The next page of the span in lane->page. False: there is none. */
static inline int next_page(lane *lane)
{
    const span *span = &lane->job->span;
    while (lane->page == lane->stop) {
        if (lane->blocks == 0 || lane->start >= span->end)
            return 0;
        uint64_t left = span->end - lane->start;
        lane->page = lane->start;
        lane->stop = lane->start + (span->block < left ? span->block : left);
        /* At the last block the sum may wrap; it is not used then. */
        lane->start = span->stride < left ? lane->start + span->stride : span->end;
        lane->blocks--;
    }
    return 1;
}

/* Refills an empty queue. 1: blocks are there, 0: the span is done, -1: a measured page without data. */
static int refill(lane *lane)
{
    const span *span = &lane->job->span;
    lane->head = lane->count = lane->headers_used = 0;
    if (!span->entries) {
        while (lane->count < HEADERS && next_page(lane)) {
            uint64_t offset = (lane->page++ + (uint64_t)span->base) * PAGE_SIZE;
            store_le(lane->headers[lane->count++] + 8, offset, 8);
        }
        lane->job->length += lane->count * BLOCK_SIZE;
        return lane->count > 0;
    }
    while (lane->count + PAGE_BLOCKS <= QUEUE && lane->headers_used + PAGE_HEADERS <= HEADERS && next_page(lane))
        if (!queue_page(lane, lane->page++))
            return -1;
    lane->job->length += lane->count * BLOCK_SIZE;
    return lane->count > 0;
}

/* Blocks for this lane, from its own job or the next ones. Values as refill(). */
static int supply(lane *lane, job *jobs, size_t count, size_t *next)
{
    if (lane->head < lane->count)
        return 1;
    for (;;) {
        int found = lane->job ? refill(lane) : 0;
        if (found || *next == count) {
            if (!found)
                lane->job = NULL;
            return found;
        }
        start_job(lane, &jobs[(*next)++]);
    }
}

/* Runs all jobs. False: a measured page without data; the states are then worthless. */
static int run_lanes(const kernel *kernel, job *jobs, size_t count)
{
    lane lanes[2];
    lane *a = &lanes[0], *b = &lanes[1];
    size_t next = 0;
    a->job = b->job = NULL;
    a->head = a->count = b->head = b->count = 0;
    for (;;) {
        int has_a = supply(a, jobs, count, &next);
        int has_b = supply(b, jobs, count, &next);
        if (has_a < 0 || has_b < 0)
            return 0;
        if (has_a && has_b) {
            size_t left_a = a->count - a->head, left_b = b->count - b->head;
            size_t blocks = left_a < left_b ? left_a : left_b;
            kernel->two(a->job->state, b->job->state, a->queue + a->head, b->queue + b->head, blocks);
            a->head += blocks, b->head += blocks;
        } else if (has_a || has_b) {
            lane *only = has_a ? a : b;
            kernel->one(only->job->state, only->queue + only->head, only->count - only->head);
            only->head = only->count;
        } else {
            return 1;
        }
    }
}

/* Whole blocks of one contiguous buffer. */
static void run_buffer(const kernel *kernel, uint32_t state[8], const uint8_t *bytes, size_t blocks)
{
    const uint8_t *queue[QUEUE];
    while (blocks) {
        size_t count = blocks < QUEUE ? blocks : QUEUE;
        for (size_t i = 0; i < count; i++)
            queue[i] = bytes + i * BLOCK_SIZE;
        kernel->one(state, queue, count);
        bytes += count * BLOCK_SIZE;
        blocks -= count;
    }
}

static void final_digest(const kernel *kernel, const uint32_t state[8], uint64_t length, uint8_t digest[32])
{
    uint32_t last[8];
    uint8_t padding[BLOCK_SIZE] = {0x80};
    const uint8_t *block = padding;
    memcpy(last, state, sizeof last);
    for (int i = 0; i < 8; i++)
        padding[56 + i] = (uint8_t)(length * 8 >> (56 - 8 * i));
    kernel->one(last, &block, 1);
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(last[i / 4] >> (24 - 8 * (i % 4)));
}

#endif
