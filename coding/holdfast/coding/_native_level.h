/* The kernel of one level. Included once per instruction set by _native_kernels.c, which defines
 *
 *   LEVEL(name)              a name with the level's suffix
 *   TARGET                   the function attribute that switches the instruction set on
 *   W                        bytes of one vector
 *   WIDE                     vectors per source and step, for any rows: the more, the fewer table loads per byte
 *   WIDEST                   the same for one or two rows, which leave registers for more of them
 *   PARTS                    vectors that prepare() makes of one
 *   TABLE_BYTES              per coefficient
 *   prepare(x, parts)        what all rows need of a source vector (its nibbles, its doublings)
 *   PRODUCT(parts, table)    coefficient * x
 *   STREAM(pointer, x)       a store past the caches, to an address aligned to W
 *
 * Vectors are the compiler's generic ones (GCC and Clang), so only the product is written by hand.
 */

typedef uint8_t LEVEL(vec) __attribute__((vector_size(W), may_alias));
typedef uint8_t LEVEL(loose) __attribute__((vector_size(W), may_alias, aligned(1)));
typedef int8_t LEVEL(signed_vec) __attribute__((vector_size(W), may_alias));
#define VEC LEVEL(vec)
#define LOAD(pointer) ((VEC) * (const LEVEL(loose) *)(pointer))
#define STORE(pointer, x) (*(LEVEL(loose) *)(pointer) = (LEVEL(loose))(x))
/* x times 2 in every byte: shift, and subtract the polynomial where the highest bit fell out. */
#define TIMES_TWO(x) (((x) + (x)) ^ ((VEC)((LEVEL(signed_vec))(x) < 0) & REDUCTION))

/* rows x vecs results at one offset, kept in registers over all sources. rows, vecs, stream and
 * plain (one row of ones: XOR) are constants at every call, so all inner loops vanish. */
INLINE TARGET void LEVEL(step)(const struct hf_job *job, const uint8_t *tables,
                               uint8_t *const *destinations, size_t at, int rows, int vecs,
                               int stream, int plain, int fetch)
{
    VEC total[ROWS_MAX][WIDEST];
    if (fetch)
        fetch_ahead(job, at, vecs * W);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++)
            total[r][v] = job->accumulate ? LOAD(destinations[r] + at + v * W) : (VEC){0};
    for (size_t c = 0; c < job->source_count; c++) {
        const uint8_t *source = job->sources[c] + at;
        VEC parts[WIDEST][PARTS];
        for (int v = 0; v < vecs; v++) {
            if (plain)
                total[0][v] ^= LOAD(source + v * W);
            else
                LEVEL(prepare)(LOAD(source + v * W), parts[v]);
            for (int r = 0; r < rows && PARTS > 1 && !plain; r++) /* parts are many: forget them soon */
                total[r][v] ^= PRODUCT(parts[v], tables + r * TABLE_BYTES);
        }
        for (int r = 0; r < rows && PARTS == 1 && !plain; r++) /* tables are many: load each once */
            for (int v = 0; v < vecs; v++)
                total[r][v] ^= PRODUCT(parts[v], tables + r * TABLE_BYTES);
        tables += rows * TABLE_BYTES;
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vecs; v++) {
            if (stream)
                STREAM(destinations[r] + at + v * W, total[r][v]);
            else
                STORE(destinations[r] + at + v * W, total[r][v]);
        }
}

/* Whole vectors of [start, stop) for one group of rows; stop - start is a multiple of W. */
INLINE TARGET void LEVEL(span)(const struct hf_job *job, const uint8_t *tables,
                               uint8_t *const *destinations, size_t start, size_t stop, int rows,
                               int stream, int plain, int fetch)
{
    const int wide = rows <= 2 ? WIDEST : WIDE;
    size_t at = start;
    for (; at + wide * W <= stop; at += wide * W)
        LEVEL(step)(job, tables, destinations, at, rows, wide, stream, plain, fetch);
    for (; at < stop; at += W)
        LEVEL(step)(job, tables, destinations, at, rows, 1, stream, plain, 0);
}

TARGET static void LEVEL(rows)(const struct hf_job *job, const uint8_t *tables,
                               uint8_t *const *destinations, size_t start, size_t stop, int rows,
                               int fetch)
{
#define SPAN(count, stream, plain)                                                                 \
    LEVEL(span)(job, tables, destinations, start, stop, count, stream, plain, fetch)
    switch (rows * 2 + (job->stream == HF_YES)) {
    case 2: job->plain ? SPAN(1, 0, 1) : SPAN(1, 0, 0); break;
    case 3: job->plain ? SPAN(1, 1, 1) : SPAN(1, 1, 0); break;
    case 4: SPAN(2, 0, 0); break;
    case 5: SPAN(2, 1, 0); break;
    case 6: SPAN(3, 0, 0); break;
    case 7: SPAN(3, 1, 0); break;
    case 8: SPAN(4, 0, 0); break;
    case 9: SPAN(4, 1, 0); break;
    }
#undef SPAN
}

/* The last chunk_bytes % W bytes, through zero-padded copies: no byte beyond a buffer is touched. */
TARGET static void LEVEL(tail)(const struct hf_job *job, const uint8_t *tables, size_t start)
{
    uint8_t copies[HF_MAX_CODE_LENGTH][W];
    uint8_t results[ROWS_MAX][W];
    const uint8_t *sources[HF_MAX_CODE_LENGTH];
    uint8_t *destinations[ROWS_MAX];
    size_t count = job->chunk_bytes - start;
    struct hf_job last = *job;
    for (size_t c = 0; c < job->source_count; c++) {
        memset(copies[c], 0, W);
        memcpy(copies[c], job->sources[c] + start, count);
        sources[c] = copies[c];
    }
    last.sources = sources;
    last.stream = HF_NO;
    for (size_t first = 0; first < job->destination_count; first += ROWS_MAX) {
        int rows = (int)smaller(ROWS_MAX, job->destination_count - first);
        for (int r = 0; r < rows; r++) {
            destinations[r] = results[r];
            memset(results[r], 0, W);
            memcpy(results[r], job->destinations[first + r] + start, count);
        }
        LEVEL(rows)(&last, tables, destinations, 0, W, rows, 0);
        for (int r = 0; r < rows; r++)
            memcpy(job->destinations[first + r] + start, results[r], count);
        tables += rows * job->source_count * TABLE_BYTES;
    }
}

/* Block by block, all rows of a block before the next one, so that each source leaves DRAM once. */
TARGET static void LEVEL(multiply)(const struct hf_job *job, const uint8_t *tables)
{
    size_t whole = job->chunk_bytes - job->chunk_bytes % W;
    for (size_t start = 0; start < whole; start += BLOCK_BYTES) {
        size_t stop = smaller(start + BLOCK_BYTES, whole);
        const uint8_t *group_tables = tables;
        for (size_t first = 0; first < job->destination_count; first += ROWS_MAX) {
            int rows = (int)smaller(ROWS_MAX, job->destination_count - first);
            LEVEL(rows)(job, group_tables, job->destinations + first, start, stop, rows,
                        job->fetch == HF_YES && first == 0);
            group_tables += rows * job->source_count * TABLE_BYTES;
        }
    }
    if (whole < job->chunk_bytes)
        LEVEL(tail)(job, tables, whole);
}

/* Horner from the last block to the first: total = 2 * total + block. */
TARGET static void LEVEL(fingerprint)(const uint8_t *chunk, size_t chunk_bytes, uint8_t *out)
{
    enum { LANES = HF_FINGERPRINT_BYTES / W };
    uint8_t last[HF_FINGERPRINT_BYTES] = {0};
    VEC total[LANES];
    size_t at = chunk_bytes - chunk_bytes % HF_FINGERPRINT_BYTES;
    if (at < chunk_bytes)
        memcpy(last, chunk + at, chunk_bytes - at);
    for (int v = 0; v < LANES; v++)
        total[v] = LOAD(last + v * W);
    while (at > 0) {
        at -= HF_FINGERPRINT_BYTES;
        for (int v = 0; v < LANES; v++)
            total[v] = TIMES_TWO(total[v]) ^ LOAD(chunk + at + v * W);
    }
    for (int v = 0; v < LANES; v++)
        STORE(out + v * W, total[v]);
}

#undef TIMES_TWO
#undef STORE
#undef LOAD
#undef VEC
