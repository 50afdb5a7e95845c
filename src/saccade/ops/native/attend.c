/* Softmax attention over lists of keys: the inner loops that torch has no fused operator for. Float32, forward.
 *
 *     s = scale * q k^T + bias (-inf where a mask says no),  out = exp(s) v / sum exp(s),  lse = log sum exp(s)
 *
 * All entries are made of one product, six rows by a few vectors, whose sums stay in registers:
 *
 *     c[r][v] (+)= sum_k a[r][k] * b[k][v]
 *
 * For scores b is the keys transposed into panels of LANES keys, (D, LANES) each; for outputs b is the values as they
 * lie. Scores are in units of log 2, and their maximum is taken off lazily: a row is rescaled only when a score exceeds
 * the maximum taken so far by 2^LAZY, so that the sums stay far from overflow. What a row gets does not depend on the
 * rows that are computed beside it, nor on the number of threads.
 *
 * Letters: D head dim of q and k, E of v (a multiple of LANES), M keys of a head.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* lanes of a vector, and vectors of sums that fit into registers beside each other for six rows */
#if defined(__AVX512F__)
#define LANES 16
#define WIDE 4
#elif defined(__AVX2__)
#define LANES 8
#define WIDE 2
#else
#define LANES 4
#define WIDE 2
#endif
#define ROWS 6
#define CHUNK 64 /* keys whose scores are made before they are used: their keys and values stay in the first cache */
#define LAZY 8.0f
#define LOWEST -1e30f /* the maximum before any score; finite, as -inf - -inf is not a number */
#define LN2 0.6931471805599453f

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec anywhere __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE vec load(const float *p) { return *(const anywhere *)p; }
INLINE void store(float *p, vec x) { *(anywhere *)p = x; }
INLINE vec splat(float x) { return (vec){} + x; }
INLINE vec choose(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

INLINE float sum_of(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

INLINE float top_of(vec x) {
    float t = x[0];
    for (int i = 1; i < LANES; i++) t = x[i] > t ? x[i] : t;
    return t;
}

INLINE int any_of(ivec x) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

/* 2^x to 2e-7; 0 below 2^-126. NaN stays NaN. */
INLINE vec exp2_of(vec x) {
    const vec round = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = choose(x < -127.0f, splat(-127.0f), x);
    vec shifted = x + round;
    ivec n = (ivec)shifted - (ivec)round;
    vec f = x - (shifted - round);
    vec y = splat(1.5403530e-4f);
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return y * (vec)((n + 127) << 23);
}

/* c (rows, width vectors) = or += a (rows, depth) b (depth, width vectors) */
INLINE void product_of(const int rows, const int width, const int add, const float *restrict a, long step_a,
                       const float *restrict b, long step_k, long step_v, long depth, float *restrict c, long step_c) {
    vec sums[ROWS][WIDE];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < width; v++) sums[r][v] = add ? load(c + r * step_c + v * LANES) : (vec){};
    for (long k = 0; k < depth; k++) {
        vec x[WIDE];
        UNROLL for (int v = 0; v < width; v++) x[v] = load(b + k * step_k + v * step_v);
        UNROLL for (int r = 0; r < rows; r++) {
            vec y = splat(a[r * step_a + k]);
            UNROLL for (int v = 0; v < width; v++) sums[r][v] += y * x[v];
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < width; v++) store(c + r * step_c + v * LANES, sums[r][v]);
}

/* the same, compiled for each number of rows and vectors */
typedef void product(const float *, long, const float *, long, long, long, float *, long);
#define PRODUCT(NAME, R, W, ADD)                                                                                       \
    static void NAME##R##_##W(const float *a, long step_a, const float *b, long step_k, long step_v, long depth,       \
                              float *c, long step_c) {                                                                 \
        product_of(R, W, ADD, a, step_a, b, step_k, step_v, depth, c, step_c);                                         \
    }
#define EACH(MACRO, NAME, W, ADD)                                                                                      \
    MACRO(NAME, 1, W, ADD) MACRO(NAME, 2, W, ADD) MACRO(NAME, 3, W, ADD) MACRO(NAME, 4, W, ADD)                        \
    MACRO(NAME, 5, W, ADD) MACRO(NAME, 6, W, ADD)
#define NAMED(NAME, R, W, ADD) NAME##R##_##W,
EACH(PRODUCT, put, 1, 0)
EACH(PRODUCT, put, 2, 0)
EACH(PRODUCT, add, 1, 1)
EACH(PRODUCT, add, 2, 1)
#if WIDE == 4
EACH(PRODUCT, put, 3, 0)
EACH(PRODUCT, put, 4, 0)
EACH(PRODUCT, add, 3, 1)
EACH(PRODUCT, add, 4, 1)
#endif
static product *const PUT[WIDE][ROWS] = {
    {EACH(NAMED, put, 1, 0)},
    {EACH(NAMED, put, 2, 0)},
#if WIDE == 4
    {EACH(NAMED, put, 3, 0)},
    {EACH(NAMED, put, 4, 0)},
#endif
};
static product *const ADD[WIDE][ROWS] = {
    {EACH(NAMED, add, 1, 1)},
    {EACH(NAMED, add, 2, 1)},
#if WIDE == 4
    {EACH(NAMED, add, 3, 1)},
    {EACH(NAMED, add, 4, 1)},
#endif
};

static void multiply(product *const (*kind)[ROWS], int rows, int vectors, const float *a, long step_a, const float *b,
                     long step_k, long step_v, long depth, float *c, long step_c) {
    for (int v = 0; v < vectors; v += WIDE) {
        int width = vectors - v < WIDE ? vectors - v : WIDE;
        kind[width - 1][rows - 1](a, step_a, b + v * step_v, step_k, step_v, depth, c + v * LANES, step_c);
    }
}

/* What is kept of some rows while they meet their keys: the maximum taken off, the sums by lane, the outputs. */
typedef struct {
    float *queries; /* (rows, D), times scale / log 2 */
    float *top;     /* (rows) */
    float *total;   /* (rows, LANES) */
    float *out;     /* (rows, E) */
} State;

/* `rows` (at most ROWS) rows meet `keys` (at most CHUNK) keys. mask: bytes, 0 = may not attend; null = all may. */
static void meet(State s, int rows, int keys, long D, long E, const float *panels, const float *values,
                 const uint8_t *mask, long step_mask, float bias, float *scores) {
    int vectors = (keys + LANES - 1) / LANES, tail = keys - (vectors - 1) * LANES;
    multiply(PUT, rows, vectors, s.queries, D, panels, LANES, LANES * D, D, scores, CHUNK);
    ivec lane, over = {};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int r = 0; r < rows; r++) {
        float *x = scores + r * CHUNK;
        if (mask)
            for (int j = 0; j < keys; j++) x[j] = mask[r * step_mask + j] ? x[j] : -INFINITY;
        if (tail < LANES) {
            float *last = x + (vectors - 1) * LANES;
            store(last, choose(lane < tail, load(last), splat(-INFINITY)));
        }
        vec high = splat(-INFINITY);
        for (int v = 0; v < vectors; v++) {
            vec y = load(x + v * LANES);
            if (bias != 0.0f) store(x + v * LANES, y += bias);
            high = larger(y, high);
        }
        over |= high > s.top[r] + LAZY;
    }
    if (any_of(over)) {
        for (int r = 0; r < rows; r++) {
            vec high = splat(-INFINITY);
            for (int v = 0; v < vectors; v++) high = larger(load(scores + r * CHUNK + v * LANES), high);
            float top = top_of(high);
            if (!(top > s.top[r] + LAZY)) continue;
            float factor = exp2f(s.top[r] - top);
            s.top[r] = top;
            store(s.total + r * LANES, load(s.total + r * LANES) * factor);
            for (long e = 0; e < E; e += LANES) store(s.out + r * E + e, load(s.out + r * E + e) * factor);
        }
    }
    for (int r = 0; r < rows; r++) {
        float *x = scores + r * CHUNK;
        vec total = load(s.total + r * LANES);
        for (int v = 0; v < vectors; v++) {
            vec weight = exp2_of(load(x + v * LANES) - s.top[r]);
            total += weight;
            store(x + v * LANES, weight);
        }
        store(s.total + r * LANES, total);
    }
    multiply(ADD, rows, (int)(E / LANES), scores, CHUNK, values, E, LANES, keys, s.out, E);
}

static float *room(long floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

int saccade_lanes(void) { return LANES; }

/* Keys (heads, M, D) into panels: for each block of `block` keys of each head, ceil(block / LANES) of (D, LANES). */
void saccade_panels(const float *keys, float *panels, long heads, long M, long D, long block, int threads) {
    long per_head = (M + block - 1) / block, per_block = (block + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
    for (long x = 0; x < heads * per_head; x++) {
        long first = x % per_head * block, count = M - first < block ? M - first : block;
        const float *from = keys + (x / per_head * M + first) * D;
        for (long j = 0; j < per_block * LANES; j++) {
            float *to = panels + (x * per_block + j / LANES) * LANES * D + j % LANES;
            for (long d = 0; d < D; d++) to[d * LANES] = j < count ? from[j * D + d] : 0.0f;
        }
    }
}

/* Tasks: some rows that meet the same runs of keys.
 *
 * rows       which query (of queries (.., D)) each row of each task is, tasks one after the other
 * slots      where its output and lse go
 * task_row   (tasks + 1) first row of each task
 * task_run   (tasks, 2) first run of each task, and the one after its last
 * task_mask  (tasks) line of a mask tile at which the task's first row stands
 * run_key    (runs) first key of the run, among the keys of all heads; a multiple of LANES from its block's start
 * run_count  (runs) keys, all in one block
 * run_mask   (runs) mask tile, or -1
 * run_bias   (runs) added to the scores, in units of log 2, or null
 * tiles      bytes (.., mask_rows, mask_keys), with room for a vector after the last
 */
int saccade_tasks(const float *queries, const float *panels, const float *values, float *out, float *lse,
                  const int64_t *rows, const int64_t *slots, const int64_t *task_row, const int64_t *task_run,
                  const int64_t *task_mask, long tasks, const int64_t *run_key, const int64_t *run_count,
                  const int64_t *run_mask, const float *run_bias, const uint8_t *tiles, long mask_rows, long mask_keys,
                  long M, long D, long E, long block, float scale, int threads) {
    long most = 0, per_head = (M + block - 1) / block, per_block = (block + LANES - 1) / LANES;
    int failed = 0;
    for (long t = 0; t < tasks; t++)
        if (task_row[t + 1] - task_row[t] > most) most = task_row[t + 1] - task_row[t];
#pragma omp parallel num_threads(threads)
    {
        float *memory = room(ROWS * CHUNK + most * (LANES + E + D + 1));
        float *scores = memory, *total = scores + ROWS * CHUNK, *sums = total + most * LANES;
        float *scaled = sums + most * E, *top = scaled + most * D;
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < tasks; t++) {
            if (!memory) continue;
            const int64_t *row = rows + task_row[t], *slot = slots + task_row[t];
            long count = task_row[t + 1] - task_row[t];
            for (long r = 0; r < count; r++) {
                for (long d = 0; d < D; d++) scaled[r * D + d] = queries[row[r] * D + d] * scale;
                top[r] = LOWEST;
            }
            memset(total, 0, count * LANES * sizeof(float));
            memset(sums, 0, count * E * sizeof(float));
            for (long i = task_run[2 * t]; i < task_run[2 * t + 1]; i++) {
                long head = run_key[i] / M, first = run_key[i] % M;
                long panel = (head * per_head + first / block) * per_block + first % block / LANES;
                const uint8_t *mask = 0;
                if (run_mask && run_mask[i] >= 0) mask = tiles + (run_mask[i] * mask_rows + task_mask[t]) * mask_keys;
                for (long j = 0; j < run_count[i]; j += CHUNK) {
                    long keys = run_count[i] - j < CHUNK ? run_count[i] - j : CHUNK;
                    for (long r = 0, some; r < count; r += some) {
                        long groups = (count - r + ROWS - 1) / ROWS; /* as equal as they can be */
                        some = (count - r + groups - 1) / groups;
                        State state = {scaled + r * D, top + r, total + r * LANES, sums + r * E};
                        meet(state, (int)some, (int)keys, D, E, panels + (panel * LANES + j) * D,
                             values + (run_key[i] + j) * E, mask ? mask + r * mask_keys + j : 0, mask_keys,
                             run_bias ? run_bias[i] : 0.0f, scores);
                    }
                }
            }
            for (long r = 0; r < count; r++) {
                float whole = sum_of(load(total + r * LANES)), factor = whole == 0 ? 0 : 1 / whole;
                for (long e = 0; e < E; e++) out[slot[r] * E + e] = sums[r * E + e] * factor;
                lse[slot[r]] = whole == 0 ? -INFINITY : (top[r] + log2f(whole)) * LN2;
            }
        }
        free(memory);
    }
    return failed;
}
