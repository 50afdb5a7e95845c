/* Softmax attention of neighbourhoods on a grid (Z, Y, X): every query sees a window of each axis. Float32, forward.
 *
 * A tile is a few queries side by side along x. The keys that they see are the same stretch of x in each of the rows
 * (z, y) of their window: panels of the keys transposed, one per row, of which the scores are made whole, lanes that a
 * query does not see masked. Tiles above each other share panels, and a copy of the values (rows of a grid lie at
 * distances that caches do not like): these are made for some rows at a time and stay in the second cache; the scores of a tile stay in the first, so that softmax needs no second pass over keys.
 *
 * Letters as in attend.c.
 */

#include "vectors.h"

/* grid8.c compiles this for narrow vectors: small windows waste fewer of their lanes */
#ifndef GRID
#define GRID saccade_grid
#endif

/* rows of queries whose panels are made at a time: with one plane, and with several */
#define DEEP_Z 4
#define DEEP_Y 16
#define FLAT_Y 32

/* rows of queries that go through the rows of keys together, and floats of keys that they go through at a time */
#define HIGH 4
#define CACHED 4096

typedef struct {
    const int64_t *first, *last; /* window of each position, inclusive */
} Axis;

/* First and last key that the queries [from, to) of an axis see. */
static void reach(const Axis *axis, long from, long to, long *low, long *high) {
    *low = axis->first[from];
    *high = axis->last[from];
    for (long i = from + 1; i < to; i++) {
        *low = axis->first[i] < *low ? axis->first[i] : *low;
        *high = axis->last[i] > *high ? axis->last[i] : *high;
    }
}

/* Most keys that `deep` queries of an axis see together. */
static long widest(const Axis *axis, long length, long deep) {
    long most = 0, low, high;
    for (long i = 0; i < length; i += deep) {
        reach(axis, i, i + deep < length ? i + deep : length, &low, &high);
        most = high - low + 1 > most ? high - low + 1 : most;
    }
    return most;
}

/* The part a..b of `some` keys from c on that a query of an axis sees; whether there is one. */
INLINE int part(const Axis *axis, long query, long c, long some, long *a, long *b) {
    *a = c > axis->first[query] ? c : axis->first[query];
    *b = c + some - 1 < axis->last[query] ? c + some - 1 : axis->last[query];
    return *a <= *b;
}

/* Ask for `floats` floats that will be needed soon. */
INLINE void announce(const float *from, long floats) {
    for (long i = 0; i < floats; i += 16) __builtin_prefetch(from + i);
}

/* Softmax of a row of scores over the lanes that a query sees of each of `vectors` vectors, which repeat `seen` times in
 * all; the weights are left undivided. Returns their sum; top: what was taken off scale * score. */
INLINE float soften(float *scores, long seen, long vectors, int first, int last, int low, float scale, float *top) {
    vec high = splat(-INFINITY), total = {};
    ivec lane;
    for (int i = 0; i < LANES; i++) lane[i] = low + i;
    for (long v = 0; v < vectors; v++) {
        ivec key = lane + (int)v * LANES, sees = (key >= first) & (key <= last);
        for (long u = v; u < seen; u += vectors) high = larger(choose(sees, load(scores + u * LANES), high), high);
    }
    *top = top_of(high) * scale;
    for (long v = 0; v < vectors; v++) {
        ivec key = lane + (int)v * LANES, sees = (key >= first) & (key <= last);
        for (long u = v; u < seen; u += vectors) {
            vec weight = (vec)(sees & (ivec)exp2_of(load(scores + u * LANES) * scale - *top));
            total += weight;
            store(scores + u * LANES, weight);
        }
    }
    return sum_of(total);
}

/* queries (heads * group, N, D), keys and values (heads, N, ..), out (heads * group, N, E), lse (heads * group, N).
 * Only the tokens offset + z steps[0] + y steps[1] + x steps[2] take part. windows: firsts of z, lasts of z, firsts of
 * y, ..; lengths: of the axes. tile: queries of a tile, at most ROWS; vectors: that hold the keys of any tile. */
int GRID(const float *queries, const float *keys, const float *values, float *out, float *lse, long heads, long group,
         long N, long D, long E, const int64_t *lengths, long offset, const int64_t *steps, const int64_t *windows,
         long tile, long vectors, float scale, int threads) {
    Axis z_axis = {windows, windows + lengths[0]};
    Axis y_axis = {z_axis.last + lengths[0], z_axis.last + lengths[0] + lengths[1]};
    Axis x_axis = {y_axis.last + lengths[1], y_axis.last + lengths[1] + lengths[2]};
    long deep_z = DEEP_Z, deep_y = lengths[0] == 1 ? FLAT_Y : DEEP_Y;
    long cuts_z = (lengths[0] + deep_z - 1) / deep_z, cuts_y = (lengths[1] + deep_y - 1) / deep_y;
    long most_z = widest(&z_axis, lengths[0], deep_z), most_y = widest(&y_axis, lengths[1], deep_y);
    long stretch = vectors * LANES, panel = stretch * D, width = most_z * most_y * stretch;
    long some = CACHED / (stretch * D) ? CACHED / (stretch * D) : 1;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *panels = room(most_z * most_y * (panel + stretch * E) + HIGH * ROWS * (width + E));
        float *lines = panels + most_z * most_y * panel, *scores = lines + most_z * most_y * stretch * E;
        float *sums = scores + HIGH * ROWS * width;
        if (!panels) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < heads * cuts_z * cuts_y; task++) {
            if (!panels) continue;
            long head = task / (cuts_z * cuts_y);
            long z_from = task / cuts_y % cuts_z * deep_z, y_from = task % cuts_y * deep_y;
            long z_to = z_from + deep_z < lengths[0] ? z_from + deep_z : lengths[0];
            long y_to = y_from + deep_y < lengths[1] ? y_from + deep_y : lengths[1];
            long z_low, z_high, y_low, y_high, x_low, x_high;
            reach(&z_axis, z_from, z_to, &z_low, &z_high);
            reach(&y_axis, y_from, y_to, &y_low, &y_high);
            long rows = y_high - y_low + 1;
            for (long x = 0; x < lengths[2]; x += tile) {
                int count = lengths[2] - x < tile ? (int)(lengths[2] - x) : (int)tile;
                reach(&x_axis, x, x + count, &x_low, &x_high);
                /* whole vectors of keys, as far as there are as many */
                if (x_low + stretch > lengths[2]) x_low = lengths[2] > stretch ? lengths[2] - stretch : 0;
                long keys_here = lengths[2] - x_low < stretch ? lengths[2] - x_low : stretch;
                long next = x_low + keys_here < lengths[2] ? x_low + keys_here : x_low;
                for (long z = z_low; z <= z_high; z++)
                    for (long y = y_low; y <= y_high; y++) {
                        long row = head * N + offset + z * steps[0] + y * steps[1];
                        const float *key = keys + (row + x_low * steps[2]) * D;
                        const float *value = values + (row + x_low * steps[2]) * E;
                        float *line = lines + ((z - z_low) * rows + y - y_low) * stretch * E;
                        fill(panels + ((z - z_low) * rows + y - y_low) * panel, key, steps[2] * D, keys_here, vectors, D);
                        for (long i = 0; i < keys_here; i++)
                            memcpy(line + i * E, value + i * steps[2] * E, E * sizeof(float));
                        announce(keys + (row + next * steps[2]) * D, tile * D);
                        announce(values + (row + next * steps[2]) * E, tile * E);
                    }
                for (long g = head * group; g < (head + 1) * group; g++)
                    for (long z = z_from; z < z_to; z++)
                        for (long y = y_from; y < y_to; y += HIGH) {
                            long z_first = z_axis.first[z], planes = z_axis.last[z] - z_first + 1, first, last;
                            int high = y_to - y < HIGH ? (int)(y_to - y) : HIGH;
                            long token = g * N + offset + z * steps[0] + y * steps[1] + x * steps[2];
                            reach(&y_axis, y, y + high, &first, &last);
                            for (int h = 0; h < high; h++) {
                                long from = token + h * steps[1];
                                announce(queries + (from + tile * steps[2]) * D, tile * D);
                                announce(out + (from + tile * steps[2]) * E, tile * E);
                            }
                            /* some rows of keys at a time, which stay in the first cache, for all rows of queries */
                            for (long p = 0; p < planes; p++)
                                for (long c = first; c <= last; c += some)
                                    for (int h = 0; h < high; h++) {
                                        long a, b;
                                        if (!part(&y_axis, y + h, c, some, &a, &b)) continue;
                                        float *here = scores + h * ROWS * width +
                                                      (p * (y_axis.last[y + h] - y_axis.first[y + h] + 1) + a -
                                                       y_axis.first[y + h]) * stretch;
                                        multiply(PUT, count, (b - a + 1) * vectors, queries + (token + h * steps[1]) * D,
                                                 panels + ((z_first + p - z_low) * rows + a - y_low) * panel,
                                                 (Layout){steps[2] * D, LANES, LANES * D, D, 1, 0, 0},
                                                 here, width);
                                    }
                            float share[HIGH][ROWS];
                            for (int h = 0; h < high; h++)
                                for (int r = 0; r < count; r++) {
                                    long seen = planes * (y_axis.last[y + h] - y_axis.first[y + h] + 1) * vectors;
                                    float top, whole = soften(scores + (h * ROWS + r) * width, seen, vectors,
                                                              (int)x_axis.first[x + r], (int)x_axis.last[x + r],
                                                              (int)x_low, scale, &top);
                                    lse[token + h * steps[1] + r * steps[2]] = (top + log2f(whole)) * LN2;
                                    share[h][r] = 1 / whole;
                                }
                            memset(sums, 0, HIGH * ROWS * E * sizeof(float));
                            for (long p = 0; p < planes; p++)
                                for (long c = first; c <= last; c += some)
                                    for (int h = 0; h < high; h++) {
                                        long a, b;
                                        if (!part(&y_axis, y + h, c, some, &a, &b)) continue;
                                        float *here = scores + h * ROWS * width +
                                                      (p * (y_axis.last[y + h] - y_axis.first[y + h] + 1) + a -
                                                       y_axis.first[y + h]) * stretch;
                                        Layout at = {width, E, LANES, keys_here, b - a + 1, stretch, stretch * E};
                                        multiply(ADD, count, E / LANES, here,
                                                 lines + ((z_first + p - z_low) * rows + a - y_low) * stretch * E, at,
                                                 sums + h * ROWS * E, E);
                                    }
                            for (int h = 0; h < high; h++)
                                for (int r = 0; r < count; r++) {
                                    float *to = out + (token + h * steps[1] + r * steps[2]) * E;
                                    for (long e = 0; e < E; e++) to[e] = sums[(h * ROWS + r) * E + e] * share[h][r];
                                }
                        }
            }
        }
        free(panels);
    }
    return failed;
}
