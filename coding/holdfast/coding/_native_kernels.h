/* Products over GF(2^8) of whole buffers, at memory speed. No Python here: see _native.c for that.
 *
 * One implementation per instruction set ("level"), all from the template _native_level.h, chosen at
 * run time. Nothing is compiled with -march: a binary runs on every processor of its architecture.
 */
#ifndef HOLDFAST_NATIVE_KERNELS_H
#define HOLDFAST_NATIVE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define HF_MAX_CODE_LENGTH 255
#define HF_FINGERPRINT_BYTES 256
#define HF_LEVEL_COUNT_MAX 6

/* How results are stored and whether sources are fetched ahead; AUTO decides by size. */
enum hf_choice { HF_AUTO = -1, HF_NO = 0, HF_YES = 1 };
struct hf_job {
    const uint8_t *coefficients; /* row-major, destination_count rows of source_count */
    const uint8_t *const *sources;
    uint8_t *const *destinations; /* share no byte with each other or with a source */
    size_t source_count;          /* 0 .. HF_MAX_CODE_LENGTH */
    size_t destination_count;     /* 0 .. HF_MAX_CODE_LENGTH */
    size_t chunk_bytes;
    int accumulate;
    enum hf_choice fetch;  /* ask for every source's next bytes before they are used */
    enum hf_choice stream; /* non-temporal stores: past the caches, needs aligned destinations */
    int plain;             /* set by hf_multiply: one destination, all coefficients are 1 */
};

struct hf_level {
    const char *name;
    int (*usable)(void);
    void (*multiply)(const struct hf_job *job, const uint8_t *tables);
    void (*fingerprint)(const uint8_t *chunk, size_t chunk_bytes, uint8_t *out);
    size_t table_bytes; /* per coefficient */
    void (*make_table)(uint8_t coefficient, uint8_t *table);
};

/* Levels of this architecture, best first; hf_level_count of them. Usable here or not. */
extern const struct hf_level hf_levels[];
extern const size_t hf_level_count;

/* Must run once before any other call (reads the processor's features, fills the levels' tables). */
void hf_init(void);

/* destinations[r] (^)= sum of coefficients[r][c] * sources[c]. Returns 0, or -1 without memory. */
int hf_multiply(const struct hf_level *level, const struct hf_job *job);

/* sum over b of 2^b * block b, for blocks of HF_FINGERPRINT_BYTES, the last one zero-padded. */
void hf_fingerprint(const struct hf_level *level, const uint8_t *chunk, size_t chunk_bytes,
                    uint8_t *out);

/* Product of two field elements by shift and add: the tables' origin. */
uint8_t hf_product(uint8_t left, uint8_t right);

#endif
