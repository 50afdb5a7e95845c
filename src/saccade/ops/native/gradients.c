/* The backward pass of attend.c, for the same tasks. Float32.
 *
 *     p = exp(s - lse),  dp = d out v^T,  ds = p * (dp - delta),  delta = rowsum(d out * out) - d lse
 *     dq = scale * ds k,  dk = scale * ds^T q,  dv = p^T d out,  d bias = the sum of ds over a run
 *
 * where the ds of dq and dk is that before the changes of scores, with the gradients of what they add on its way.
 *
 * Scores are made again, and weights by the LSE, whose rounding at the size of the largest score is theirs too, the same
 * for a whole row: at scores of some 100, 1e-5 of what the row gives. Tasks of one owner run one after the other and add to gradients of keys and values that are
 * the owner's alone: no two threads write to one place, and sums are made in one order.
 *
 * D and E are multiples of LANES here. Other letters as in attend.c.
 */

#include "lists.h"

#define HIGH 64 /* rows whose weights are kept, to be turned for the gradients of keys and values */

/* (rows, CHUNK) to (CHUNK, HIGH), the keys from..to */
static void turn(const float *weights, int rows, int from, int to, float *turned) {
    int j = from;
#ifdef TRANSPOSED
    for (; j + 8 <= to; j += 8)
        for (int r = 0; r < rows; r += 8) transpose(weights + r * CHUNK + j, CHUNK, turned + j * HIGH + r, HIGH);
#endif
    for (; j < to; j++)
        for (int r = 0; r < rows; r++) turned[j * HIGH + r] = weights[r * CHUNK + j];
}

/* sums (keys, width) += turned (keys, rows) x (rows, width) */
static void gather(const float *turned, int rows, int keys, const float *x, long width, float *sums) {
    for (int j = 0, some; j < keys; j += some) {
        some = (int)next_part(keys - j, ROWS);
        multiply(ADD, some, width / LANES, turned + j * HIGH, x, (Layout){HIGH, width, LANES, rows, 1, 0, 0},
                 sums + j * width, width);
    }
}

/* queries (.., D), grads of outputs (.., E), delta and lse (..) by row; keys (heads, M, D); panels of keys and of values;
 * grad_queries (.., D) by row, added to; grad_keys (owners, M, D), which the caller multiplies by scale, and grad_values
 * (owners, M, E), added to: an owner's tasks have keys of one head. owner_task (owners + 1): first task of each owner.
 * run_grad (runs): d bias, or null. The others as in attend.c. */
int saccade_gradients(const float *queries, const float *grads, const float *delta, const float *lse, const float *keys,
                      const float *panels, const float *value_panels, float *grad_queries, float *grad_keys,
                      float *grad_values, float *run_grad, const int64_t *owner_task, long owners, const int64_t *rows,
                      const int64_t *task_row, const int64_t *task_run, const int64_t *task_mask,
                      const int64_t *run_key, const int64_t *run_count, const int64_t *run_mask, const float *run_bias,
                      const int64_t *row_first, const int64_t *row_last, const int32_t *row_place,
                      const int32_t *key_born, const int32_t *key_until, const uint8_t *masks, long mask_step, long M,
                      long D, long E, long block, float scale, int threads, const Changes *changes) {
    const Sights all = {run_mask, row_first, row_last, row_place, key_born, key_until, masks, mask_step};
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        long count_of_changes = changes->count, wide = count_of_changes * (4 * HIGH + CHUNK);
        float *memory = room(wide + HIGH * (2 * D + E + 2) + 2 * HIGH * CHUNK + 2 * CHUNK * HIGH + ROWS * CHUNK);
        int64_t *lines = (int64_t *)memory, *grad_lines = lines + count_of_changes * HIGH; /* (changes, HIGH) */
        float *kept = memory + count_of_changes * 4 * HIGH, *q = memory + wide, *dq = q + HIGH * D;
        float *go = dq + HIGH * D, *off = go + HIGH * E, *shift = off + HIGH;
        float *p = shift + HIGH, *ds = p + HIGH * CHUNK, *turned = ds + HIGH * CHUNK, *dp = turned + CHUNK * HIGH;
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
        ivec lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma omp for schedule(dynamic, 1)
        for (long owner = 0; owner < owners; owner++) {
            if (!memory) continue;
            float *dk = grad_keys + owner * M * D, *dv = grad_values + owner * M * E;
            for (long t = owner_task[owner]; t < owner_task[owner + 1]; t++)
                for (long high = task_row[t]; high < task_row[t + 1]; high += HIGH) {
                    int count = task_row[t + 1] - high < HIGH ? (int)(task_row[t + 1] - high) : HIGH;
                    const int64_t *row = rows + high;
                    for (int r = 0; r < count; r++) {
                        memcpy(q + r * D, queries + row[r] * D, D * sizeof(float));
                        memcpy(go + r * E, grads + row[r] * E, E * sizeof(float));
                        shift[r] = delta[row[r]];
                        /* rows that attend to nothing weigh nothing */
                        off[r] = lse[row[r]] == -INFINITY ? INFINITY : lse[row[r]] / LN2;
                        lines_of(changes, row[r], owner, lines + r, grad_lines + r, HIGH);
                    }
                    memset(dq, 0, count * D * sizeof(float));
                    for (long i = task_run[2 * t]; i < task_run[2 * t + 1]; i++) {
                        long first = run_key[i] % M, place = in_panels(run_key[i], M, block);
                        long line = task_mask[t] + high - task_row[t];
                        float bias = run_bias ? run_bias[i] : 0.0f, whole = 0;
                        for (long j = 0; j < run_count[i]; j += CHUNK) {
                            int some_keys = run_count[i] - j < CHUNK ? (int)(run_count[i] - j) : CHUNK;
                            int least = some_keys, most = 0;
                            memset(p, 0, count * CHUNK * sizeof(float));
                            memset(ds, 0, count * CHUNK * sizeof(float));
                            for (int r = 0, some; r < count; r += some) {
                                int from, to;
                                some = (int)next_part(count - r, ROWS);
                                Sight sight = look(&all, i, line + r, high + r, first, run_key[i], j);
                                narrow(&sight, some, some_keys, &from, &to);
                                if (from >= to) continue;
                                least = from < least ? from : least;
                                most = to > most ? to : most;
                                long at = place + j + from;
                                int vectors = (to - from + LANES - 1) / LANES;
                                float *weights = p + r * CHUNK + from, *slopes = ds + r * CHUNK + from;
                                multiply(PUT, some, vectors, q + r * D, panels + at * D,
                                         (Layout){D, LANES, LANES * D, D, 1, 0, 0}, weights, CHUNK);
                                multiply(PUT, some, vectors, go + r * E, value_panels + at * E,
                                         (Layout){E, LANES, LANES * E, E, 1, 0, 0}, dp, CHUNK);
                                for (int u = 0; u < some; u++) {
                                    float factor = scale / LN2;
                                    if (count_of_changes) {
                                        for (int x = 0; x < vectors; x++) {
                                            float *here = weights + u * CHUNK + x * LANES;
                                            store(here, load(here) * factor);
                                        }
                                        change(changes, lines + r + u, HIGH, sight.key, to - from, weights + u * CHUNK,
                                               kept);
                                        factor = 1;
                                    }
                                    for (int x = 0; x < vectors; x++) {
                                        ivec sees = seen_by(&sight, u, x) & (lane + x * LANES < to - from);
                                        vec score = load(weights + u * CHUNK + x * LANES) * factor + bias;
                                        vec weight = (vec)(sees & (ivec)exp2_of(score - off[r + u]));
                                        if (sight.mask)
                                            for (int l = 0; l < LANES && x * LANES + l < to - from; l++)
                                                if (!sight.mask[u * sight.step + x * LANES + l]) weight[l] = 0;
                                        vec slope = weight * (load(dp + u * CHUNK + x * LANES) - shift[r + u]);
                                        /* also where 0 meets what is not a number */
                                        slope = (vec)((weight != 0.0f) & (ivec)slope);
                                        store(weights + u * CHUNK + x * LANES, weight);
                                        store(slopes + u * CHUNK + x * LANES, slope);
                                        if (run_grad) whole += sum_of(slope);
                                    }
                                    if (count_of_changes)
                                        change_back(changes, grad_lines + r + u, HIGH, sight.key, to - from,
                                                    slopes + u * CHUNK, kept);
                                }
                                multiply(ADD, some, D / LANES, slopes, keys + (run_key[i] + j + from) * D,
                                         (Layout){CHUNK, D, LANES, to - from, 1, 0, 0}, dq + r * D, D);
                            }
                            if (least >= most) continue;
                            turn(p, count, least, most, turned);
                            gather(turned + least * HIGH, count, most - least, go, E, dv + (first + j + least) * E);
                            turn(ds, count, least, most, turned);
                            gather(turned + least * HIGH, count, most - least, q, D, dk + (first + j + least) * D);
                        }
                        if (run_grad) run_grad[i] += whole;
                    }
                    for (int r = 0; r < count; r++)
                        for (long d = 0; d < D; d++) grad_queries[row[r] * D + d] += scale * dq[r * D + d];
                }
        }
        free(memory);
    }
    return failed;
}
