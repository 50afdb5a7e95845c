/* A step of the running softmax over tiles of scores that somebody else has made. Float32, forward.
 *
 *     top' = max(top, max_j x_j),  w_j = exp(x_j - top'),  factor = exp(top - top'),  total' = factor total + sum_j w_j
 *
 * where x_j is -inf where a mask says no, and exp(-inf - -inf) is 0. What was summed with the weights before is brought
 * to the new top as well: out' = factor out.
 */

#include "vectors.h"

/* scores, weights (count, keys), which may be one; top, total (count); out (count, width). seen: bytes, 0 = may not attend, or null;
 * rows are counted through heads of `queries` queries, and batch rows of `heads`, of which the masks lie mask_batch,
 * mask_head and mask_row bytes apart. */
void saccade_soften(const float *scores, float *weights, float *top, float *total, float *out, const uint8_t *seen,
                    long mask_batch, long mask_head, long mask_row, long heads, long queries, long count, long keys,
                    long width, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < count; r++) {
        const float *x = scores + r * keys;
        float *w = weights + r * keys;
        const uint8_t *mask = seen;
        if (seen) {
            mask += r / queries / heads * mask_batch + r / queries % heads * mask_head + r % queries * mask_row;
            for (long j = 0; j < keys; j++) w[j] = mask[j] ? x[j] : -INFINITY;
            x = w;
        }
        long whole = keys / LANES * LANES;
        vec high = splat(-INFINITY), sum = {};
        for (long j = 0; j < whole; j += LANES) high = larger(load(x + j), high);
        float before = top[r], after = top_of(high), rest = 0;
        for (long j = whole; j < keys; j++) after = x[j] > after ? x[j] : after;
        after = before > after ? before : after;
        float shift = after == -INFINITY ? 0 : after;
        for (long j = 0; j < whole; j += LANES) {
            vec weight = exp2_of((load(x + j) - shift) * (1 / LN2));
            sum += weight;
            store(w + j, weight);
        }
        for (long j = whole; j < keys; j++) rest += w[j] = exp2_of(splat((x[j] - shift) * (1 / LN2)))[0];
        top[r] = after;
        float factor = expf(before - shift);
        total[r] = total[r] * factor + sum_of(sum) + rest;
        if (factor != 1) /* NaN is not 1 */
            for (long e = 0; e < width; e++) out[r * width + e] *= factor;
    }
}
