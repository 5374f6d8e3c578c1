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
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define TV_VERSION 4 /* raised with every change of a struct or a signature; native.py holds the same number */

int tv_version(void) { return TV_VERSION; }

static int read_whole(int fd, char *into, int64_t size, int64_t offset, int *error) {
    for (int64_t done = 0; done < size;) {
        ssize_t got = pread(fd, into + done, (size_t)(size - done), offset + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            *error = got < 0 ? errno : 0;
            return 0;
        }
        done += got;
    }
    return 1;
}

/* Whether a piece was in the page cache, and is read; if not, the system is asked to bring it there meanwhile. */
static int read_at_hand(int fd, char *into, int64_t size, int64_t offset) {
#if defined(RWF_NOWAIT) && defined(POSIX_FADV_WILLNEED)
    struct iovec place = {into, (size_t)size};
    if (preadv2(fd, &place, 1, offset, RWF_NOWAIT) == size) return 1;
    posix_fadvise(fd, offset, size, POSIX_FADV_WILLNEED);
#endif
    return 0;
}

/* Positioned reads of several pieces. Those that must come from the disk come together: it serves many requests at once,
   and one after the other they cost its whole latency each. Returns -1, or the index of the piece that failed (errno in
   *error; 0: too short). */
int tv_read(int count, const int *fds, const int64_t *offsets, const int64_t *sizes, void **into, int *error) {
    enum { TOGETHER = 256 };
    int late[TOGETHER];
    for (int i = 0; i < count;) {
        int waiting = 0;
        for (; i < count && waiting < TOGETHER; i++)
            if (!read_at_hand(fds[i], into[i], sizes[i], offsets[i])) late[waiting++] = i;
        for (int j = 0; j < waiting; j++)
            if (!read_whole(fds[late[j]], into[late[j]], sizes[late[j]], offsets[late[j]], error)) return late[j];
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

/* Files that are read while a tile is worked on, `piece` elements at a time, to where its rows and its base lie. */
typedef struct {
    int64_t count, piece;
    const int32_t *files;
    const int64_t *offsets, *sizes; /* of the tile's first element; of one element */
    void *const *into;
} tv_files;

/* One tile, as it is stored. A row without memory is zero. */
typedef struct {
    int32_t tasks;
    int32_t base_kind;
    int64_t count;
    int64_t chunks; /* of all its pieces: the row length of sums over chunks */
    const tv_files *files; /* NULL: all of it lies in memory */
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

/* Tasks whose entries are dropped by their ranks, in rows of `width`, before everything else; `keys` are those of the draws. */
typedef struct {
    int32_t width;
    const int32_t *there, *rescale;
    const uint32_t *add, *multiply;
    const float *slope, *least;
    float *stack; /* room for the rows of one piece */
    uint32_t *spare; /* room for 6 rows of `width` and 96 more */
} tv_ranked;

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
    const tv_ranked *ranked; /* NULL: none */
} tv_merge_plan;

/* Of the ranks of a row: buckets, and how many are compared one with another. */
enum { LOG = 11, MOST_BUCKETS = (1 << LOG) + (1 << (LOG - 2)) + 2, FEW = 64 };

/* Sorts 8 bits at a time; `spare` has room for as many. */
static void sort_sizes(uint32_t *sizes, int count, uint32_t *spare) {
    for (int shift = 0; shift < 32; shift += 8) {
        int places[257] = {0};
        for (int i = 0; i < count; i++) places[((sizes[i] >> shift) & 0xff) + 1]++;
        for (int b = 0; b < 256; b++) places[b + 1] += places[b];
        for (int i = 0; i < count; i++) spare[places[(sizes[i] >> shift) & 0xff]++] = sizes[i];
        memcpy(sizes, spare, (size_t)count * sizeof(uint32_t));
    }
}

/* How many of a sorted list are below `size` (or, with `also`, equal to it). */
static int below_in(const uint32_t *sorted, int count, uint32_t size, int also) {
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (sorted[middle] < size || (also && sorted[middle] == size)) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* AVX2: for each choice of 8 lanes, one byte for each lane: where it comes from so that the chosen lie side by side. */
static uint64_t gathering[256];

static void make_tables(void) {
    for (int there = 0; there < 256; there++) {
        gathering[there] = 0;
        for (int lane = 0, kept = 0; lane < 8; lane++)
            if (there >> lane & 1) gathering[there] |= (uint64_t)lane << 8 * kept++;
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
    make_tables();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? 5
               : 2;
}

#define CHOOSE(level, call) (level == 5 ? call##_avx512 : call##_avx2)

enum { NOT_FINITE = 1, OVERFLOWN = 2, UNREAD = 4 }; /* what can be wrong: the base, a result, a file */

/* A piece of a tile, and how many elements and chunks come before it. */
typedef struct {
    tv_tile tile;
    int64_t at, chunk;
} tv_piece;

static tv_piece before_first(const tv_tile *whole) {
    tv_piece piece = {*whole, 0, 0};
    piece.tile.count = 0;
    return piece;
}

/* The next piece, read where it lies in files; the whole tile where it lies in memory. Returns whether there is one. */
static int next_piece(const tv_tile *whole, tv_piece *piece, int *bad) {
    const tv_files *from = whole->files;
    piece->at += piece->tile.count;
    piece->chunk += (piece->tile.count + CHUNK - 1) / CHUNK;
    const int64_t left = whole->count - piece->at, count = from && from->piece < left ? from->piece : left;
    if (left <= 0) return 0;
    piece->tile.count = count;
    for (int64_t i = 0; from && i < from->count; i++) {
        const int64_t size = from->sizes[i];
        int error;
        if (!read_whole(from->files[i], from->into[i], count * size, from->offsets[i] + piece->at * size, &error)) {
            *bad |= UNREAD;
            return 0;
        }
    }
    return 1;
}

/* The stack in float32, [task, count] at `stride`, the base in float32, sums of squares [task, chunk].
   Returns what is wrong. */
int tv_load(int level, const tv_tile *tile, float *stack, int64_t stride, float *base, double *squares) {
    tv_piece piece = before_first(tile);
    int bad = 0;
    while (next_piece(tile, &piece, &bad))
        bad |= CHOOSE(level, load)(&piece.tile, stack + piece.at, stride, base ? base + piece.at : base,
                                   squares ? squares + piece.chunk : squares);
    return bad;
}

/* Counts against brackets [row, wanted]: below, at the low end, at the high end [row, wanted, 3]; what lies inside goes
   to `inside` [row, wanted, room] and its number to `held`, which is more than `room` less a vector where it found no room.
   Returns what is wrong. */
int tv_count(int level, const tv_tile *tile, const tv_values *what, int wanted, const float *low, const float *high,
             int64_t *counts, float *inside, int64_t room, int64_t *held, double *squares) {
    tv_piece piece = before_first(tile);
    int bad = 0;
    while (next_piece(tile, &piece, &bad))
        bad |= CHOOSE(level, count)(&piece.tile, piece.at, what, wanted, low, high, counts, inside, room, held,
                                    squares ? squares + piece.chunk : squares);
    return bad;
}

/* The values of which order statistics are taken, [row, count], of a tile in memory. */
void tv_list(int level, const tv_tile *tile, const tv_values *what, float *out) {
    CHOOSE(level, list)(tile, what, out);
}

/* Inner products of the rows, the lower triangle of [chunk, task, task]; or the energies of what is selected,
   [chunk, task]. Returns what is wrong. */
int tv_gram(int level, const tv_tile *tile, int what, float least, double *products, double *squares) {
    const int64_t each = what == ENERGIES ? tile->tasks : (int64_t)tile->tasks * tile->tasks;
    tv_piece piece = before_first(tile);
    int bad = 0;
    while (next_piece(tile, &piece, &bad))
        bad |= CHOOSE(level, gram)(&piece.tile, what, least, products + piece.chunk * each,
                                   squares ? squares + piece.chunk : squares);
    return bad;
}

/* The merged values in the output's dtype. Returns what is wrong. */
int tv_merge(int level, const tv_tile *tile, const tv_merge_plan *plan, void *out, double *squares) {
    const tv_ranked *ranked = plan->ranked;
    const int64_t size = plan->out_kind == FLOAT32 ? 4 : 2;
    const void *rows[MOST_TASKS];
    int32_t plain[MOST_TASKS] = {0}; /* FLOAT32, AS_IS */
    tv_piece piece = before_first(tile);
    tv_merge_plan here = *plan;
    int bad = 0;
    while (next_piece(tile, &piece, &bad)) {
        double *sums = squares ? squares + piece.chunk : squares;
        tv_tile given = piece.tile;
        here.position = plan->position + (uint32_t)piece.at;
        if (ranked) {
            int wrong = CHOOSE(level, load)(&given, ranked->stack, given.count, 0, sums);
            bad |= sums ? wrong : 0;
            sums = 0;
            for (int task = 0; task < given.tasks; task++) {
                float *row = ranked->stack + task * given.count;
                rows[task] = row;
                if (ranked->there[task])
                    CHOOSE(level, rank_drop)(row, given.count / ranked->width, ranked->width, here.position,
                                             ranked->add[task], ranked->multiply[task], ranked->slope[task],
                                             ranked->least[task], ranked->rescale[task], ranked->spare);
            }
            given.rows = rows, given.kinds = plain, given.relations = plain;
        }
        bad |= CHOOSE(level, merge)(&given, &here, (char *)out + piece.at * size, sums);
    }
    return bad;
}

#else
int tv_level(void) { return 0; }
#endif
