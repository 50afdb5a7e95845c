/* The backward pass of grid.c. Float32; D and E are multiples of LANES here.
 *
 *     p = exp(scale q k^T + bias - lse),  ds = p * (d out v^T - delta),  delta = rowsum(d out * out) - d lse
 *     dq = scale ds k,  dk = scale ds^T q,  dv = p^T d out,  d bias = the sum of ds over pairs of one relative position
 *
 * Scores are made again. The gradients of keys and values are summed where the keys stand, in the ring (grid.h), and
 * added to those of other tasks when a key leaves it. Tasks that share keys do not run at the same time: every second or
 * third along an axis does, so no two threads write to one place, and sums are made in one order.
 */

#include "grid.h"

#ifndef GRID_GRADIENTS
#define GRID_GRADIENTS saccade_grid_gradients
#define GRID_TASKS saccade_grid_tasks
#endif

/* queries that go through the rows of keys together */
#define TOGETHER 16

/* keys of a product whose first factor is turned: as many lanes as any vector has */
#define TURNED 4

/* c (TURNED, width vectors) += turned weights times rows: weights[h * jump + r * step + key], rows[h * jump_x + r * step_x
 * + v * LANES], summed over h < outer and r < depth. */
INLINE void turned_of(const int width, const float *weights, long jump, long step, const float *x, long jump_x,
                      long step_x, long outer, long depth, float *c, long step_c) {
    vec sums[TURNED][WIDE];
    UNROLL for (int i = 0; i < TURNED; i++)
        UNROLL for (int v = 0; v < width; v++) sums[i][v] = load(c + i * step_c + v * LANES);
    for (long h = 0; h < outer; h++, weights += jump, x += jump_x)
        for (long r = 0; r < depth; r++) {
            vec row[WIDE];
            UNROLL for (int v = 0; v < width; v++) {
                row[v] = load(x + r * step_x + v * LANES);
                HOLD(row[v]);
            }
            UNROLL for (int i = 0; i < TURNED; i++) {
                vec weight = splat(weights[r * step + i]);
                UNROLL for (int v = 0; v < width; v++) sums[i][v] += weight * row[v];
            }
        }
    UNROLL for (int i = 0; i < TURNED; i++)
        UNROLL for (int v = 0; v < width; v++) store(c + i * step_c + v * LANES, sums[i][v]);
}

/* sums (keys, X) += what `turned_of` says, for all keys and vectors. */
static void gather(const float *weights, long jump, long step, const float *x, long jump_x, long step_x, long outer,
                   long depth, long keys, long X, float *sums) {
    const long most = least_of((REGISTERS - 1) / (TURNED + 1), WIDE);
    for (long i = 0; i < keys; i += TURNED)
        for (long v = 0, width; v < X / LANES; v += width) {
            width = next_part(X / LANES - v, most);
            const float *w = weights + i, *from = x + v * LANES;
            float *to = sums + i * X + v * LANES;
            if (width == 1) turned_of(1, w, jump, step, from, jump_x, step_x, outer, depth, to, X);
            if (width == 2) turned_of(2, w, jump, step, from, jump_x, step_x, outer, depth, to, X);
            if (width == 3) turned_of(3, w, jump, step, from, jump_x, step_x, outer, depth, to, X);
            if (width == 4) turned_of(4, w, jump, step, from, jump_x, step_x, outer, depth, to, X);
        }
}

/* Add scale * from to `to`, and leave zeros. */
INLINE void deliver(float *from, float *to, long floats, float scale) {
    for (long i = 0; i < floats; i += LANES) {
        store(to + i, load(to + i) + load(from + i) * scale);
        store(from + i, (vec){});
    }
}

/* Of how many tasks along an axis one may run at a time, so that no two share keys. */
static long apart(const Axis *axis) {
    long low, high, other_low, other_high, count = 1;
    for (long i = 0; i < axis->cuts; i++)
        for (long j = i + count; j < axis->cuts; j++) {
            reach(axis, i * axis->deep, least_of((i + 1) * axis->deep, axis->length), &low, &high);
            reach(axis, j * axis->deep, least_of((j + 1) * axis->deep, axis->length), &other_low, &other_high);
            if (other_low > high) break;
            count = j - i + 1;
        }
    return count;
}

/* Most keys that `some` queries in a row see of an axis. */
static long widest(const Axis *axis, long some) {
    long most = 0, low, high;
    for (long i = 0; i < axis->length; i++) {
        reach(axis, i, least_of(i + some, axis->length), &low, &high);
        most = high - low + 1 > most ? high - low + 1 : most;
    }
    return most;
}

/* Tasks of a head. */
int GRID_TASKS(const int64_t *lengths, const int64_t *steps, const int64_t *windows, long tile, long vectors, long D,
               long E) {
    const Space s = survey(lengths, steps, windows, 0, tile, vectors, 3 * D + 2 * E);
    return (int)(s.z.cuts * s.y.cuts);
}

/* As in grid.c; grads and grad_lse (or null): of out and lse. grad_queries is written; grad_keys, grad_values and
 * grad_table (heads * group, tasks of a head, entries of z, y, x; or null) are added to. scale: not in powers of 2, but
 * table is. */
int GRID_GRADIENTS(const float *queries, const float *keys, const float *values, const float *out, const float *lse,
                   const float *grads, const float *grad_lse, float *grad_queries, float *grad_keys, float *grad_values,
                   float *grad_table, long heads, long group, long N, long D, long E, const int64_t *lengths,
                   long offset, const int64_t *steps, const int64_t *windows, long tile, long vectors,
                   const float *table, const int64_t *entries, float scale, int threads) {
    const Space s = survey(lengths, steps, windows, offset, tile, vectors, 3 * D + 2 * E);
    const Bias bias = {table, entries[0], entries[1], entries[2]};
    const long stretch = s.stretch, key_line = stretch * D, value_line = stretch * E;
    const long together = least_of(TOGETHER / tile, HIGH), most = s.z.most * s.y.most;
    const long width = widest(&s.z, 1) * widest(&s.y, together) * stretch, kinds = bias.z * bias.y;
    const long spreads = ROWS * kinds * stretch, longest = D > E ? D : E;
    const long some_keys = passed(&s.y, key_line), some_values = passed(&s.y, value_line);
    const long apart_z = apart(&s.z), apart_y = apart(&s.y);
    const long floats = most * (3 * key_line + 2 * value_line) + 2 * spreads + HIGH * ROWS * (2 * width + longest);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *panels = room(floats);
        float *value_panels = panels + most * key_line, *lines = value_panels + most * value_line;
        float *dk = lines + most * key_line, *dv = dk + most * key_line, *added = dv + most * value_line;
        float *of_added = added + spreads, *p = of_added + spreads, *ds = p + HIGH * ROWS * width;
        float *dq = ds + HIGH * ROWS * width;
        if (!panels) {
#pragma omp atomic write
            failed = 1;
        } else
            memset(panels, 0, floats * sizeof(float));
        for (long turn = 0; turn < apart_z * apart_y; turn++) {
            long turn_z = turn / apart_y, turn_y = turn % apart_y;
            long number_z = (s.z.cuts - turn_z + apart_z - 1) / apart_z;
            long number_y = (s.y.cuts - turn_y + apart_y - 1) / apart_y;
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < heads * number_z * number_y; task++) {
                if (!panels) continue;
                long head = task / number_z / number_y;
                long cut_z = task / number_y % number_z * apart_z + turn_z;
                long cut_y = task % number_y * apart_y + turn_y;
                long z_from = cut_z * s.z.deep, z_to = least_of(z_from + s.z.deep, s.z.length);
                long y_from = cut_y * s.y.deep, y_to = least_of(y_from + s.y.deep, s.y.length);
                long z_low, z_high, y_low, y_high;
                reach(&s.z, z_from, z_to, &z_low, &z_high);
                reach(&s.y, y_from, y_to, &y_low, &y_high);
                long rows = y_high - y_low + 1;
                long middle = first_key(&s, s.x.length / tile / 2 * tile % s.x.length, 1) % stretch;
                Ring ring = {0, 0, stretch - middle};
                if (s.x.length < stretch) memset(panels, 0, most * (2 * key_line + value_line) * sizeof(float));
                for (long x = 0; x < s.x.length + tile; x += tile) {
                    /* beyond the last tile, all keys leave */
                    int count = (int)least_of(tile, s.x.length - x);
                    long low = count > 0 ? first_key(&s, x, count) : ring.high;
                    long high = count > 0 ? least_of(low + stretch, s.x.length) : ring.high;
                    long begin = low > ring.high ? low : ring.high, end = least_of(low, ring.high);
                    for (long z = z_low; z <= z_high; z++)
                        for (long y = y_low; y <= y_high; y++) {
                            long token = head * N + offset + z * s.z.step + y * s.y.step;
                            long place = (z - z_low) * rows + y - y_low;
                            for (long key = ring.low; key < end; key++) {
                                long lane = lane_of(&s, &ring, key), at = token + key * s.x.step;
                                deliver(dk + place * key_line + lane * D, grad_keys + at * D, D, scale);
                                deliver(dv + place * value_line + lane * E, grad_values + at * E, E, 1.0f);
                            }
                            for (long key = begin, number; key < high; key += number) {
                                long lane = lane_of(&s, &ring, key), at = token + key * s.x.step;
                                number = least_of(stretch - lane, high - key);
                                enter(panels + place * key_line, lane, keys + at * D, s.x.step * D, number, D);
                                enter(value_panels + place * value_line, lane, values + at * E, s.x.step * E, number, E);
                                for (long i = 0; i < number; i++)
                                    memcpy(lines + place * key_line + (lane + i) * D, keys + (at + i * s.x.step) * D,
                                           D * sizeof(float));
                            }
                        }
                    ring.low = low;
                    ring.high = high;
                    for (long g = head * group; count > 0 && g < (head + 1) * group; g++) {
                        if (table || g == head * group) spread(&s, &bias, g, &ring, x, count, added);
                        if (table) memset(of_added, 0, spreads * sizeof(float));
                        for (long z = z_from; z < z_to; z++)
                            for (long y = y_from, some_rows; y < y_to; y += some_rows) {
                                some_rows = next_part(y_to - y, together);
                                long planes = width_of(&s.z, z), first, last, a, b;
                                long token = g * N + offset + z * s.z.step + y * s.y.step + x * s.x.step;
                                long down = s.y.step, across = s.x.step;
                                reach(&s.y, y, y + some_rows, &first, &last);
                                long seen = last - first + 1;
                                for (long u = 0; u < planes; u++) {
                                    long plane = (s.z.first[z] + u - z_low) * rows - y_low;
                                    for (long c = first; c <= last; c += some_keys)
                                        for (long h = 0; h < some_rows; h++)
                                            if (part(&s.y, y + h, c, some_keys, &a, &b))
                                                multiply(PUT, count, (b - a + 1) * vectors,
                                                         queries + (token + h * down) * D,
                                                         panels + (plane + a) * key_line,
                                                         (Layout){across * D, LANES, LANES * D, D, 1, 0, 0},
                                                         p + h * ROWS * width + (u * seen + a - first) * stretch, width);
                                    for (long c = first; c <= last; c += some_values)
                                        for (long h = 0; h < some_rows; h++)
                                            if (part(&s.y, y + h, c, some_values, &a, &b))
                                                multiply(PUT, count, (b - a + 1) * vectors,
                                                         grads + (token + h * down) * E,
                                                         value_panels + (plane + a) * value_line,
                                                         (Layout){across * E, LANES, LANES * E, E, 1, 0, 0},
                                                         ds + h * ROWS * width + (u * seen + a - first) * stretch, width);
                                }
                                for (long h = 0; h < some_rows; h++)
                                    for (int r = 0; r < count; r++) {
                                        long row = token + h * down + r * across, step_plane, step_row;
                                        const float *from = entry(&s, &bias, added, r, z, y + h, &step_plane, &step_row);
                                        vec product = {};
                                        for (long e = 0; e < E; e += LANES)
                                            product += load(grads + row * E + e) * load(out + row * E + e);
                                        float delta = sum_of(product) - (grad_lse ? grad_lse[row] : 0.0f);
                                        /* rows that attend to nothing weigh nothing */
                                        float off = lse[row] == -INFINITY ? INFINITY : lse[row] / LN2;
                                        for (long u = 0; u < planes; u++)
                                            for (long j = 0; j < width_of(&s.y, y + h); j++) {
                                                long at = (h * ROWS + r) * width +
                                                          (u * seen + s.y.first[y + h] + j - first) * stretch;
                                                const float *add_from = from + u * step_plane + j * step_row;
                                                float *of_from = of_added + (add_from - added);
                                                for (long v = 0; v < stretch; v += LANES) {
                                                    vec add = load(add_from + v);
                                                    vec score = load(p + at + v) * (scale / LN2) + add - off;
                                                    vec weight = (vec)((add > -INFINITY) & (ivec)exp2_of(score));
                                                    vec slope = weight * (load(ds + at + v) - delta);
                                                    /* also where 0 meets what is not a number */
                                                    slope = (vec)((weight != 0.0f) & (ivec)slope);
                                                    store(p + at + v, weight);
                                                    store(ds + at + v, slope);
                                                    if (table) store(of_from + v, load(of_from + v) + slope);
                                                }
                                            }
                                    }
                                memset(dq, 0, HIGH * ROWS * D * sizeof(float));
                                for (long u = 0; u < planes; u++) {
                                    long plane = (s.z.first[z] + u - z_low) * rows - y_low;
                                    for (long c = first; c <= last; c += some_keys)
                                        for (long h = 0; h < some_rows; h++)
                                            if (part(&s.y, y + h, c, some_keys, &a, &b))
                                                multiply(ADD, count, D / LANES,
                                                         ds + h * ROWS * width + (u * seen + a - first) * stretch,
                                                         lines + (plane + a) * key_line,
                                                         (Layout){width, D, LANES, stretch, b - a + 1, stretch, key_line},
                                                         dq + h * ROWS * D, D);
                                    for (long key = first; key <= last; key++) {
                                        long from = 0, to = some_rows;
                                        while (s.y.last[y + from] < key) from++;
                                        while (s.y.first[y + to - 1] > key) to--;
                                        if (from >= to) continue;
                                        long at = from * ROWS * width + (u * seen + key - first) * stretch;
                                        long row = token + from * down;
                                        gather(ds + at, ROWS * width, width, queries + row * D, down * D, across * D,
                                               to - from, count, stretch, D, dk + (plane + key) * key_line);
                                        gather(p + at, ROWS * width, width, grads + row * E, down * E, across * E,
                                               to - from, count, stretch, E, dv + (plane + key) * value_line);
                                    }
                                }
                                for (long h = 0; h < some_rows; h++)
                                    for (int r = 0; r < count; r++) {
                                        float *to = grad_queries + (token + h * down + r * across) * D;
                                        for (long d = 0; d < D; d++) to[d] = dq[(h * ROWS + r) * D + d] * scale;
                                    }
                            }
                        if (!grad_table) continue;
                        float *to = grad_table + ((g * s.z.cuts + cut_z) * s.y.cuts + cut_y) * kinds * bias.x;
                        for (int r = 0; r < count; r++)
                            for (long key = s.x.first[x + r]; key <= s.x.last[x + r]; key++) {
                                const float *from = of_added + r * kinds * stretch + lane_of(&s, &ring, key);
                                for (long i = 0; i < kinds; i++)
                                    to[i * bias.x + key - (x + r) + bias.x / 2] += from[i * stretch];
                            }
                    }
                }
            }
        }
        free(panels);
    }
    return failed;
}
