/* Softmax attention over lists of keys: the inner loops that torch has no fused operator for. Float32, forward.
 *
 *     s = change(scale * q k^T) + bias (-inf where a mask says no),  out = exp(s) v / sum exp(s),  lse = log sum exp(s)
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

#include "lists.h"

#define LAZY 8.0f
#define LOWEST -1e30f /* the maximum before any score; finite, as -inf - -inf is not a number */

/* What is kept of some rows while they meet their keys: the maximum taken off, the sums by lane, the outputs. */
typedef struct {
    float *queries; /* (rows, D), times scale / log 2 */
    float *top;     /* (rows) */
    float *total;   /* (rows, LANES) */
    float *out;     /* (rows, E) */
} State;

/* `rows` (at most ROWS) rows meet `keys` (at most CHUNK) keys. lines, step: where the values of changes lie. */
static void meet(State s, int rows, int keys, long D, long E, const float *panels, const float *values, Sight sight,
                 float bias, const Changes *changes, const int64_t *lines, long step, float *scores) {
    int vectors = (keys + LANES - 1) / LANES, tail = keys - (vectors - 1) * LANES;
    multiply(PUT, rows, vectors, s.queries, panels, (Layout){D, LANES, LANES * D, D, 1, 0, 0}, scores, CHUNK);
    ivec lane, over = {};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    for (int r = 0; r < rows; r++) {
        float *x = scores + r * CHUNK;
        if (changes->count) change(changes, lines + r, step, sight.key, keys, x, 0);
        if (sight.mask)
            for (int j = 0; j < keys; j++) x[j] = sight.mask[r * sight.step + j] ? x[j] : -INFINITY;
        if (sight.first || sight.born)
            for (int v = 0; v < vectors; v++)
                store(x + v * LANES, choose(seen_by(&sight, r, v), load(x + v * LANES), splat(-INFINITY)));
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
    multiply(ADD, rows, E / LANES, scores, values, (Layout){CHUNK, E, LANES, keys, 1, 0, 0}, s.out, E);
}

int saccade_lanes(void) { return LANES; }

/* Keys (heads, M, D) into panels: for each block of `block` keys of each head, ceil(block / LANES) of (D, LANES). */
void saccade_panels(const float *keys, float *panels, long heads, long M, long D, long block, int threads) {
    long per_head = (M + block - 1) / block, per_block = (block + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads)
    for (long x = 0; x < heads * per_head; x++) {
        long first = x % per_head * block, count = M - first < block ? M - first : block;
        const float *from = keys + (x / per_head * M + first) * D;
        fill(panels + x * per_block * LANES * D, from, D, count, per_block, D);
    }
}

/* Tasks: some rows that meet the same runs of keys.
 *
 * rows       which query (of queries (.., D)) each row of each task is, tasks one after the other
 * slots      where its output and lse go
 * task_row   (tasks + 1) first row of each task
 * task_run   (tasks, 2) first run of each task, and the one after its last
 * task_mask  (tasks) line of its masks at which the task's first row stands
 * run_key    (runs) first key of the run, among the keys of all heads; a multiple of LANES from its block's start
 * run_count  (runs) keys, all in one block
 * run_mask   (runs) where in `masks` the first line of the run's mask begins, or -1; lines are mask_step bytes apart
 * run_bias   (runs) added to the scores, in units of log 2, or null
 * row_first, row_last  (rows) first and last key of its head that a row may attend to, or null
 * row_place  (rows) and key_born, key_until (keys of all heads, and a vector more): a row sees the keys whose born and
 *            until enclose its place; or null
 * masks      bytes, 0 = may not attend
 * changes    what becomes of scores
 * half       queries and out are bfloat16, not float
 */
int saccade_tasks(const void *queries, const float *panels, const float *values, void *out, float *lse,
                  const int64_t *rows, const int64_t *slots, const int64_t *task_row, const int64_t *task_run,
                  const int64_t *task_mask, long tasks, const int64_t *run_key, const int64_t *run_count,
                  const int64_t *run_mask, const float *run_bias, const int64_t *row_first,
                  const int64_t *row_last, const int32_t *row_place, const int32_t *key_born,
                  const int32_t *key_until, const uint8_t *masks, long mask_step, long M, long D, long E, long block,
                  float scale, int threads, const Changes *changes, int half) {
    long most = 0;
    const Sights all = {run_mask, row_first, row_last, row_place, key_born, key_until, masks, mask_step};
    int failed = 0;
    for (long t = 0; t < tasks; t++)
        if (task_row[t + 1] - task_row[t] > most) most = task_row[t + 1] - task_row[t];
#pragma omp parallel num_threads(threads)
    {
        float *memory = room(2 * most * changes->count + ROWS * CHUNK + most * (LANES + E + D + 1));
        int64_t *lines = (int64_t *)memory; /* (changes, rows) */
        float *scores = memory + 2 * most * changes->count, *total = scores + ROWS * CHUNK, *sums = total + most * LANES;
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
                const float *query = (const float *)queries + row[r] * D;
                const uint16_t *half_query = (const uint16_t *)queries + row[r] * D;
                for (long d = 0; d < D; d++) scaled[r * D + d] = (half ? of_half(half_query[d]) : query[d]) * scale;
                top[r] = LOWEST;
                lines_of(changes, row[r], 0, lines + r, 0, most);
            }
            memset(total, 0, count * LANES * sizeof(float));
            memset(sums, 0, count * E * sizeof(float));
            for (long i = task_run[2 * t]; i < task_run[2 * t + 1]; i++) {
                long first = run_key[i] % M, place = in_panels(run_key[i], M, block);
                for (long j = 0; j < run_count[i]; j += CHUNK) {
                    long keys = run_count[i] - j < CHUNK ? run_count[i] - j : CHUNK;
                    for (long r = 0, some; r < count; r += some) {
                        some = next_part(count - r, ROWS);
                        int from, to;
                        Sight sight = look(&all, i, task_mask[t] + r, task_row[t] + r, first, run_key[i], j);
                        narrow(&sight, (int)some, (int)keys, &from, &to);
                        if (from >= to) continue;
                        State state = {scaled + r * D, top + r, total + r * LANES, sums + r * E};
                        meet(state, (int)some, to - from, D, E, panels + (place + j + from) * D,
                             values + (run_key[i] + j + from) * E, sight, run_bias ? run_bias[i] : 0.0f,
                             changes, lines + r, most, scores);
                    }
                }
            }
            for (long r = 0; r < count; r++) {
                float whole = sum_of(load(total + r * LANES)), factor = whole == 0 ? 0 : 1 / whole;
                float *to = (float *)out + slot[r] * E;
                uint16_t *half_to = (uint16_t *)out + slot[r] * E;
                for (long e = 0; e < E; e++) {
                    float x = sums[r * E + e] * factor;
                    if (half)
                        half_to[e] = to_half(x);
                    else
                        to[e] = x;
                }
                lse[slot[r]] = whole == 0 ? -INFINITY : (top[r] + log2f(whole)) * LN2;
            }
        }
        free(memory);
    }
    return failed;
}

/* out_i = sum_s w_is part_is over its own output and those of `shares` other sets of keys, w_is = exp(lse_is) / sum_s;
 * lse_i of all. out (count, E) and lse (count) hold the own; where the LSE of a share is -inf, it is not read. */
void saccade_merge(float *out, float *lse, const float *parts, const float *part_lse, long count, long shares, long E,
                   int threads) {
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < count; i++) {
        float top = lse[i], total = 0;
        for (long s = 0; s < shares; s++) top = part_lse[i * shares + s] > top ? part_lse[i * shares + s] : top;
        if (top == -INFINITY) continue;
        for (long s = 0; s < shares; s++) total += expf(part_lse[i * shares + s] - top);
        float own = expf(lse[i] - top);
        total += own;
        for (long e = 0; e < E; e++) out[i * E + e] *= own / total;
        for (long s = 0; s < shares; s++) {
            float weight = expf(part_lse[i * shares + s] - top) / total;
            if (weight == 0) continue;
            for (long e = 0; e < E; e++) out[i * E + e] += weight * parts[(i * shares + s) * E + e];
        }
        lse[i] = top + logf(total);
    }
}
