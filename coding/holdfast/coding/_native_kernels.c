/* The levels: which instruction sets there are, their products, and which one this processor runs.
 *
 * GFNI: gf2p8affineqb multiplies every byte by an 8 x 8 bit matrix. (gf2p8mulb is of no use: its
 * polynomial is fixed to AES's 0x11b.) AVX2, SSSE3, NEON: two 16-entry table look-ups, one per
 * nibble (Plank, Greenan, Miller, "Screaming Fast Galois Field Arithmetic", FAST 2013). Portable:
 * the sum of the source's doublings that the coefficient's bits select.
 */
#include "_native_kernels.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define REDUCTION 0x1d /* the polynomial 0x11d without x^8 */
#define ROWS_MAX 4     /* results per pass that fit the registers of every level */
/* What all rows of wide codes compute before the next block is begun: it stays in the caches meanwhile. */
#define BLOCK_BYTES ((size_t)4096)
#define LINE_BYTES ((size_t)64)
/* How far ahead sources are fetched: beyond the hardware's own reach, within the time of arrival. */
#define AHEAD_BYTES ((size_t)384)
/* Up to here everything a call touches may stay in the L2 cache, where plain stores are best. */
#define CACHED_BYTES ((size_t)1 << 20)
/* Tables of a small code live on the stack. */
#define STACK_TABLE_BYTES 8192

#define INLINE static inline __attribute__((always_inline))

static inline size_t smaller(size_t left, size_t right)
{
    return left < right ? left : right;
}

/* The same bytes of every source, a little further on. Into L2: streams that start at equal places of their pages
 * share the sets of L1, which has room for eight of them or twelve. Beyond the end of a source it does nothing: a
 * fetch never faults. */
INLINE void fetch_ahead(const struct hf_job *job, size_t at, size_t count)
{
    for (size_t c = 0; c < job->source_count; c++)
        for (size_t done = 0; done < count; done += LINE_BYTES)
            __builtin_prefetch((const void *)((uintptr_t)job->sources[c] + at + AHEAD_BYTES + done), 0, 2);
}

uint8_t hf_product(uint8_t left, uint8_t right)
{
    unsigned product = 0, term = left;
    for (; right; right >>= 1) {
        if (right & 1)
            product ^= term;
        term = term << 1 ^ (term & 0x80 ? 0x100 | REDUCTION : 0);
    }
    return (uint8_t)product;
}

/* ---- tables, one kind per family of levels ------------------------------------------------- */

/* 32 bytes: products of the 16 low and of the 16 high nibbles. */
static void make_nibble_table(uint8_t coefficient, uint8_t *table)
{
    for (int nibble = 0; nibble < 16; nibble++) {
        table[nibble] = hf_product(coefficient, (uint8_t)nibble);
        table[16 + nibble] = hf_product(coefficient, (uint8_t)(nibble << 4));
    }
}

/* 128 bytes: for each bit of the coefficient 16 bytes of ones or zeros. */
static void make_mask_table(uint8_t coefficient, uint8_t *table)
{
    for (int bit = 0; bit < 8; bit++)
        memset(table + 16 * bit, coefficient >> bit & 1 ? 0xff : 0, 16);
}

/* ---- levels -------------------------------------------------------------------------------- */

#define W 16
#define LEVEL(name) name##_portable
#define TARGET
#define WIDE 1
#define WIDEST 1
#define PARTS 8
#define TABLE_BYTES 128
typedef uint8_t v16 __attribute__((vector_size(16), may_alias));
typedef int8_t s16 __attribute__((vector_size(16), may_alias));
typedef uint8_t loose16 __attribute__((vector_size(16), may_alias, aligned(1)));
INLINE void prepare_portable(v16 x, v16 *parts)
{
    for (int bit = 0; bit < 8; bit++) {
        parts[bit] = x;
        x = (x + x) ^ ((v16)((s16)x < 0) & REDUCTION);
    }
}
INLINE v16 product_portable(const v16 *parts, const uint8_t *table)
{
    v16 sum = {0};
    for (int bit = 0; bit < 8; bit++)
        sum ^= parts[bit] & *(const loose16 *)(table + 16 * bit);
    return sum;
}
#define PRODUCT product_portable
#if defined(__x86_64__)
#define STREAM(pointer, x) _mm_stream_si128((__m128i *)(pointer), (__m128i)(x))
#else
#define STREAM(pointer, x) STORE(pointer, x)
#endif
#include "_native_level.h"
#undef W
#undef LEVEL
#undef TARGET
#undef WIDE
#undef WIDEST
#undef PARTS
#undef TABLE_BYTES
#undef PRODUCT
#undef STREAM

static int always(void)
{
    return 1;
}

#if defined(__x86_64__)

/* Leaf 7 and XGETBV together: the processor knows the instructions and the kernel saves the
 * registers. Not __builtin_cpu_supports: with some compiler run-times it answers 0 in a shared
 * library, and the slow path would be taken in silence. */
struct features {
    int ssse3, avx2, avx512, gfni;
};

static struct features read_features(void)
{
    struct features found = {0, 0, 0, 0};
    unsigned a, b, c, d, low = 0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return found;
    found.ssse3 = c >> 9 & 1;
    if (c >> 27 & 1) /* OSXSAVE */
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    found.avx2 = (b >> 5 & 1) && (low & 0x06) == 0x06;
    found.avx512 = (b >> 16 & 1) && (b >> 30 & 1) && (low & 0xe6) == 0xe6; /* F and BW */
    found.gfni = c >> 8 & 1;
    return found;
}

/* Read once, by hf_init: under a hypervisor every CPUID costs some ten microseconds. */
static struct features features;

/* 8 bytes: the row of the bit matrix for result bit i is in byte 7 - i. */
static void make_matrix_table(uint8_t coefficient, uint8_t *table)
{
    memset(table, 0, 8);
    for (int in = 0; in < 8; in++) {
        uint8_t column = hf_product(coefficient, (uint8_t)(1 << in));
        for (int out = 0; out < 8; out++)
            table[7 - out] |= (uint8_t)((column >> out & 1) << in);
    }
}

#ifdef HOLDFAST_EMULATE_GFNI
/* For a test build on machines without GFNI: the instruction as Intel's manual describes it, so
 * that everything around it runs. Shows nothing about the real instruction. */
static int usable_gfni512(void) { return 1; }
static int usable_gfni256(void) { return 1; }
INLINE void affine(const uint8_t *x, const uint8_t *table, uint8_t *out, int count)
{
    for (int i = 0; i < count; i++) {
        unsigned result = 0;
        for (int bit = 0; bit < 8; bit++)
            result |= (unsigned)__builtin_parity(table[7 - bit] & x[i]) << bit;
        out[i] = (uint8_t)result;
    }
}
#define GFNI512_TARGET
#define GFNI256_TARGET
#define GFNI_PRODUCT(W, parts, table)                                                              \
    ({                                                                                             \
        uint8_t out_[W];                                                                           \
        affine((const uint8_t *)(parts), table, out_, W);                                          \
        LOAD(out_);                                                                                \
    })
#define PRODUCT512(parts, table) GFNI_PRODUCT(64, parts, table)
#define PRODUCT256(parts, table) GFNI_PRODUCT(32, parts, table)
#define STREAM512(pointer, x) STORE(pointer, x)
#define STREAM256(pointer, x) STORE(pointer, x)
#else
static int usable_gfni512(void) { return features.avx512 && features.gfni; }
static int usable_gfni256(void) { return features.avx2 && features.gfni; }
#define GFNI512_TARGET __attribute__((target("avx512f,avx512bw,gfni")))
#define GFNI256_TARGET __attribute__((target("avx2,gfni")))
#define PRODUCT512(parts, table)                                                                   \
    (VEC) _mm512_gf2p8affine_epi64_epi8((__m512i)(parts)[0], _mm512_set1_epi64(load64(table)), 0)
#define PRODUCT256(parts, table)                                                                   \
    (VEC) _mm256_gf2p8affine_epi64_epi8((__m256i)(parts)[0], _mm256_set1_epi64x(load64(table)), 0)
#define STREAM512(pointer, x) _mm512_stream_si512((__m512i *)(pointer), (__m512i)(x))
#define STREAM256(pointer, x) _mm256_stream_si256((__m256i *)(pointer), (__m256i)(x))
INLINE long long load64(const uint8_t *table)
{
    long long value;
    memcpy(&value, table, sizeof value);
    return value;
}
#endif

#define TABLE_BYTES 8
#define PARTS 1
#define W 64
#define WIDE 4
#define WIDEST 4
#define LEVEL(name) name##_gfni512
#define TARGET GFNI512_TARGET
typedef uint8_t v64 __attribute__((vector_size(64), may_alias));
#define prepare_gfni512(x, parts) ((parts)[0] = (x))
#define PRODUCT PRODUCT512
#define STREAM STREAM512
#include "_native_level.h"
#undef W
#undef WIDE
#undef WIDEST
#undef LEVEL
#undef TARGET
#undef PRODUCT
#undef STREAM

#define W 32
#define WIDE 2
#define WIDEST 4
#define LEVEL(name) name##_gfni256
#define TARGET GFNI256_TARGET
#define prepare_gfni256(x, parts) ((parts)[0] = (x))
#define PRODUCT PRODUCT256
#define STREAM STREAM256
#include "_native_level.h"
#undef TABLE_BYTES
#undef PARTS
#undef WIDE
#undef WIDEST
#undef LEVEL
#undef TARGET
#undef PRODUCT
#undef STREAM

static int usable_avx2(void) { return features.avx2; }
#define TABLE_BYTES 32
#define PARTS 2
#define WIDE 2
#define WIDEST 4
#define LEVEL(name) name##_avx2
#define TARGET __attribute__((target("avx2")))
typedef uint8_t v32 __attribute__((vector_size(32), may_alias));
INLINE TARGET void prepare_avx2(v32 x, v32 *parts)
{
    const __m256i nibble = _mm256_set1_epi8(15);
    parts[0] = (v32)_mm256_and_si256((__m256i)x, nibble);
    parts[1] = (v32)_mm256_and_si256(_mm256_srli_epi64((__m256i)x, 4), nibble);
}
INLINE TARGET v32 product_avx2(const v32 *parts, const uint8_t *table)
{
    const __m128i *halves = (const __m128i *)table;
    __m256i low = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves));
    __m256i high = _mm256_broadcastsi128_si256(_mm_loadu_si128(halves + 1));
    return (v32)_mm256_xor_si256(_mm256_shuffle_epi8(low, (__m256i)parts[0]),
                                 _mm256_shuffle_epi8(high, (__m256i)parts[1]));
}
#define PRODUCT product_avx2
#define STREAM(pointer, x) _mm256_stream_si256((__m256i *)(pointer), (__m256i)(x))
#include "_native_level.h"
#undef W
#undef LEVEL
#undef TARGET
#undef PRODUCT
#undef STREAM

static int usable_ssse3(void) { return features.ssse3; }
#define W 16
#define LEVEL(name) name##_ssse3
#define TARGET __attribute__((target("ssse3")))
INLINE TARGET void prepare_ssse3(v16 x, v16 *parts)
{
    const __m128i nibble = _mm_set1_epi8(15);
    parts[0] = (v16)_mm_and_si128((__m128i)x, nibble);
    parts[1] = (v16)_mm_and_si128(_mm_srli_epi64((__m128i)x, 4), nibble);
}
INLINE TARGET v16 product_ssse3(const v16 *parts, const uint8_t *table)
{
    const __m128i *halves = (const __m128i *)table;
    __m128i low = _mm_loadu_si128(halves), high = _mm_loadu_si128(halves + 1);
    return (v16)_mm_xor_si128(_mm_shuffle_epi8(low, (__m128i)parts[0]),
                              _mm_shuffle_epi8(high, (__m128i)parts[1]));
}
#define PRODUCT product_ssse3
#define STREAM(pointer, x) _mm_stream_si128((__m128i *)(pointer), (__m128i)(x))
#include "_native_level.h"

#elif defined(__aarch64__)

#define W 16
#define TABLE_BYTES 32
#define PARTS 2
#define WIDE 2
#define WIDEST 4
#define LEVEL(name) name##_neon
#define TARGET
INLINE void prepare_neon(v16 x, v16 *parts)
{
    parts[0] = (v16)vandq_u8((uint8x16_t)x, vdupq_n_u8(15));
    parts[1] = (v16)vshrq_n_u8((uint8x16_t)x, 4);
}
INLINE v16 product_neon(const v16 *parts, const uint8_t *table)
{
    uint8x16_t low = vld1q_u8(table), high = vld1q_u8(table + 16);
    return (v16)veorq_u8(vqtbl1q_u8(low, (uint8x16_t)parts[0]),
                         vqtbl1q_u8(high, (uint8x16_t)parts[1]));
}
#define PRODUCT product_neon
#define STREAM(pointer, x) STORE(pointer, x)
#include "_native_level.h"

#endif

#define ENTRY(name, usable, bytes, make) {#name, usable, multiply_##name, fingerprint_##name, bytes, make}
const struct hf_level hf_levels[] = {
#if defined(__x86_64__)
    ENTRY(gfni512, usable_gfni512, 8, make_matrix_table),
    ENTRY(gfni256, usable_gfni256, 8, make_matrix_table),
    ENTRY(avx2, usable_avx2, 32, make_nibble_table),
    ENTRY(ssse3, usable_ssse3, 32, make_nibble_table),
#elif defined(__aarch64__)
    ENTRY(neon, always, 32, make_nibble_table),
#endif
    ENTRY(portable, always, 128, make_mask_table),
};
const size_t hf_level_count = sizeof hf_levels / sizeof hf_levels[0];

/* ---- calls --------------------------------------------------------------------------------- */

/* Tables of all 256 coefficients, per level: 8 + 8 + 32 + 32 + 128 bytes each, 52 KiB. */
static uint8_t all_tables[HF_LEVEL_COUNT_MAX][256 * 128];

void hf_init(void)
{
#if defined(__x86_64__)
    features = read_features();
#endif
    for (size_t i = 0; i < hf_level_count; i++)
        for (int c = 0; c < 256; c++)
            hf_levels[i].make_table((uint8_t)c, all_tables[i] + c * hf_levels[i].table_bytes);
}

/* Non-temporal stores save reading the destination first; they need alignment, and pay only when
 * the results would not stay in the cache anyway. */
static enum hf_choice choose_stream(const struct hf_job *job)
{
    size_t touched = (job->source_count + job->destination_count) * job->chunk_bytes;
    if (job->accumulate || job->stream == HF_NO)
        return HF_NO;
    for (size_t r = 0; r < job->destination_count; r++)
        if ((uintptr_t)job->destinations[r] % LINE_BYTES)
            return HF_NO;
    return job->stream == HF_YES || touched > CACHED_BYTES ? HF_YES : HF_NO;
}

static enum hf_choice choose_fetch(const struct hf_job *job)
{
    size_t touched = (job->source_count + job->destination_count) * job->chunk_bytes;
    if (job->fetch != HF_AUTO)
        return job->fetch;
    return touched > CACHED_BYTES ? HF_YES : HF_NO;
}

/* XOR parity, and rebuild from it: no product is needed. */
static int is_plain(const struct hf_job *job)
{
    for (size_t c = 0; c < job->source_count; c++)
        if (job->coefficients[c] != 1)
            return 0;
    return job->destination_count == 1;
}

/* Tables in the order in which the kernel uses them: per group of rows, source by source. */
static void lay_out_tables(const struct hf_level *level, const struct hf_job *job, uint8_t *out)
{
    const uint8_t *of_level = all_tables[level - hf_levels];
    for (size_t first = 0; first < job->destination_count; first += ROWS_MAX) {
        size_t rows = smaller(ROWS_MAX, job->destination_count - first);
        for (size_t c = 0; c < job->source_count; c++)
            for (size_t r = first; r < first + rows; r++, out += level->table_bytes) {
                uint8_t coefficient = job->coefficients[r * job->source_count + c];
                memcpy(out, of_level + coefficient * level->table_bytes, level->table_bytes);
            }
    }
}

int hf_multiply(const struct hf_level *level, const struct hf_job *job)
{
    uint8_t on_stack[STACK_TABLE_BYTES];
    size_t count = job->source_count * job->destination_count;
    uint8_t *tables = on_stack;
    struct hf_job chosen = *job;
    if (job->destination_count == 0 || job->chunk_bytes == 0)
        return 0;
    if (count * level->table_bytes > sizeof on_stack) {
        tables = malloc(count * level->table_bytes);
        if (!tables)
            return -1;
    }
    chosen.stream = choose_stream(job);
    chosen.fetch = choose_fetch(job);
    chosen.plain = is_plain(job);
    lay_out_tables(level, job, tables);
    level->multiply(&chosen, tables);
#if defined(__x86_64__)
    if (chosen.stream == HF_YES)
        _mm_sfence(); /* whoever is told that the result is there must see it */
#endif
    if (tables != on_stack)
        free(tables);
    return 0;
}

void hf_fingerprint(const struct hf_level *level, const uint8_t *chunk, size_t chunk_bytes,
                    uint8_t *out)
{
    level->fingerprint(chunk, chunk_bytes, out);
}
