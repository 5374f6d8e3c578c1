/* Fused passes over tiles on the CPU: read, widen, subtract, select, combine, round, in blocks that stay in the cache.
 *
 * Every function here has an eager twin in torch that defines it; results are the same bits, and tests hold them to it.
 * That is why sums fuse multiply and add exactly where torch's vectorised kernels do (fma below) and nowhere else
 * (-ffp-contract=off). Without a compiler, or on a machine without AVX2 and FMA, the eager form runs.
 *
 * The kernels are compiled twice, for AVX2 and for AVX-512, and chosen when the library is loaded.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define TV_VERSION 2 /* raised with every change of a struct or a signature; native.py holds the same number */

int tv_version(void) { return TV_VERSION; }

/* Positioned reads of several pieces. Returns -1, or the index of the piece that failed (errno in *error; 0: too short). */
int tv_read(int count, const int *fds, const int64_t *offsets, const int64_t *sizes, void **into, int *error) {
    for (int i = 0; i < count; i++) {
        for (int64_t done = 0; done < sizes[i];) {
            ssize_t got = pread(fds[i], (char *)into[i] + done, (size_t)(sizes[i] - done), offsets[i] + done);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) {
                *error = got < 0 ? errno : 0;
                return i;
            }
            done += got;
        }
    }
    return -1;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };       /* dtypes */
enum { AS_IS = 0, LESS_BASE = 1, PLUS_BASE = 2 };      /* what becomes of a row before it is a delta (or a weight) */
enum { TRIM = 0, BAND = 1, DROP = 2 };                 /* steps of preprocessing */
enum { WEIGHTED_SUM = 0, TIES_MEAN = 1, TIES_SUM = 2, PCB = 3, SCE = 4 }; /* ways to combine */
enum { MAGNITUDE = 0, VALUE = 1, PCB_SCORE = 2, VARIANCE = 3 };            /* of what order statistics are taken */
enum { PRODUCTS = 0, ENERGIES = 1 };                   /* sums over chunks */

#define MOST_TASKS 64
#define BLOCK 1024   /* elements that go through all steps at a time */
#define CHUNK 32768  /* elements whose squares make one partial sum */

/* What lies in memory of one tile, as it is stored. A row without memory is zero. */
typedef struct {
    int32_t tasks;
    int32_t base_kind;
    int64_t count;
    const void *const *rows;
    const int32_t *kinds;
    const int32_t *relations;
    const void *base; /* NULL: none */
} tv_tile;

/* Of what order statistics are taken; `low` and `high` are the ends of PCB's clip for each task. */
typedef struct {
    int32_t what;
    const float *low;
    const float *high;
} tv_values;

/* One step of preprocessing: for each task its numbers. */
typedef struct {
    int32_t type;
    int32_t scaled;        /* whether `factor` multiplies */
    const float *low;      /* TRIM, BAND: the least magnitude that is kept */
    const float *high;     /* BAND: the largest */
    const float *factor;
    const uint32_t *add;   /* DROP: keys of the draws; `limit`: what draws must be below, all ones of 64 bits: keep all */
    const uint32_t *multiply;
    const uint64_t *limit;
} tv_step;

typedef struct {
    int32_t combine;
    int32_t steps;
    const tv_step *step;
    const float *weights;
    int32_t divided, scaled, onto_base, out_kind;
    float divisor, factor, scale;
    int32_t multiplied; /* by `factor`, before `scale` */
    uint32_t position;  /* of the tile's first element in its tensor, for the draws */
    float least;        /* SCE: the least variance that is kept */
    const int32_t *keeps; /* PCB, for each task: whether it takes part, the ends of its clip, threshold and largest score */
    const float *low, *high, *cut, *top;
} tv_merge_plan;

static void sort_few(uint64_t *keys, int count) {
    for (int i = 1; i < count; i++) {
        uint64_t key = keys[i];
        int j = i;
        for (; j > 0 && keys[j - 1] > key; j--) keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* Sorts by the upper 32 bits, 8 at a time; `spare` has room for as many. */
static void sort_many(uint64_t *keys, int count, uint64_t *spare) {
    for (int shift = 32; shift < 64; shift += 8) {
        int places[257] = {0};
        for (int i = 0; i < count; i++) places[((keys[i] >> shift) & 0xff) + 1]++;
        for (int b = 0; b < 256; b++) places[b + 1] += places[b];
        for (int i = 0; i < count; i++) spare[places[(keys[i] >> shift) & 0xff]++] = keys[i];
        memcpy(keys, spare, (size_t)count * sizeof(uint64_t));
    }
}

/* The rank of each magnitude within a row, equal ones sharing their mean rank. Zeros, often most of a row in half
   precision, come first and need no sorting; buckets over the uppermost 8 powers of two hold few of the others each, and
   what lies below them has one. `keys` and `ordered` have room for `width`. */
static void tv_rank(const uint32_t *bits, int width, uint64_t *keys, uint64_t *ordered, float *ranks) {
    enum { LOG = 11, BUCKETS = (1 << LOG) + 1, SHIFT = 26 - LOG };
    int places[BUCKETS + 1] = {0}, biggest = 0, count = 0;
    uint32_t largest = 0;
    for (int i = 0; i < width; i++) {
        uint32_t size = bits[i] & 0x7fffffffu;
        largest = size > largest ? size : largest;
        keys[count] = (uint64_t)size << 32 | (uint32_t)i;
        count += size != 0;
    }
    const int zeros = width - count;
    const uint32_t floor = largest >= (1u << 26) ? largest - (1u << 26) + 1 : 0;
    for (int i = 0; i < width; i++) ranks[i] = (float)(zeros - 1) * 0.5f;
    if (count == 0) return;
#define BUCKET(key) ((uint32_t)((key) >> 32) > floor ? 1 + (((uint32_t)((key) >> 32) - floor) >> SHIFT) : 0)
    for (int i = 0; i < count; i++) places[BUCKET(keys[i]) + 1]++;
    for (int b = 0; b < BUCKETS; b++) biggest = places[b + 1] > biggest ? places[b + 1] : biggest;
    for (int b = 0; b < BUCKETS; b++) places[b + 1] += places[b];
    for (int i = 0; i < count; i++) ordered[places[BUCKET(keys[i])]++] = keys[i];
#undef BUCKET
    if (biggest > 48) {
        for (int b = 0, first = 0; b < BUCKETS; first = places[b++]) { /* places now hold where each bucket ends */
            int held = places[b] - first, sorted = 1; /* as equal ones are */
            if (held <= 48) continue;
            for (int i = first + 1; i < first + held; i++) sorted &= ordered[i - 1] <= ordered[i];
            if (!sorted) sort_many(ordered + first, held, keys);
        }
    }
    sort_few(ordered, count); /* no entry is far from its place */
    int32_t *firsts = (int32_t *)keys;
    for (int i = 1, first = firsts[0] = 0; i < count; i++) {
        first = ordered[i] >> 32 == ordered[i - 1] >> 32 ? first : i;
        firsts[i] = first;
    }
    for (int i = count - 1, last = i; i >= 0; i--) {
        ranks[(uint32_t)ordered[i]] = (float)(2 * zeros + firsts[i] + last) * 0.5f;
        last = i > 0 && ordered[i] >> 32 != ordered[i - 1] >> 32 ? i - 1 : last;
    }
}

#define AVX512 0
#define NAME(x) x##_avx2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")
#include "native_kernels.h"
#pragma GCC pop_options
#undef NAME
#undef AVX512

#define AVX512 1
#define NAME(x) x##_avx512
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#include "native_kernels.h"
#pragma GCC pop_options
#undef NAME
#undef AVX512

/* 0: not on this processor; 2: AVX2; 5: AVX-512. */
int tv_level(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? 5
               : 2;
}

#define CHOOSE(level, call) (level == 5 ? call##_avx512 : call##_avx2)

/* The stack in float32, [task, count] at `stride`, the base in float32, sums of squares [task, chunk].
   Returns 1 where the base holds a value that is not finite. */
int tv_load(int level, const tv_tile *tile, float *stack, int64_t stride, float *base, double *squares) {
    return CHOOSE(level, load)(tile, stack, stride, base, squares);
}

/* Counts against brackets [row, wanted]: below, at the low end, at the high end [row, wanted, 3]; what lies inside goes
   to `inside` [row, wanted, room] and its number to `held`. Returns 1 where the base is not finite. */
int tv_count(int level, const tv_tile *tile, const tv_values *what, int wanted, const float *low, const float *high,
             int64_t *counts, float *inside, int64_t room, int64_t *held, double *squares) {
    return CHOOSE(level, count)(tile, what, wanted, low, high, counts, inside, room, held, squares);
}

/* The values of which order statistics are taken, [row, count]. */
void tv_list(int level, const tv_tile *tile, const tv_values *what, float *out) {
    CHOOSE(level, list)(tile, what, out);
}

/* Inner products of the rows, the lower triangle of [chunk, task, task]; or the energies of what is selected,
   [chunk, task]. Returns 1 where the base is not finite. */
int tv_gram(int level, const tv_tile *tile, int what, float least, double *products, double *squares) {
    return CHOOSE(level, gram)(tile, what, least, products, squares);
}

/* Drops entries of rows of `width` by the ranks of their magnitudes; see tv_rank. `spare` has room for 3 rows of 8 bytes. */
void tv_rank_drop(int level, float *values, int64_t rows, int width, uint32_t position, uint32_t add, uint32_t multiply,
                  float slope, float least, int rescale, void *spare) {
    uint64_t *keys = spare;
    CHOOSE(level, rank_drop)(values, rows, width, position, add, multiply, slope, least, rescale, keys, keys + width,
                             (float *)(keys + 2 * (int64_t)width));
}

/* The merged values in the output's dtype. Returns 1: the base is not finite; 2: a result is not, in that dtype. */
int tv_merge(int level, const tv_tile *tile, const tv_merge_plan *plan, void *out, double *squares) {
    return CHOOSE(level, merge)(tile, plan, out, squares);
}

#else
int tv_level(void) { return 0; }
#endif
