/* The kernels of native.c, included once for each instruction set: NAME(x) gives a function its suffix.
 *
 * V(x) is the intrinsic x of single precision at this width, LANES its width, `lanes` which of them (one bit each).
 */

#if AVX512
#define LANES 16
#define V(x) _mm512_##x##_ps
typedef __m512 NAME(vector);
typedef __mmask16 NAME(lanes);
#define COMPARED(a, b, how) _mm512_cmp_ps_mask(a, b, how)
/* The chosen lanes side by side. */
#define GATHERED(x, there) _mm512_maskz_compress_ps(there, x)
#define POWER_OF_BITS(x) _mm512_castsi512_ps(_mm512_cvttps_epi32(x))
#define HALVES(from) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(from)))
#define WIDENED(from) _mm512_castsi512_ps(_mm512_slli_epi32(HALVES(from), 16))
#define COUNTING _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define STEPPED(at) _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(at), _mm512_set1_epi32(LANES)))
#define AS_FLOATS(x) _mm512_castsi512_ps(x)
#define SIZE(x) _mm512_abs_ps(x)
typedef __m512i NAME(tally);
#define NO_TALLY _mm512_setzero_si512()
#define TALLIED(sum, a, b, how) _mm512_mask_add_epi32(sum, COMPARED(a, b, how), sum, _mm512_set1_epi32(1))
#else
#define LANES 8
#define V(x) _mm256_##x##_ps
typedef __m256 NAME(vector);
typedef unsigned NAME(lanes);
#define COMPARED(a, b, how) ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, how)))
#define GATHERED(x, there) _mm256_permutevar8x32_ps(x, NAME(places)(gathering[there]))
#define POWER_OF_BITS(x) _mm256_castsi256_ps(_mm256_cvttps_epi32(x))
#define HALVES(from) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from)))
#define WIDENED(from) _mm256_castsi256_ps(_mm256_slli_epi32(HALVES(from), 16))
#define COUNTING _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)
#define STEPPED(at) _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(at), _mm256_set1_epi32(LANES)))
#define AS_FLOATS(x) _mm256_castsi256_ps(x)
#define SIZE(x) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x)
typedef __m256i NAME(tally);
#define NO_TALLY _mm256_setzero_si256()
#define TALLIED(sum, a, b, how) _mm256_sub_epi32(sum, _mm256_castps_si256(_mm256_cmp_ps(a, b, how)))

static inline __m256i NAME(places)(uint64_t bytes) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes)); }
#endif

/* Lanes of a vector that begins `left` elements before the end. */
static inline NAME(lanes) NAME(lanes_of)(int left) {
    return (NAME(lanes))(left < LANES ? (1u << left) - 1 : (1u << LANES) - 1);
}

static inline void NAME(widen)(const void *from, int kind, int64_t at, int count, float *restrict to) {
    if (kind == FLOAT32) {
        memcpy(to, (const float *)from + at, (size_t)count * sizeof(float));
    } else if (kind == BFLOAT16) {
        const uint16_t *restrict raw = (const uint16_t *)from + at;
        uint32_t *restrict bits = (uint32_t *)to;
        for (int i = 0; i < count; i++) bits[i] = (uint32_t)raw[i] << 16;
    } else {
        const uint16_t *raw = (const uint16_t *)from + at;
        int i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(raw + i))));
        for (; i < count; i++) to[i] = _cvtsh_ss(raw[i]);
    }
}

/* Whether every number is finite in its stored dtype. */
static inline int NAME(all_finite)(const float *values, int count) {
    const uint32_t *bits = (const uint32_t *)values;
    uint32_t largest = 0;
    for (int i = 0; i < count; i++) {
        uint32_t size = bits[i] & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    return largest < 0x7f800000u;
}

/* Sum of four vectors of sums. */
static inline double NAME(added)(NAME(vector) one, NAME(vector) two, NAME(vector) three, NAME(vector) four) {
    float lanes[LANES];
    double total = 0;
    V(storeu)(lanes, V(add)(V(add)(one, two), V(add)(three, four)));
    for (int j = 0; j < LANES; j++) total += lanes[j];
    return total;
}

/* Whether single precision held the sum of squares. */
static inline int NAME(held)(double total) { return total > 1e-20 && total < 1e30; }

/* Sum of squares: single precision over few elements a lane, double beyond and where single would not hold it. */
static inline double NAME(squares)(const float *restrict values, int count) {
    int i = 0;
    NAME(vector) one = V(setzero)(), two = one, three = one, four = one;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        NAME(vector) a = V(loadu)(values + i), b = V(loadu)(values + i + LANES);
        NAME(vector) c = V(loadu)(values + i + 2 * LANES), d = V(loadu)(values + i + 3 * LANES);
        one = V(fmadd)(a, a, one), two = V(fmadd)(b, b, two);
        three = V(fmadd)(c, c, three), four = V(fmadd)(d, d, four);
    }
    double total = NAME(added)(one, two, three, four);
    for (; i < count; i++) total += (double)values[i] * values[i];
    if (NAME(held)(total)) return total;
    double wide[8] = {0};
    for (i = 0; i + 8 <= count; i += 8)
        for (int j = 0; j < 8; j++) wide[j] += (double)values[i + j] * values[i + j];
    total = 0;
    for (int j = 0; j < 8; j++) total += wide[j];
    for (; i < count; i++) total += (double)values[i] * values[i];
    return total;
}

/* One block of one row as a delta (or a weight). */
static inline void NAME(row)(const tv_tile *tile, int task, int64_t at, int count, const float *restrict base,
                             float *restrict to) {
    if (tile->rows[task] == 0) {
        memset(to, 0, (size_t)count * sizeof(float));
        return;
    }
    if (tile->kinds[task] == BFLOAT16 && tile->relations[task] == LESS_BASE && count % LANES == 0) {
        const uint16_t *raw = (const uint16_t *)tile->rows[task] + at;
        for (int i = 0; i < count; i += LANES) V(storeu)(to + i, V(sub)(WIDENED(raw + i), V(loadu)(base + i)));
        return;
    }
    NAME(widen)(tile->rows[task], tile->kinds[task], at, count, to);
    if (tile->relations[task] == LESS_BASE)
        for (int i = 0; i < count; i++) to[i] = to[i] - base[i];
    else if (tile->relations[task] == PLUS_BASE)
        for (int i = 0; i < count; i++) to[i] = to[i] + base[i];
}

/* The magnitudes of one block of one row; returns the sum of their squares, if asked. */
static inline double NAME(sizes)(const tv_tile *tile, int task, int64_t at, int count, const float *restrict base,
                                 float *restrict to, int summed) {
    if (tile->kinds[task] == BFLOAT16 && tile->relations[task] == LESS_BASE && tile->rows[task] &&
        count % (4 * LANES) == 0) {
        const uint16_t *raw = (const uint16_t *)tile->rows[task] + at;
        NAME(vector) sums[4] = {V(setzero)(), V(setzero)(), V(setzero)(), V(setzero)()};
        for (int i = 0; i < count; i += 4 * LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const int k = i + j * LANES;
                NAME(vector) x = V(sub)(WIDENED(raw + k), V(loadu)(base + k));
                sums[j] = V(fmadd)(x, x, sums[j]);
                V(storeu)(to + k, SIZE(x));
            }
        double total = NAME(added)(sums[0], sums[1], sums[2], sums[3]);
        return !summed || NAME(held)(total) ? total : NAME(squares)(to, count);
    }
    NAME(row)(tile, task, at, count, base, to);
    double total = summed ? NAME(squares)(to, count) : 0;
    uint32_t *bits = (uint32_t *)to;
    for (int i = 0; i < count; i++) bits[i] &= 0x7fffffffu;
    return total;
}

static int NAME(load)(const tv_tile *tile, float *stack, int64_t stride, float *base, double *squares) {
    float own[BLOCK];
    int bad = 0;
    for (int64_t at = 0; at < tile->count; at += BLOCK) {
        int count = (int)(tile->count - at < BLOCK ? tile->count - at : BLOCK);
        float *wide = base ? base + at : own;
        if (tile->base) {
            NAME(widen)(tile->base, tile->base_kind, at, count, wide);
            bad |= !NAME(all_finite)(wide, count);
        }
        for (int task = 0; task < tile->tasks; task++) {
            float *to = stack + task * stride + at;
            NAME(row)(tile, task, at, count, wide, to);
            if (squares) squares[task * tile->chunks + at / CHUNK] += NAME(squares)(to, count);
        }
    }
    return bad;
}

/* What of one vector lies in a bracket, both ends included. What finds no room is only counted. */
__attribute__((always_inline)) static inline int64_t NAME(count_in)(NAME(vector) x, NAME(lanes) in, NAME(vector) low,
                                                                    NAME(vector) high, int64_t *counts, float *inside,
                                                                    int64_t room, int64_t kept) {
    NAME(lanes) at_low = in & COMPARED(x, low, _CMP_EQ_OQ), at_high = in & COMPARED(x, high, _CMP_EQ_OQ);
    counts[1] += __builtin_popcount(at_low);
    counts[2] += __builtin_popcount(at_high);
    in &= (NAME(lanes))~(at_low | at_high);
    if (kept + LANES <= room) V(storeu)(inside + kept, GATHERED(x, in));
    return kept + __builtin_popcount(in);
}

/* Values against one bracket; up to a vector beyond `count` is read. `seen` values were counted before. */
static inline void NAME(count_one)(const float *restrict values, int count, int64_t seen, float low, float high,
                                   int64_t *counts, float *inside, int64_t room, int64_t *held) {
    const NAME(vector) l = V(set1)(low), h = V(set1)(high);
    const int rare = 512 * (seen - counts[0]) <= seen; /* hardly any of 4 vectors reached it so far */
    int64_t reached = 0, equal = 0, kept = *held, ends[3] = {0};
    int i = 0;
    if (low == high) { /* nothing lies inside */
        NAME(tally) from = NO_TALLY, there = NO_TALLY;
        for (; i + LANES <= count; i += LANES) {
            NAME(vector) x = V(loadu)(values + i);
            from = TALLIED(from, x, l, _CMP_GE_OQ), there = TALLIED(there, x, l, _CMP_EQ_OQ);
        }
        int32_t lanes[2][LANES];
        memcpy(lanes[0], &from, sizeof from), memcpy(lanes[1], &there, sizeof there);
        for (int j = 0; j < LANES; j++) reached += lanes[0][j], equal += lanes[1][j];
        for (; i < count; i++) reached += values[i] >= low, equal += values[i] == low;
        counts[0] += count - reached, counts[1] += equal, counts[2] += equal;
        return;
    }
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        NAME(vector) a = V(loadu)(values + i), b = V(loadu)(values + i + LANES);
        NAME(vector) c = V(loadu)(values + i + 2 * LANES), d = V(loadu)(values + i + 3 * LANES);
        if (rare && !COMPARED(V(max)(V(max)(a, b), V(max)(c, d)), l, _CMP_GE_OQ)) continue;
        NAME(lanes) in_a = COMPARED(a, l, _CMP_GE_OQ), in_b = COMPARED(b, l, _CMP_GE_OQ);
        NAME(lanes) in_c = COMPARED(c, l, _CMP_GE_OQ), in_d = COMPARED(d, l, _CMP_GE_OQ);
        reached += __builtin_popcount(in_a) + __builtin_popcount(in_b);
        reached += __builtin_popcount(in_c) + __builtin_popcount(in_d);
        in_a &= COMPARED(a, h, _CMP_LE_OQ), in_b &= COMPARED(b, h, _CMP_LE_OQ);
        in_c &= COMPARED(c, h, _CMP_LE_OQ), in_d &= COMPARED(d, h, _CMP_LE_OQ);
        if (!(in_a | in_b | in_c | in_d)) continue;
        kept = NAME(count_in)(a, in_a, l, h, ends, inside, room, kept);
        kept = NAME(count_in)(b, in_b, l, h, ends, inside, room, kept);
        kept = NAME(count_in)(c, in_c, l, h, ends, inside, room, kept);
        kept = NAME(count_in)(d, in_d, l, h, ends, inside, room, kept);
    }
    for (; i < count; i += LANES) {
        NAME(vector) x = V(loadu)(values + i);
        NAME(lanes) in = NAME(lanes_of)(count - i) & COMPARED(x, l, _CMP_GE_OQ);
        reached += __builtin_popcount(in);
        in &= COMPARED(x, h, _CMP_LE_OQ);
        if (in) kept = NAME(count_in)(x, in, l, h, ends, inside, room, kept);
    }
    counts[0] += count - reached, counts[1] += ends[1], counts[2] += ends[2];
    *held = kept;
}

/* e^x for 0 <= x < 88: Cody and Waite's reduction and a polynomial, within 1 unit in the last place. */
static inline float NAME(exponential)(float x) {
    float k = x * 1.44269504088896341f + 12582912.0f; /* rounds to the nearest integer */
    int32_t bits;
    memcpy(&bits, &k, 4);
    k -= 12582912.0f;
    float r = __builtin_fmaf(k, -0.693145751953125f, x);
    r = __builtin_fmaf(k, -1.42860682030941723212e-6f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    float y = __builtin_fmaf(p, r * r, r) + 1.0f;
    int32_t scale = (int32_t)((uint32_t)bits << 23) + 0x3f800000;
    float power;
    memcpy(&power, &scale, 4);
    return y * power;
}

/* tanh x: an odd polynomial near 0, 1 - 2 / (e^2|x| + 1) elsewhere, within 2 units in the last place. */
static inline float NAME(tangent)(float x) {
    float size = __builtin_fabsf(x);
    float large = size < 9.1f ? size : 9.1f;
    float far = 1.0f - 2.0f / (NAME(exponential)(2.0f * large) + 1.0f);
    float z = x * x;
    float p = -5.70498872745e-3f;
    p = __builtin_fmaf(p, z, 2.06390887954e-2f);
    p = __builtin_fmaf(p, z, -5.37397155531e-2f);
    p = __builtin_fmaf(p, z, 1.33314422036e-1f);
    p = __builtin_fmaf(p, z, -3.33332819422e-1f);
    float near = __builtin_fmaf(p * z, x, x);
    float signed_far = x < 0 ? -far : far;
    return size < 0.625f ? near : signed_far;
}

/* PCB's scores of one task: how large an entry is within its task, times how the tasks agree on it. */
static inline void NAME(pcb_score)(const float *restrict values, const float *restrict total, int count, int tasks,
                                   float low, float high, float *restrict score) {
    const float span = high - low, many = (float)tasks;
    if (span == 0) {
        for (int i = 0; i < count; i++) score[i] = NAME(tangent)(values[i] * total[i]);
        return;
    }
    for (int i = 0; i < count; i++) {
        float size = __builtin_fabsf(values[i]);
        size = size < low ? low : size;
        size = size > high ? high : size;
        float u = (size - low) / span;
        score[i] = NAME(exponential)(many * (u * u)) * NAME(tangent)(values[i] * total[i]);
    }
}

/* Whether few scores reach `least`, and `promising` can tell: nothing of what it computes may overflow or round to zero. */
static inline int NAME(selective)(int tasks, float low, float high, float least) {
    const float span = high - low, largest = high / span;
    return least >= 1e-30f && (span == 0 || (span >= 1e-15f && (float)tasks * largest * largest < 80.0f));
}

/* Where entries lie whose score may reach `least`; returns how many. Of the others it is certain: their score is at most
   x S 2^v, v = n log2(e) (|x| / span)^2, and 2^v at most 2^floor(v) (1 + v - floor(v)), which is what v makes of a float
   as its exponent and the bits behind it; a thousandth is left for the rounding of all of it. */
static inline int NAME(promising)(const float *restrict values, const float *restrict sum, int count, int tasks,
                                  float low, float high, float least, uint32_t *restrict where) {
    const float span = high - low;
    const NAME(vector) most = V(set1)(high * high), reached = V(set1)(least * 0.999f);
    const NAME(vector) slope = V(set1)(span == 0 ? 0 : (float)tasks * 1.44269504f * 8388608.0f / (span * span));
    const NAME(vector) one = V(set1)(127.0f * 8388608.0f);
    NAME(vector) at = AS_FLOATS(COUNTING);
    int kept = 0;
    for (int i = 0; i < count; i += LANES) {
        NAME(vector) x = V(loadu)(values + i), t = V(mul)(x, V(loadu)(sum + i));
        NAME(vector) power = POWER_OF_BITS(V(fmadd)(V(min)(V(mul)(x, x), most), slope, one));
        NAME(lanes) there = COMPARED(V(mul)(t, power), reached, _CMP_GE_OQ);
        if (count - i < LANES) there &= NAME(lanes_of)(count - i);
        V(storeu)((float *)where + kept, GATHERED(at, there));
        kept += __builtin_popcount(there);
        at = STEPPED(at);
    }
    return kept;
}

/* Entries side by side, filled up to whole vectors with zeros; returns how many with these. */
static inline int NAME(picked)(const float *restrict values, const uint32_t *restrict where, int kept, float *restrict to) {
    const int whole = (kept + LANES - 1) / LANES * LANES;
    for (int i = 0; i < kept; i++) to[i] = values[where[i]];
    for (int i = kept; i < whole; i++) to[i] = 0;
    return whole;
}

/* The sum over the tasks of each entry, one after the other. */
static inline void NAME(sum)(float (*rows)[BLOCK], int tasks, int count, float *restrict sum) {
    memcpy(sum, rows[0], (size_t)count * sizeof(float));
    for (int task = 1; task < tasks; task++)
        for (int i = 0; i < count; i++) sum[i] += rows[task][i];
}

/* The variance over the tasks of each entry. */
static inline void NAME(variance)(float (*rows)[BLOCK], int tasks, int count, float *restrict mean,
                                  float *restrict result) {
    const float many = (float)tasks;
    NAME(sum)(rows, tasks, count, mean);
    for (int i = 0; i < count; i++) {
        mean[i] /= many;
        result[i] = 0;
    }
    for (int task = 0; task < tasks; task++)
        for (int i = 0; i < count; i++) {
            float off = rows[task][i] - mean[i];
            result[i] += off * off;
        }
    for (int i = 0; i < count; i++) result[i] /= many;
}

/* All rows of one block, and their squares; with `sizes` their magnitudes. */
static inline int NAME(block)(const tv_tile *tile, int64_t at, int count, float *base, float (*rows)[BLOCK],
                              double *squares, int sizes) {
    int bad = 0;
    if (tile->base) {
        NAME(widen)(tile->base, tile->base_kind, at, count, base);
        if (squares) bad = !NAME(all_finite)(base, count);
    }
    for (int task = 0; task < tile->tasks; task++) {
        double sum = 0;
        if (sizes) {
            sum = NAME(sizes)(tile, task, at, count, base, rows[task], squares != 0);
        } else {
            NAME(row)(tile, task, at, count, base, rows[task]);
            if (squares) sum = NAME(squares)(rows[task], count);
        }
        if (squares) squares[task * tile->chunks + at / CHUNK] += sum;
    }
    return bad;
}

/* What order statistics are taken of, for one block; in place where each row gives one. Returns how many rows there are.
   Magnitudes are what `block` makes of the rows. */
static inline int NAME(values)(const tv_values *what, int tasks, int count, float (*rows)[BLOCK], float *total) {
    float score[BLOCK];
    if (what->what == PCB_SCORE) {
        NAME(sum)(rows, tasks, count, total);
        for (int task = 0; task < tasks; task++) {
            NAME(pcb_score)(rows[task], total, count, tasks, what->low[task], what->high[task], score);
            memcpy(rows[task], score, (size_t)count * sizeof(float));
        }
    } else if (what->what == VARIANCE) {
        NAME(variance)(rows, tasks, count, total, score);
        memcpy(rows[0], score, (size_t)count * sizeof(float));
        return 1;
    }
    return tasks;
}

/* PCB's scores against brackets: those of entries that certainly lie below all of them are only counted. */
static inline void NAME(count_scores)(const tv_values *what, int tasks, int wanted, int count, int64_t seen,
                                      float (*rows)[BLOCK], float *sum, const float *low, const float *high,
                                      int64_t *counts, float *inside, int64_t room, int64_t *held) {
    float value[BLOCK], total[BLOCK], score[BLOCK];
    uint32_t where[BLOCK + LANES];
    NAME(sum)(rows, tasks, count, sum);
    for (int task = 0; task < tasks; task++) {
        const float l = what->low[task], h = what->high[task];
        float least = low[task * wanted];
        for (int k = 1; k < wanted; k++) least = low[task * wanted + k] < least ? low[task * wanted + k] : least;
        int kept = count;
        if (NAME(selective)(tasks, l, h, least)) {
            kept = NAME(promising)(rows[task], sum, count, tasks, l, h, least, where);
            int whole = NAME(picked)(rows[task], where, kept, value);
            NAME(picked)(sum, where, kept, total);
            NAME(pcb_score)(value, total, whole, tasks, l, h, score);
        } else {
            NAME(pcb_score)(rows[task], sum, count, tasks, l, h, score);
        }
        for (int k = 0; k < wanted; k++) {
            int64_t place = (int64_t)task * wanted + k;
            counts[3 * place] += count - kept;
            NAME(count_one)(score, kept, seen + count - kept, low[place], high[place], counts + 3 * place,
                            inside + place * room, room, held + place);
        }
    }
}

static int NAME(count)(const tv_tile *tile, int64_t seen, const tv_values *what, int wanted, const float *low,
                       const float *high, int64_t *counts, float *inside, int64_t room, int64_t *held, double *squares) {
    float base[BLOCK], total[BLOCK], rows[MOST_TASKS][BLOCK]; /* only those of this merge's tasks are touched */
    int bad = 0;
    for (int64_t at = 0; at < tile->count; at += BLOCK) {
        int count = (int)(tile->count - at < BLOCK ? tile->count - at : BLOCK);
        bad |= NAME(block)(tile, at, count, base, rows, squares, what->what == MAGNITUDE);
        if (what->what == PCB_SCORE) {
            NAME(count_scores)(what, tile->tasks, wanted, count, seen + at, rows, total, low, high, counts, inside, room,
                               held);
            continue;
        }
        int kept = NAME(values)(what, tile->tasks, count, rows, total);
        for (int row = 0; row < kept; row++)
            for (int k = 0; k < wanted; k++) {
                int64_t place = (int64_t)row * wanted + k;
                NAME(count_one)(rows[row], count, seen + at, low[place], high[place], counts + 3 * place,
                                inside + place * room, room, held + place);
            }
    }
    return bad;
}

static void NAME(list)(const tv_tile *tile, const tv_values *what, float *out) {
    float base[BLOCK], total[BLOCK], rows[MOST_TASKS][BLOCK];
    for (int64_t at = 0; at < tile->count; at += BLOCK) {
        int count = (int)(tile->count - at < BLOCK ? tile->count - at : BLOCK);
        NAME(block)(tile, at, count, base, rows, 0, what->what == MAGNITUDE);
        int kept = NAME(values)(what, tile->tasks, count, rows, total);
        for (int row = 0; row < kept; row++)
            memcpy(out + row * tile->count + at, rows[row], (size_t)count * sizeof(float));
    }
}

/* Entries whose variance is below `least` are taken out of all rows. */
static inline void NAME(select)(float (*rows)[BLOCK], int tasks, int count, float least, float *mean, float *kept) {
    NAME(variance)(rows, tasks, count, mean, kept);
    for (int i = 0; i < count; i++) kept[i] = kept[i] >= least ? 1.0f : 0.0f;
    for (int task = 0; task < tasks; task++)
        for (int i = 0; i < count; i++) rows[task][i] *= kept[i];
}

static inline double NAME(dot)(const float *restrict a, const float *restrict b, int count) {
    double lane[16] = {0}, total = 0;
    int i = 0;
#if AVX512
    __m512d one = _mm512_setzero_pd(), two = one;
    for (; i + 16 <= count; i += 16) {
        one = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(a + i)), _mm512_cvtps_pd(_mm256_loadu_ps(b + i)), one);
        two = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(a + i + 8)),
                              _mm512_cvtps_pd(_mm256_loadu_ps(b + i + 8)), two);
    }
    _mm512_storeu_pd(lane, one), _mm512_storeu_pd(lane + 8, two);
#else
    __m256d one = _mm256_setzero_pd(), two = one, three = one, four = one;
    for (; i + 16 <= count; i += 16) {
        one = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i)), _mm256_cvtps_pd(_mm_loadu_ps(b + i)), one);
        two = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i + 4)), _mm256_cvtps_pd(_mm_loadu_ps(b + i + 4)), two);
        three = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i + 8)), _mm256_cvtps_pd(_mm_loadu_ps(b + i + 8)), three);
        four = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm_loadu_ps(a + i + 12)), _mm256_cvtps_pd(_mm_loadu_ps(b + i + 12)), four);
    }
    _mm256_storeu_pd(lane, one), _mm256_storeu_pd(lane + 4, two);
    _mm256_storeu_pd(lane + 8, three), _mm256_storeu_pd(lane + 12, four);
#endif
    for (int j = 0; j < 16; j++) total += lane[j];
    for (; i < count; i++) total += (double)a[i] * b[i];
    return total;
}

#if AVX512
/* The same sums for all pairs of a few rows at once, each row widened once: the registers hold no more than 4 rows' pairs. */
__attribute__((always_inline)) static inline void NAME(dots_of)(float (*rows)[BLOCK], const int tasks, int count,
                                                                double *to) {
    __m512d sums[10][2];
    double lane[16];
    int i = 0;
#pragma GCC unroll 10
    for (int p = 0; p < tasks * (tasks + 1) / 2; p++) sums[p][0] = sums[p][1] = _mm512_setzero_pd();
    for (; i + 16 <= count; i += 16) {
        __m512d wide[4][2];
#pragma GCC unroll 4
        for (int a = 0; a < tasks; a++) {
            wide[a][0] = _mm512_cvtps_pd(_mm256_loadu_ps(rows[a] + i));
            wide[a][1] = _mm512_cvtps_pd(_mm256_loadu_ps(rows[a] + i + 8));
        }
#pragma GCC unroll 4
        for (int a = 0; a < tasks; a++)
#pragma GCC unroll 4
            for (int b = 0; b <= a; b++) {
                const int p = a * (a + 1) / 2 + b;
                sums[p][0] = _mm512_fmadd_pd(wide[a][0], wide[b][0], sums[p][0]);
                sums[p][1] = _mm512_fmadd_pd(wide[a][1], wide[b][1], sums[p][1]);
            }
    }
#pragma GCC unroll 4
    for (int a = 0; a < tasks; a++)
#pragma GCC unroll 4
        for (int b = 0; b <= a; b++) {
            const int p = a * (a + 1) / 2 + b;
            double total = 0;
            _mm512_storeu_pd(lane, sums[p][0]), _mm512_storeu_pd(lane + 8, sums[p][1]);
            for (int j = 0; j < 16; j++) total += lane[j];
            for (int j = i; j < count; j++) total += (double)rows[a][j] * rows[b][j];
            to[a * tasks + b] += total;
        }
}
#endif

/* The lower triangle of the rows' inner products, [task, task], added to `to`. */
static inline void NAME(dots)(float (*rows)[BLOCK], int tasks, int count, double *to) {
#if AVX512
    if (tasks == 2) {
        NAME(dots_of)(rows, 2, count, to);
        return;
    }
    if (tasks == 3) {
        NAME(dots_of)(rows, 3, count, to);
        return;
    }
    if (tasks == 4) {
        NAME(dots_of)(rows, 4, count, to);
        return;
    }
#endif
    for (int a = 0; a < tasks; a++)
        for (int b = 0; b <= a; b++) to[a * tasks + b] += NAME(dot)(rows[a], rows[b], count);
}

static int NAME(gram)(const tv_tile *tile, int what, float least, double *products, double *squares) {
    float base[BLOCK], total[BLOCK], kept[BLOCK], rows[MOST_TASKS][BLOCK];
    const int tasks = tile->tasks;
    int bad = 0;
    for (int64_t at = 0; at < tile->count; at += BLOCK) {
        int count = (int)(tile->count - at < BLOCK ? tile->count - at : BLOCK);
        bad |= NAME(block)(tile, at, count, base, rows, squares, 0);
        if (what == ENERGIES) {
            if (least != 0) NAME(select)(rows, tasks, count, least, total, kept);
            double *to = products + at / CHUNK * tasks;
            for (int a = 0; a < tasks; a++) to[a] += NAME(dot)(rows[a], rows[a], count);
        } else {
            NAME(dots)(rows, tasks, count, products + at / CHUNK * tasks * tasks);
        }
    }
    return bad;
}

/* The draws of taskvec.draws: a keyed affine map of the element's index, mixed. Low 32 bits of the index. */
static inline void NAME(drop)(float *restrict values, int count, uint32_t position, uint32_t add, uint32_t multiply,
                              uint64_t limit) {
    if (limit > 0xffffffffu) return;
    const uint32_t below = (uint32_t)limit;
    uint32_t kept[BLOCK];
    for (int i = 0; i < count; i++) {
        uint32_t x = ((uint32_t)i + (position + add)) * multiply;
        x ^= x >> 16;
        x *= 0x7feb352du;
        x ^= x >> 15;
        x *= 0x846ca68bu;
        x ^= x >> 16;
        kept[i] = x < below ? 0x3f800000u : 0;
    }
    const float *restrict ones = (const float *)kept;
    for (int i = 0; i < count; i++) values[i] *= ones[i];
}

static inline void NAME(prepare)(const tv_merge_plan *plan, int task, uint32_t position, float *restrict values, int count) {
    for (int s = 0; s < plan->steps; s++) {
        const tv_step *step = plan->step + s;
        if (step->type == TRIM) {
            const float low = step->low[task];
            for (int i = 0; i < count; i++) values[i] = __builtin_fabsf(values[i]) >= low ? values[i] : 0.0f;
        } else if (step->type == BAND) {
            const float low = step->low[task], high = step->high[task];
            for (int i = 0; i < count; i++) {
                float size = __builtin_fabsf(values[i]);
                values[i] *= (size >= low) & (size <= high) ? 1.0f : 0.0f;
            }
        } else {
            NAME(drop)(values, count, position, step->add[task], step->multiply[task], step->limit[task]);
        }
        if (step->scaled && step->factor[task] != 1.0f) {
            const float factor = step->factor[task];
            for (int i = 0; i < count; i++) values[i] *= factor;
        }
    }
}

/* The entries of a row that are not zero, side by side, and where they were. Returns how many. Room for 16 more. */
static inline int NAME(nonzero)(const uint32_t *row, int width, uint32_t *restrict bits, uint32_t *restrict where) {
    int count = 0, i = 0;
#if AVX512
    const __m512i size = _mm512_set1_epi32(0x7fffffff), step = _mm512_set1_epi32(16);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= width; i += 16) {
        __m512i x = _mm512_loadu_si512(row + i);
        __mmask16 there = _mm512_test_epi32_mask(x, size);
        _mm512_storeu_si512(bits + count, _mm512_maskz_compress_epi32(there, x));
        _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(there, at));
        count += __builtin_popcount(there);
        at = _mm512_add_epi32(at, step);
    }
#endif
    for (; i < width; i++) {
        bits[count] = row[i];
        where[count] = (uint32_t)i;
        count += (row[i] & 0x7fffffffu) != 0;
    }
    return count;
}

/* How many of a list are below `size`, and how many equal to it. The list may be read 16 beyond its end. */
static inline void NAME(compared)(const uint32_t *list, int count, uint32_t size, int *below, int *equal) {
    int less = 0, same = 0;
#if AVX512
    const __m512i x = _mm512_set1_epi32((int)size);
    for (int i = 0; i < count; i += 16) {
        __mmask16 there = (__mmask16)_bzhi_u32(0xffff, (uint32_t)(count - i < 16 ? count - i : 16));
        __m512i y = _mm512_loadu_si512(list + i);
        less += __builtin_popcount(_mm512_mask_cmplt_epu32_mask(there, y, x));
        same += __builtin_popcount(_mm512_mask_cmpeq_epu32_mask(there, y, x));
    }
#else
    for (int i = 0; i < count; i++) {
        less += list[i] < size;
        same += list[i] == size;
    }
#endif
    *below = less, *equal = same;
}

/* DELLA: entries of each row are kept with a probability linear in the rank of their magnitude, and divided by it. Equal
   ones share their mean rank. Zeros, often most of a row in half precision, come first and stay what they are; the others
   go into about as many buckets as there are of them, most of these over the uppermost 8 powers of two, and are compared
   there. */
static void NAME(rank_drop)(float *values, int64_t rows, int width, uint32_t position, uint32_t add, uint32_t multiply,
                            float slope, float least, int rescale, uint32_t *spare) {
    const int64_t room = width + 16;
    uint32_t *restrict bits = spare, *restrict where = spare + room, *restrict bucket = spare + 2 * room;
    uint32_t *restrict slot = spare + 3 * room, *restrict ordered = spare + 4 * room;
    float *restrict ranks = (float *)(spare + 5 * room);
    int first[MOST_BUCKETS + 1];
    for (int64_t row = 0; row < rows; row++, values += width, position += (uint32_t)width) {
        const int count = NAME(nonzero)((const uint32_t *)values, width, bits, where), zeros = width - count;
        if (count == 0) continue;
        uint32_t largest = 0, smallest = 0x7fffffffu;
        for (int i = 0; i < count; i++) {
            uint32_t size = bits[i] & 0x7fffffffu;
            largest = size > largest ? size : largest;
            smallest = size < smallest ? size : smallest;
        }
        int log = 32 - __builtin_clz((uint32_t)count);
        log = log < 4 ? 4 : log > LOG ? LOG : log;
        const uint32_t floor = largest - smallest >= (1u << 26) ? largest - (1u << 26) + 1 : smallest;
        const int fine = 26 - log, wide = 32 - __builtin_clz((floor - smallest) | 1u);
        const int coarse = wide > log - 2 ? wide - (log - 2) : 0, few = (int)((floor - smallest) >> coarse) + 1;
        const int buckets = few + (int)((largest - floor) >> fine) + 1;
        for (int i = 0; i < count; i++) {
            uint32_t size = bits[i] & 0x7fffffffu;
            uint32_t high = (uint32_t)few + ((size - floor) >> fine), low = (size - smallest) >> coarse;
            bucket[i] = size > floor ? high : low;
        }
        memset(first, 0, (size_t)(buckets + 1) * sizeof(int));
        for (int i = 0; i < count; i++) slot[i] = (uint32_t)first[bucket[i]]++;
        int most = 0;
        for (int b = 0, before = 0; b <= buckets; b++) {
            int held = first[b];
            most = held > most ? held : most;
            first[b] = before;
            before += held;
        }
        for (int i = 0; i < count; i++) ordered[(uint32_t)first[bucket[i]] + slot[i]] = bits[i] & 0x7fffffffu;
        if (most > FEW)
            for (int b = 0; b < buckets; b++) {
                int held = first[b + 1] - first[b], sorted = 1;
                if (held <= FEW) continue;
                uint32_t *list = ordered + first[b];
                for (int i = 1; i < held; i++) sorted &= list[i - 1] <= list[i]; /* as equal ones are */
                if (!sorted) sort_sizes(list, held, slot);
            }
        for (int i = 0; i < count; i++) {
            const uint32_t size = bits[i] & 0x7fffffffu;
            const int from = first[bucket[i]], held = first[bucket[i] + 1] - from;
            const uint32_t *list = ordered + from;
            int below = 0, equal = held;
            if (held <= FEW) {
                NAME(compared)(list, held, size, &below, &equal);
            } else if (list[0] != list[held - 1]) {
                below = below_in(list, held, size, 0);
                equal = below_in(list, held, size, 1) - below;
            }
            ranks[i] = (float)(2 * (zeros + from + below) + equal - 1) * 0.5f;
        }
        float *restrict kept = (float *)bits;
        for (int i = 0; i < count; i++) {
            uint32_t x = (where[i] + (position + add)) * multiply;
            x ^= x >> 16;
            x *= 0x7feb352du;
            x ^= x >> 15;
            x *= 0x846ca68bu;
            x ^= x >> 16;
            float drawn = ((float)(int32_t)(x >> 9) + 0.5f) * 1.1920928955078125e-7f;
            ranks[i] = ranks[i] * slope + least;
            kept[i] *= drawn < ranks[i] ? 1.0f : 0.0f;
        }
        if (rescale)
            for (int i = 0; i < count; i++) kept[i] /= ranks[i];
        for (int i = 0; i < count; i++) values[where[i]] = kept[i];
    }
}

/* Rounds to nearest even; returns whether all is finite in the output's dtype. */
static inline int NAME(narrow)(const float *restrict from, int count, int kind, void *to, int64_t at) {
    if (kind == FLOAT32) {
        memcpy((float *)to + at, from, (size_t)count * sizeof(float));
        return NAME(all_finite)(from, count);
    }
    if (kind == BFLOAT16) {
        const uint32_t *restrict bits = (const uint32_t *)from;
        uint16_t *restrict out = (uint16_t *)to + at;
        uint32_t largest = 0;
        for (int i = 0; i < count; i++) {
            uint32_t x = bits[i];
            uint32_t up = x + 0x7fffu + ((x >> 16) & 1u);
            uint32_t size = x & 0x7fffffffu;
            largest = size > largest ? size : largest;
            out[i] = (uint16_t)(up >> 16);
        }
        return largest < 0x7f7f8000u; /* from here on values round to infinity */
    }
    uint16_t *out = (uint16_t *)to + at;
    uint32_t largest = 0;
    int i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++) out[i] = _cvtss_sh(from[i], _MM_FROUND_TO_NEAREST_INT);
    for (i = 0; i < count; i++) {
        uint32_t size = out[i] & 0x7fffu;
        largest = size > largest ? size : largest;
    }
    return largest < 0x7c00u;
}

/* TIES: the sign of the weighted sum is elected, and the tasks that have it are averaged. */
static inline void NAME(ties)(const tv_merge_plan *plan, int tasks, int count, float (*rows)[BLOCK], float *restrict total,
                              float *restrict sign, float *restrict below) {
    for (int i = 0; i < count; i++) {
        sign[i] = total[i] >= 0 ? 1.0f : -1.0f;
        total[i] = 0;
        below[i] = 0;
    }
    for (int task = 0; task < tasks; task++) {
        const float *restrict values = rows[task];
        const float weight = plan->weights[task];
        for (int i = 0; i < count; i++) {
            float agreeing = values[i] * sign[i];
            agreeing = agreeing > 0 ? agreeing : 0.0f;
            total[i] = __builtin_fmaf(agreeing, weight, total[i]);
            below[i] += agreeing > 0 ? weight : 0.0f;
        }
    }
    for (int i = 0; i < count; i++) total[i] *= sign[i];
    if (plan->combine == TIES_MEAN)
        for (int i = 0; i < count; i++) total[i] /= below[i] == 0 ? 1.0f : below[i];
}

/* SCE: signs by the plain sum, tasks weighed by their energies. `weights` hold weight times share. */
static inline void NAME(sce)(const tv_merge_plan *plan, int tasks, int count, float (*rows)[BLOCK], float *restrict total,
                             float *restrict sign, float *restrict below) {
    if (plan->least != 0) NAME(select)(rows, tasks, count, plan->least, sign, below);
    NAME(sum)(rows, tasks, count, sign);
    for (int i = 0; i < count; i++) {
        sign[i] = sign[i] >= 0 ? 1.0f : -1.0f;
        total[i] = 0;
        below[i] = 0;
    }
    for (int task = 0; task < tasks; task++) {
        const float *restrict values = rows[task];
        const float weight = plan->weights[task];
        for (int i = 0; i < count; i++) {
            float share = values[i] * sign[i] > 0 ? weight : 0.0f;
            total[i] = __builtin_fmaf(values[i], share, total[i]);
            below[i] += share;
        }
    }
    for (int i = 0; i < count; i++) total[i] /= below[i] == 0 ? 1.0f : below[i];
}

/* PCB: the mean of the clipped entries, weighted by their rescaled scores. */
static inline void NAME(pcb)(const tv_merge_plan *plan, int tasks, int count, float (*rows)[BLOCK], float *restrict total,
                             float *restrict sum, float *restrict below) {
    float value[BLOCK], sums[BLOCK], score[BLOCK], share[BLOCK];
    uint32_t where[BLOCK + LANES];
    NAME(sum)(rows, tasks, count, sum);
    for (int i = 0; i < count; i++) total[i] = below[i] = 0;
    for (int task = 0; task < tasks; task++) {
        if (!plan->keeps[task]) continue;
        const float low = plan->low[task], high = plan->high[task], cut = plan->cut[task];
        const float span = plan->top[task] - cut, weight = plan->weights[task];
        const int few = NAME(selective)(tasks, low, high, cut);
        const float *values = few ? value : rows[task];
        int kept = count, whole = count;
        if (few) { /* the others' share is zero, and adding zeros changes no bit of sums that begin with +0 */
            kept = NAME(promising)(rows[task], sum, count, tasks, low, high, cut, where);
            whole = NAME(picked)(rows[task], where, kept, value);
            NAME(picked)(sum, where, kept, sums);
        }
        NAME(pcb_score)(values, few ? sums : sum, whole, tasks, low, high, score);
        for (int i = 0; i < whole; i++) {
            share[i] = ((score[i] > cut ? score[i] : cut) - cut) / span;
            float size = __builtin_fabsf(values[i]);
            size = size < low ? low : size;
            size = size > high ? high : size;
            score[i] = size * (values[i] > 0 ? 1.0f : values[i] < 0 ? -1.0f : 0.0f) * share[i];
        }
        if (few) {
            for (int i = 0; i < kept; i++) {
                total[where[i]] = __builtin_fmaf(score[i], weight, total[where[i]]);
                below[where[i]] += share[i];
            }
        } else {
            for (int i = 0; i < count; i++) total[i] = __builtin_fmaf(score[i], weight, total[i]);
            for (int i = 0; i < count; i++) below[i] += share[i];
        }
    }
    for (int i = 0; i < count; i++) total[i] /= below[i] > 1e-12f ? below[i] : 1e-12f;
}

static int NAME(merge)(const tv_tile *tile, const tv_merge_plan *plan, void *out, double *squares) {
    float base[BLOCK], total[BLOCK], sign[BLOCK], below[BLOCK];
    float rows[MOST_TASKS][BLOCK]; /* only those of this merge's tasks are touched */
    const int sum = plan->combine == WEIGHTED_SUM;
    int bad = 0;
    for (int64_t at = 0; at < tile->count; at += BLOCK) {
        int count = (int)(tile->count - at < BLOCK ? tile->count - at : BLOCK);
        if (tile->base) {
            NAME(widen)(tile->base, tile->base_kind, at, count, base);
            if (squares) bad |= !NAME(all_finite)(base, count);
        }
        for (int task = 0; task < tile->tasks; task++) {
            float *restrict values = rows[sum ? 0 : task];
            const float weight = plan->weights[task];
            NAME(row)(tile, task, at, count, base, values);
            if (squares) squares[task * tile->chunks + at / CHUNK] += NAME(squares)(values, count);
            NAME(prepare)(plan, task, plan->position + (uint32_t)at, values, count);
            if (plan->combine == PCB || plan->combine == SCE) continue;
            if (task == 0)
                for (int i = 0; i < count; i++) total[i] = values[i] * weight;
            else
                for (int i = 0; i < count; i++) total[i] = __builtin_fmaf(values[i], weight, total[i]);
        }
        if (plan->combine == PCB)
            NAME(pcb)(plan, tile->tasks, count, rows, total, sign, below);
        else if (plan->combine == SCE)
            NAME(sce)(plan, tile->tasks, count, rows, total, sign, below);
        else if (!sum)
            NAME(ties)(plan, tile->tasks, count, rows, total, sign, below);
        if (plan->divided)
            for (int i = 0; i < count; i++) total[i] /= plan->divisor;
        if (plan->multiplied)
            for (int i = 0; i < count; i++) total[i] *= plan->factor;
        if (plan->scaled)
            for (int i = 0; i < count; i++) total[i] *= plan->scale;
        if (plan->onto_base)
            for (int i = 0; i < count; i++) total[i] = base[i] + total[i];
        bad |= NAME(narrow)(total, count, plan->out_kind, out, at) ? 0 : 2;
    }
    return bad;
}

#undef LANES
#undef V
#undef COMPARED
#undef GATHERED
#undef POWER_OF_BITS
#undef HALVES
#undef WIDENED
#undef COUNTING
#undef STEPPED
#undef AS_FLOATS
#undef SIZE
#undef NO_TALLY
#undef TALLIED
