/* The kernels alone, without Python: every level that runs here, in every mode, against a table-free
 * oracle, with memory that ends at forbidden pages and with exact heap blocks (for a sanitizer).
 *
 *   native_selftest CASES SEED     prints the levels that ran, then "ok"; exit code 1 on a mismatch
 *
 * Built by test_native_kernels.py: with sanitizers and the GFNI instruction emulated, and for 64-bit Arm, where a cross
 * compiler and an emulator are found.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_native_kernels.h"

enum { MOST_SOURCES = 40, MOST_DESTINATIONS = 11, MOST_BYTES = 20000 };

static uint64_t state;

static unsigned any(unsigned below) /* xorshift64*; below > 0 */
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (unsigned)((state * 2685821657736338717ULL >> 32) % below);
}

struct memory {
    void *base;
    size_t mapped; /* 0: from the heap */
    uint8_t *bytes;
};

/* Half of them end or begin at a page that nobody may touch, half are heap blocks of exact size. */
static struct memory take(size_t size)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (size + page) / page * page;
    struct memory memory = {NULL, 0, NULL};
    if (any(2)) {
        memory.base = memory.bytes = malloc(size ? size : 1);
        return memory;
    }
    memory.mapped = inner + 2 * page;
    memory.base = mmap(NULL, memory.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory.base == MAP_FAILED ||
        mprotect((uint8_t *)memory.base + page, inner, PROT_READ | PROT_WRITE)) {
        perror("mmap");
        exit(2);
    }
    memory.bytes = (uint8_t *)memory.base + page + (any(2) ? inner - size : 0);
    return memory;
}

static void give(struct memory memory)
{
    if (memory.mapped)
        munmap(memory.base, memory.mapped);
    else
        free(memory.base);
}

static void fill(uint8_t *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)any(256);
}

static size_t any_length(void)
{
    static const size_t widths[] = {16, 32, 64, 128, 256, 4096, 8192};
    switch (any(4)) {
    case 0: return any(140);
    case 1: return any(MOST_BYTES);
    default: return widths[any(7)] * (1 + any(2)) + any(3) - 1;
    }
}

static void oracle(const struct hf_job *job, uint8_t **results)
{
    for (size_t r = 0; r < job->destination_count; r++)
        for (size_t i = 0; i < job->chunk_bytes; i++) {
            uint8_t sum = job->accumulate ? job->destinations[r][i] : 0;
            for (size_t c = 0; c < job->source_count; c++)
                sum ^= hf_product(job->coefficients[r * job->source_count + c], job->sources[c][i]);
            results[r][i] = sum;
        }
}

static void fingerprint_oracle(const uint8_t *chunk, size_t size, uint8_t *out)
{
    uint8_t factor = 1;
    memset(out, 0, HF_FINGERPRINT_BYTES);
    for (size_t i = 0; i < size; i++) {
        out[i % HF_FINGERPRINT_BYTES] ^= hf_product(factor, chunk[i]);
        if (i % HF_FINGERPRINT_BYTES == HF_FINGERPRINT_BYTES - 1)
            factor = hf_product(factor, 2);
    }
}

static int check_level(const struct hf_level *level, struct hf_job *job, uint8_t *const *before,
                       uint8_t *const *right, const uint8_t *right_fingerprint)
{
    uint8_t fingerprint[HF_FINGERPRINT_BYTES];
    for (int mode = 0; mode < 3; mode++) {
        for (size_t r = 0; r < job->destination_count; r++)
            memcpy(job->destinations[r], before[r], job->chunk_bytes);
        job->stream = job->fetch = mode - 1;
        if (hf_multiply(level, job))
            return 1;
        for (size_t r = 0; r < job->destination_count; r++)
            if (memcmp(job->destinations[r], right[r], job->chunk_bytes)) {
                printf("level %s, mode %d: %zu sources, %zu destinations, %zu bytes, accumulate "
                       "%d: row %zu differs\n", level->name, mode, job->source_count,
                       job->destination_count, job->chunk_bytes, job->accumulate, r);
                return 1;
            }
    }
    if (job->source_count == 0)
        return 0;
    hf_fingerprint(level, job->sources[0], job->chunk_bytes, fingerprint);
    if (!memcmp(fingerprint, right_fingerprint, sizeof fingerprint))
        return 0;
    printf("level %s: fingerprint of %zu bytes differs\n", level->name, job->chunk_bytes);
    return 1;
}

static int one_case(void)
{
    struct memory sources[MOST_SOURCES], destinations[MOST_DESTINATIONS];
    uint8_t *source[MOST_SOURCES], *destination[MOST_DESTINATIONS];
    uint8_t *before[MOST_DESTINATIONS], *right[MOST_DESTINATIONS];
    uint8_t coefficients[MOST_SOURCES * MOST_DESTINATIONS], fingerprint[HF_FINGERPRINT_BYTES] = {0};
    int failed = 0;
    struct hf_job job = {
        .coefficients = coefficients,
        .sources = (const uint8_t *const *)source,
        .destinations = destination,
        .source_count = any(any(8) ? 14 : MOST_SOURCES),
        .destination_count = any(any(8) ? 6 : MOST_DESTINATIONS),
        .chunk_bytes = any_length(),
        .accumulate = (int)any(2),
    };
    fill(coefficients, sizeof coefficients);
    if (any(8) == 0)
        memset(coefficients, 1, sizeof coefficients);
    for (size_t c = 0; c < job.source_count; c++) {
        sources[c] = take(job.chunk_bytes);
        fill(source[c] = sources[c].bytes, job.chunk_bytes);
    }
    for (size_t r = 0; r < job.destination_count; r++) {
        destinations[r] = take(job.chunk_bytes);
        fill(destination[r] = destinations[r].bytes, job.chunk_bytes);
        before[r] = memcpy(malloc(job.chunk_bytes + 1), destination[r], job.chunk_bytes);
        right[r] = malloc(job.chunk_bytes + 1);
    }
    oracle(&job, right);
    if (job.source_count)
        fingerprint_oracle(source[0], job.chunk_bytes, fingerprint);
    for (size_t l = 0; l < hf_level_count && !failed; l++)
        if (hf_levels[l].usable())
            failed = check_level(&hf_levels[l], &job, before, right, fingerprint);
    for (size_t c = 0; c < job.source_count; c++)
        give(sources[c]);
    for (size_t r = 0; r < job.destination_count; r++) {
        give(destinations[r]);
        free(before[r]);
        free(right[r]);
    }
    return failed;
}

int main(int count, char **arguments)
{
    if (count != 3) {
        fprintf(stderr, "usage: %s CASES SEED\n", arguments[0]);
        return 2;
    }
    state = strtoull(arguments[2], NULL, 10) * 2 + 1;
    hf_init();
    for (size_t l = 0; l < hf_level_count; l++)
        if (hf_levels[l].usable())
            printf("%s ", hf_levels[l].name);
    printf("\n");
    for (long n = strtol(arguments[1], NULL, 10); n > 0; n--)
        if (one_case())
            return 1;
    printf("ok\n");
    return 0;
}
