/* The three passes of PCB as bare loops: read the tiles, compute what PCB computes of each entry, keep nothing else.
 *
 * Norms are found in the first pass, as there. No brackets, no digests, no checks, no engine: what `cpu.py --passes`
 * holds the engine's passes against. The compiler vectorises exp and tanh by itself (-Ofast: within 4 units in the last
 * place, the library's are within 2).
 *
 *     bare LIST PASS THREADS OUT|-
 *
 * LIST names files, tensors and the numbers of the tasks: files; for each tensor its elements, and for base and tasks the
 * file and the byte where it begins; then for each task the ends of its clip, its threshold and its largest score.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 33, SEGMENT = 1 << 22, PIECE = 1 << 17, BLOCK = 1024 };

static int files[1 << 12], file_count, sources, tensors, pass, out = -1;
static int64_t (*extents)[MOST], (*where)[MOST], *elements, *before, *places;
static float low[MOST], high[MOST], cut[MOST], top[MOST];
static atomic_llong next_segment, below;
static int64_t segments;
static float largest[MOST];

static void widen(const uint16_t *restrict raw, int count, float *restrict to) {
    uint32_t *restrict bits = (uint32_t *)to;
    for (int i = 0; i < count; i++) bits[i] = (uint32_t)raw[i] << 16;
}

static void piece(uint16_t *const *raw, int64_t from, int count, uint16_t *restrict to, int64_t *under, float *most,
                  double *norms) {
    float base[BLOCK], sum[BLOCK], total[BLOCK], share[BLOCK], row[MOST][BLOCK];
    const int tasks = sources - 1;
    widen(raw[0] + from, count, base);
    for (int t = 0; t < tasks; t++) {
        widen(raw[t + 1] + from, count, row[t]);
        for (int i = 0; i < count; i++) row[t][i] -= base[i];
    }
    if (pass == 1) {
        for (int t = 0; t < tasks; t++) {
            int few = 0;
            float found = most[t], l = low[t], h = high[t], norm = 0;
            for (int i = 0; i < count; i++) {
                float size = fabsf(row[t][i]);
                norm += size * size;
                few += (size < l) + (size < h);
                found = size > found ? size : found;
            }
            *under += few, most[t] = found, norms[t] += norm;
        }
        return;
    }
    for (int i = 0; i < count; i++) sum[i] = total[i] = share[i] = 0;
    for (int t = 0; t < tasks; t++)
        for (int i = 0; i < count; i++) sum[i] += row[t][i];
    for (int t = 0; t < tasks; t++) {
        const float l = low[t], h = high[t], unit = 1 / (h - l), c = cut[t], span = 1 / (top[t] - c), many = (float)tasks;
        float score[BLOCK], found = most[t];
        int few = 0;
        for (int i = 0; i < count; i++) {
            float size = fminf(fmaxf(fabsf(row[t][i]), l), h), u = (size - l) * unit;
            score[i] = expf(many * u * u) * tanhf(row[t][i] * sum[i]);
        }
        if (pass == 2) {
            for (int i = 0; i < count; i++) {
                few += score[i] < c;
                found = score[i] > found ? score[i] : found;
            }
            *under += few, most[t] = found;
            continue;
        }
        for (int i = 0; i < count; i++) {
            float own = (fmaxf(score[i], c) - c) * span, size = fminf(fmaxf(fabsf(row[t][i]), l), h);
            total[i] += copysignf(size, row[t][i]) * (row[t][i] != 0) * own;
            share[i] += own;
        }
    }
    for (int i = 0; pass == 3 && i < count; i++) {
        float merged = base[i] + total[i] / fmaxf(share[i], 1e-12f);
        uint32_t x;
        memcpy(&x, &merged, 4);
        to[i] = (uint16_t)((x + 0x7fffu + ((x >> 16) & 1)) >> 16);
    }
}

static void *work(void *unused) {
    uint16_t *raw[MOST], *to = malloc(2 * SEGMENT);
    float most[MOST] = {0};
    double norms[MOST] = {0};
    int64_t under = 0;
    (void)unused;
    for (int s = 0; s < sources; s++) raw[s] = malloc(2 * PIECE);
    for (int64_t at; (at = atomic_fetch_add(&next_segment, 1)) < segments;) {
        const int64_t tensor = places[2 * at], start = places[2 * at + 1];
        const int64_t stop = start + SEGMENT < elements[tensor] ? start + SEGMENT : elements[tensor];
        for (int64_t i = start; i < stop; i += PIECE) {
            int64_t count = stop - i < PIECE ? stop - i : PIECE;
            for (int s = 0; s < sources; s++)
                if (pread(files[where[tensor][s]], raw[s], 2 * count, extents[tensor][s] + 2 * i) != 2 * count) abort();
            for (int64_t j = 0; j < count; j += BLOCK) {
                const int many = (int)(count - j < BLOCK ? count - j : BLOCK);
                piece(raw, j, many, to + (i - start + j), &under, most, norms);
            }
        }
        if (out >= 0 && pwrite(out, to, 2 * (stop - start), 2 * (before[tensor] + start)) < 0) abort();
    }
    atomic_fetch_add(&below, under);
    for (int t = 0; t + 1 < sources; t++) largest[t] = most[t] + (float)norms[t]; /* one thread's: so that nothing is left out */
    return NULL;
}

int main(int count, char **given) {
    FILE *list = fopen(given[1], "r");
    char path[4096];
    int threads = atoi(given[3]);
    pthread_t thread[256];
    struct timespec a, b;
    pass = atoi(given[2]);
    if (count != 5 || !list || fscanf(list, "%d %d %d", &sources, &file_count, &tensors) != 3) return 2;
    for (int f = 0; f < file_count; f++) {
        if (fscanf(list, "%4095s", path) != 1) return 2;
        files[f] = open(path, O_RDONLY);
    }
    extents = calloc(tensors, sizeof *extents), where = calloc(tensors, sizeof *where);
    elements = calloc(tensors, 8), before = calloc(tensors + 1, 8);
    for (int t = 0; t < tensors; t++) {
        if (fscanf(list, "%ld", &elements[t]) != 1) return 2;
        for (int s = 0; s < sources; s++)
            if (fscanf(list, "%ld %ld", &where[t][s], &extents[t][s]) != 2) return 2;
        segments += (elements[t] + SEGMENT - 1) / SEGMENT;
        before[t + 1] = before[t] + elements[t];
    }
    for (int t = 0; t + 1 < sources; t++)
        if (fscanf(list, "%f %f %f %f", low + t, high + t, cut + t, top + t) != 4) return 2;
    places = calloc(segments, 16);
    for (int64_t t = 0, at = 0; t < tensors; t++)
        for (int64_t start = 0; start < elements[t]; start += SEGMENT) places[2 * at] = t, places[2 * at++ + 1] = start;
    if (pass == 3 && strcmp(given[4], "-")) out = open(given[4], O_WRONLY | O_CREAT | O_TRUNC, 0600);
    clock_gettime(CLOCK_MONOTONIC, &a);
    for (int t = 0; t < threads; t++) pthread_create(thread + t, NULL, work, NULL);
    for (int t = 0; t < threads; t++) pthread_join(thread[t], NULL);
    clock_gettime(CLOCK_MONOTONIC, &b);
    printf("%.6f %lld %g\n", (b.tv_sec - a.tv_sec) + 1e-9 * (b.tv_nsec - a.tv_nsec), (long long)below, largest[0]);
    return 0;
}
