/* Rows at indices: weighted sums of them, their products with vectors, sums into them; and crops of tables. Float32.
 *
 *     gather    out_k = sum_s w_ks rows[i_ks]
 *     dot       out_ks = q_k . rows[i_ks]
 *     scatter   out_r = sum over (k, s) with i_ks = r of w_ks g_k
 *
 * Sums into rows are parted by rows: a part goes through all indices and takes its own, in the order of (k, s), so that
 * nothing is sorted, no two threads add to one row, and the result does not depend on their number.
 *
 * An index that is no row's is an error: nothing is read or written there, and 1 is returned; 2 where there is no memory.
 *
 * A crop is a window of a table at a position between its cells, read bilinearly: the fractions are the same for all of
 * its cells.
 *
 * Letters: K sums of S rows of D numbers; tables (G groups, T heads, Y, X), windows H x W, fractions down and across.
 */

#include "vectors.h"

/* rows of a sum that are on their way from memory */
#define AHEAD 4

/* Whether some of the indices is no row's. */
INLINE int astray(const int32_t *index, long count, long rows) {
    int found = 0;
    for (long s = 0; s < count; s++) found |= index[s] < 0 || index[s] >= rows;
    return found;
}

int saccade_gather(const float *rows, const int32_t *index, const float *weight, float *out, long R, long K, long S,
                   long D, int threads) {
    int failed = 0;
    long whole = D / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) reduction(| : failed)
    for (long k = 0; k < K; k++) {
        const int32_t *at = index + k * S;
        if (astray(at, S, R)) {
            failed = 1;
            continue;
        }
        const float *w = weight + k * S;
        float *to = out + k * D;
        long d = 0;
        for (; d + WIDE * LANES <= D; d += WIDE * LANES) {
            vec sum[WIDE] = {0};
            for (long s = 0; s < S; s++) {
                const float *row = rows + at[s] * D + d;
                if (s + AHEAD < S) __builtin_prefetch(rows + at[s + AHEAD] * D + d);
                UNROLL for (int i = 0; i < WIDE; i++) sum[i] += load(row + i * LANES) * w[s];
            }
            UNROLL for (int i = 0; i < WIDE; i++) store(to + d + i * LANES, sum[i]);
        }
        for (; d < whole; d += LANES) {
            vec sum = {0};
            for (long s = 0; s < S; s++) sum += load(rows + at[s] * D + d) * w[s];
            store(to + d, sum);
        }
        for (; d < D; d++) {
            float sum = 0;
            for (long s = 0; s < S; s++) sum += rows[at[s] * D + d] * w[s];
            to[d] = sum;
        }
    }
    return failed;
}

int saccade_gather_dot(const float *query, const float *rows, const int32_t *index, float *out, long R, long K, long S,
                       long D, int threads) {
    int failed = 0;
    long whole = D / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64) reduction(| : failed)
    for (long k = 0; k < K; k++) {
        const float *q = query + k * D;
        const int32_t *at = index + k * S;
        if (astray(at, S, R)) {
            failed = 1;
            continue;
        }
        for (long s = 0; s < S; s++) {
            const float *row = rows + at[s] * D;
            if (s + AHEAD < S) __builtin_prefetch(rows + at[s + AHEAD] * D);
            vec sum = {0}, more = {0};
            long d = 0;
            for (; d + 2 * LANES <= D; d += 2 * LANES) {
                sum += load(row + d) * load(q + d);
                more += load(row + d + LANES) * load(q + d + LANES);
            }
            if (d < whole) {
                sum += load(row + d) * load(q + d);
                d += LANES;
            }
            float rest = 0;
            for (; d < D; d++) rest += row[d] * q[d];
            out[k * S + s] = sum_of(sum + more) + rest;
        }
    }
    return failed;
}

/* out (R, D) is zero; neighbouring rows that share a cache line belong to one of the parts, a power of two */
int saccade_scatter(const int32_t *index, const float *weight, const float *grad, float *out, long R, long K, long S,
                    long D, int parts, int threads) {
    int shift = 0;
    if (astray(index, K * S, R)) return 1;
    while ((D << shift) * (long)sizeof(float) < 64) shift++;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int part = 0; part < parts; part++)
        for (long k = 0; k < K; k++) {
            const float *from = grad + k * D;
            for (long s = k * S; s < (k + 1) * S; s++) {
                if (((index[s] >> shift) & (parts - 1)) != part) continue;
                float *to = out + index[s] * D, w = weight[s];
                long d = 0;
                for (; d + LANES <= D; d += LANES) store(to + d, load(to + d) + load(from + d) * w);
                for (; d < D; d++) to[d] += from[d] * w;
            }
        }
    return 0;
}

/* out (K, T, H, W): for window k the table of group[k], whose first cell is (top[k], left[k]) */
int saccade_crops(const float *table, const int32_t *group, const int32_t *top, const int32_t *left, const float *down,
                  const float *across, float *out, long K, long G, long T, long Y, long X, long H, long W, int threads) {
    if (astray(group, K, G) || astray(top, K, Y - H) || astray(left, K, X - W)) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (long k = 0; k < K; k++)
        for (long t = 0; t < T; t++)
            for (long y = 0; y < H; y++) {
                const float *upper = table + ((group[k] * T + t) * Y + top[k] + y) * X + left[k], *lower = upper + X;
                float *to = out + ((k * T + t) * H + y) * W, far = down[k], right = across[k];
                long x = 0;
                for (; x + LANES <= W; x += LANES) {
                    vec a = load(upper + x), b = load(upper + x + 1);
                    a += (load(lower + x) - a) * far;
                    b += (load(lower + x + 1) - b) * far;
                    store(to + x, a + (b - a) * right);
                }
                for (; x < W; x++) {
                    float a = upper[x] + (lower[x] - upper[x]) * far;
                    float b = upper[x + 1] + (lower[x + 1] - upper[x + 1]) * far;
                    to[x] = a + (b - a) * right;
                }
            }
    return 0;
}

/* of_table (parts, G, T, Y, X) is zero; of_top and of_left (T, K) are written. A task is a head of a group and a part of
 * the windows. */
int saccade_crops_gradients(const float *grad, const float *table, const int32_t *group, const int32_t *top,
                            const int32_t *left, const float *down, const float *across, float *of_table, float *of_top,
                            float *of_left, long K, long G, long T, long Y, long X, long H, long W, int parts,
                            int threads) {
    int failed = 0;
    if (astray(group, K, G) || astray(top, K, Y - H) || astray(left, K, X - W)) return 1;
#pragma omp parallel num_threads(threads)
    {
        /* what a row of the window gives to its two rows of the table, for this row and the one before */
        float *line = malloc(2 * (W + 1) * sizeof(float));
        if (!line) {
#pragma omp atomic write
            failed = 2;
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < parts * G * T; task++) {
            if (!line) continue;
            long part = task / (G * T), g = task / T % G, t = task % T;
            float *own = of_table + (part * G * T + g * T + t) * Y * X;
            for (long k = K * part / parts; k < K * (part + 1) / parts; k++) {
                if (group[k] != g) continue;
                float far = down[k], right = across[k], vertical = 0, horizontal = 0;
                memset(line, 0, 2 * (W + 1) * sizeof(float));
                for (long y = 0; y <= H; y++) {
                    long cell = (top[k] + y) * X + left[k];
                    float *now = line + (y & 1) * (W + 1), *before = line + (~y & 1) * (W + 1);
                    if (y < H) {
                        const float *from = grad + ((k * T + t) * H + y) * W;
                        const float *upper = table + (g * T + t) * Y * X + cell, *lower = upper + X;
                        now[0] = from[0] * (1 - right);
                        for (long x = 1; x < W; x++) now[x] = from[x] * (1 - right) + from[x - 1] * right;
                        now[W] = from[W - 1] * right;
                        float along = 0, aside = 0;
                        for (long x = 0; x <= W; x++) along += (lower[x] - upper[x]) * now[x];
                        for (long x = 0; x < W; x++) {
                            float a = upper[x + 1] - upper[x], b = lower[x + 1] - lower[x];
                            aside += (a + (b - a) * far) * from[x];
                        }
                        vertical += along;
                        horizontal += aside;
                    } else
                        memset(now, 0, (W + 1) * sizeof(float));
                    for (long x = 0; x <= W; x++) own[cell + x] += now[x] * (1 - far) + before[x] * far;
                }
                of_top[t * K + k] = vertical;
                of_left[t * K + k] = horizontal;
            }
        }
        free(line);
    }
    return failed;
}
