/* Softmax attention of neighbourhoods on a grid (Z, Y, X): every query sees a window of each axis. Float32, forward.
 *
 *     out = softmax(scale q k^T + bias) v,  lse = log sum exp(..)           bias: by relative position, or none
 *
 * Keys lie in panels, transposed, and values beside them, a ring of either for each row of keys (grid.h): rows of a grid
 * lie at distances that caches do not like. The scores of a tile stay in the first cache, so that softmax needs no
 * second pass over keys.
 */

#include "grid.h"

/* grid8.c compiles this for narrow vectors: small windows waste fewer of their lanes */
#ifndef GRID
#define GRID saccade_grid
#endif

/* Queries of a product, where rows of queries see nearly the same rows of keys: each vector of keys that is loaded
 * serves them all, and their sums are enough to hide how long an addition takes. */
#define FOLDED 4

/* Rows of queries that go through the rows of keys low..high together, which are those that any of them sees. */
typedef struct {
    long rows, low, high;
} Fold;

/* The next of `left` rows of queries from y on, of `count` queries each: as many as see nearly the same. */
static Fold fold(const Axis *axis, long y, long left, int count) {
    Fold f = {1, axis->first[y], axis->last[y]};
    for (long seen = width_of(axis, y); f.rows < left && (f.rows + 1) * count <= FOLDED; f.rows++) {
        long low, high;
        reach(axis, y, y + f.rows + 1, &low, &high);
        seen += width_of(axis, y + f.rows);
        if (4 * (f.rows + 1) * (high - low + 1) > 5 * seen) break;
        f.low = low;
        f.high = high;
    }
    return f;
}

/* The part a..b of `some` keys from c on that these rows of queries see; whether there is one. */
INLINE int shared(const Fold *f, long c, long some, long *a, long *b) {
    *a = c > f->low ? c : f->low;
    *b = least_of(c + some - 1, f->high);
    return *a <= *b;
}

/* Whole vectors of zeros. */
INLINE void clear(float *to, long floats) {
    for (long i = 0; i < floats; i += LANES) store(to + i, (vec){});
}

/* Softmax of `planes` x `rows` x `vectors` vectors of scores, planes `jump` floats from each other; weights are left
 * undivided. Returns their sum; top: what was taken off the scores. */
INLINE float soften(float *scores, long planes, long jump, long rows, long vectors, const float *bias, long plane,
                    long row, float *top) {
    const vec nothing = splat(-INFINITY);
    vec high = nothing, total = {};
    for (long p = 0; p < planes; p++) {
        float *s = scores + p * jump;
        for (long j = 0; j < rows; j++)
            for (long v = 0; v < vectors; v++, s += LANES) {
                vec add = load(bias + p * plane + j * row + v * LANES);
                vec score = choose(add > nothing, load(s) + add, nothing);
                store(s, score);
                high = larger(score, high);
            }
    }
    *top = top_of(high);
    float off = *top == -INFINITY ? 0.0f : *top; /* a table may hide all that a query sees */
    for (long p = 0; p < planes; p++) {
        float *s = scores + p * jump;
        for (long i = 0; i < rows * vectors; i++, s += LANES) {
            vec weight = exp2_of(load(s) - off);
            total += weight;
            store(s, weight);
        }
    }
    return sum_of(total);
}

/* The keys and values from `begin` on of a row into its ring; those that come next are asked for. */
static void bring(const Space *s, const Ring *ring, long begin, const float *keys, const float *values, long D, long E,
                  float *panels, float *lines) {
    const long step = s->x.step;
    for (long key = begin, number; key < ring->high; key += number) {
        long lane = lane_of(s, ring, key);
        number = least_of(s->stretch - lane, ring->high - key);
        enter(panels, lane, keys + key * step * D, step * D, number, D);
        for (long i = 0; i < number; i++)
            memcpy(lines + (lane + i) * E, values + (key + i) * step * E, E * sizeof(float));
    }
    for (long next = ring->high; next < least_of(ring->high + s->tile, s->x.length); next++) {
        announce(keys + next * step * D, D);
        announce(values + next * step * E, E);
    }
}

/* queries (heads * group, N, D), keys and values (heads, N, ..), out (heads * group, N, E), lse (heads * group, N).
 * Only the tokens offset + z steps[0] + y steps[1] + x steps[2] take part. windows: firsts of z, lasts of z, firsts of
 * y, ..; lengths: of the axes. tile: queries of a tile, at most ROWS; vectors: that hold the keys of any tile. table
 * (heads * group, entries of z, y, x): what is added by relative position, in powers of 2 as scale is, or null. */
int GRID(const float *queries, const float *keys, const float *values, float *out, float *lse, long heads, long group,
         long N, long D, long E, const int64_t *lengths, long offset, const int64_t *steps, const int64_t *windows,
         long tile, long vectors, const float *table, const int64_t *entries, float scale, int threads) {
    const Space s = survey(lengths, steps, windows, offset, tile, vectors, D + E);
    const Bias bias = {table, entries[0], entries[1], entries[2]};
    const long stretch = s.stretch, panel = stretch * D, line = stretch * E;
    const long most = s.z.most * s.y.most, width = most * stretch, spreads = ROWS * bias.z * bias.y * stretch;
    const long some = passed(&s.y, panel), some_lines = passed(&s.y, line);
    /* small tasks, so that no thread waits long for another; what a task begins with is worth eight tiles */
    const long boxes = heads * s.z.cuts * s.y.cuts, tiles = (s.x.length + tile - 1) / tile;
    const long wanted = (8 * threads + boxes - 1) / boxes, room_for = tiles / 8 ? tiles / 8 : 1;
    const long parts = least_of(wanted, room_for), wide = (tiles + parts - 1) / parts * tile;
    const long floats = most * (panel + line) + spreads + HIGH * ROWS * (width + E + D) + s.z.most;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *panels = room(floats);
        float *lines = panels + most * panel, *added = lines + most * line, *scores = added + spreads;
        float *sums = scores + HIGH * ROWS * width, *asked = sums + HIGH * ROWS * E; /* queries, multiplied by scale */
        int32_t *brought = (int32_t *)(asked + HIGH * ROWS * D); /* rows of keys of each plane that stand ready */
        if (!panels) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (long task = 0; task < boxes * parts; task++) {
            if (!panels) continue;
            long head = task / parts / s.z.cuts / s.y.cuts;
            long z_from = task / parts / s.y.cuts % s.z.cuts * s.z.deep, y_from = task / parts % s.y.cuts * s.y.deep;
            long z_to = least_of(z_from + s.z.deep, s.z.length), y_to = least_of(y_from + s.y.deep, s.y.length);
            long x_from = task % parts * wide, x_to = least_of(x_from + wide, s.x.length);
            if (x_from >= x_to) continue;
            long z_low, z_high, y_low, y_high;
            reach(&s.z, z_from, z_to, &z_low, &z_high);
            reach(&s.y, y_from, y_to, &y_low, &y_high);
            long rows = y_high - y_low + 1;
            /* lanes in the order of keys for the tiles in the middle */
            long middle = first_key(&s, x_from + (x_to - x_from) / tile / 2 * tile, 1) % stretch;
            Ring ring = {0, 0, stretch - middle};
            if (s.x.length < stretch) memset(panels, 0, most * (panel + line) * sizeof(float));
            for (long x = x_from; x < x_to; x += tile) {
                int count = (int)least_of(tile, x_to - x);
                long low = first_key(&s, x, count), high = least_of(low + stretch, s.x.length);
                long begin = low > ring.high ? low : ring.high;
                for (long z = z_low; z <= z_high; z++) brought[z - z_low] = y_low;
                ring.low = low;
                ring.high = high;
                for (long g = head * group; g < (head + 1) * group; g++) {
                    if (table || g == head * group) spread(&s, &bias, g, &ring, x, count, added);
                    for (long z = z_from; z < z_to; z++)
                        for (long y = y_from, some_rows; y < y_to; y += some_rows) {
                            some_rows = next_part(y_to - y, HIGH);
                            long planes = width_of(&s.z, z), first, last, a, b;
                            long token = g * N + offset + z * s.z.step + y * s.y.step + x * s.x.step;
                            reach(&s.y, y, y + some_rows, &first, &last);
                            Fold folds[HIGH];
                            for (long h = 0; h < some_rows; h += folds[h].rows)
                                folds[h] = fold(&s.y, y + h, some_rows - h, count);
                            /* from these queries to the ones after them */
                            long next = y + some_rows < y_to ? some_rows * s.y.step
                                                             : tile * s.x.step - (y - y_from) * s.y.step;
                            for (long h = 0; h < some_rows; h++)
                                for (int r = 0; r < count; r++) {
                                    const float *from = queries + (token + h * s.y.step + r * s.x.step) * D;
                                    for (long d = 0; d < D; d++) asked[(h * count + r) * D + d] = from[d] * scale;
                                    announce(from + next * D, D);
                                    announce(out + (token + h * s.y.step + r * s.x.step) * E, E);
                                }
                            /* rows of keys that no query has needed yet, just before they are used */
                            for (long p = s.z.first[z]; p <= s.z.last[z]; p++)
                                for (; brought[p - z_low] <= last; brought[p - z_low]++) {
                                    long row = head * N + offset + p * s.z.step + brought[p - z_low] * s.y.step;
                                    long place = (p - z_low) * rows + brought[p - z_low] - y_low;
                                    bring(&s, &ring, begin, keys + row * D, values + row * E, D, E,
                                          panels + place * panel, lines + place * line);
                                }
                            /* some rows of keys at a time, which stay in the first cache, for all rows of queries */
                            for (long p = 0; p < planes; p++)
                                for (long c = first; c <= last; c += some)
                                    for (long h = 0; h < some_rows; h += folds[h].rows) {
                                        const Fold *f = folds + h;
                                        if (!shared(f, c, some, &a, &b)) continue;
                                        long place = (s.z.first[z] + p - z_low) * rows + a - y_low;
                                        long at = (p * (f->high - f->low + 1) + a - f->low) * stretch;
                                        multiply(PUT, (int)f->rows * count, (b - a + 1) * vectors,
                                                 asked + h * count * D, panels + place * panel,
                                                 (Layout){D, LANES, LANES * D, D, 1, 0, 0},
                                                 scores + h * count * width + at, width);
                                    }
                            float share[HIGH * ROWS];
                            long i = 0; /* queries so far */
                            for (long h = 0; h < some_rows; h += folds[h].rows)
                                for (long at = y + h; at < y + h + folds[h].rows; at++) {
                                    const long low = folds[h].low, seen = width_of(&s.y, at) * stretch;
                                    const long before = (s.y.first[at] - low) * stretch;
                                    const long jump = (folds[h].high - low + 1) * stretch;
                                    for (int r = 0; r < count; r++, i++) {
                                        long plane, row;
                                        const float *from = entry(&s, &bias, added, r, z, at, &plane, &row);
                                        float top, *weights = scores + i * width;
                                        float whole = soften(weights + before, planes, jump, seen / stretch, vectors,
                                                             from, plane, row, &top);
                                        /* rows of keys that only others see */
                                        for (long p = 0; p < planes; p++) {
                                            clear(weights + p * jump, before);
                                            clear(weights + p * jump + before + seen, jump - before - seen);
                                        }
                                        lse[token + (at - y) * s.y.step + r * s.x.step] = (top + log2f(whole)) * LN2;
                                        share[i] = whole == 0.0f ? 0.0f : 1 / whole;
                                    }
                                }
                            for (long p = 0; p < planes; p++)
                                for (long c = first; c <= last; c += some_lines)
                                    for (long h = 0; h < some_rows; h += folds[h].rows) {
                                        const Fold *f = folds + h;
                                        if (!shared(f, c, some_lines, &a, &b)) continue;
                                        long place = (s.z.first[z] + p - z_low) * rows + a - y_low;
                                        long at = (p * (f->high - f->low + 1) + a - f->low) * stretch;
                                        multiply(p == 0 && a == f->low ? PUT : ADD, (int)f->rows * count, E / LANES,
                                                 scores + h * count * width + at, lines + place * line,
                                                 (Layout){width, E, LANES, stretch, b - a + 1, stretch, line},
                                                 sums + h * count * E, E);
                                    }
                            for (long h = 0; h < some_rows; h++)
                                for (int r = 0; r < count; r++) {
                                    float *to = out + (token + h * s.y.step + r * s.x.step) * E;
                                    const float *from = sums + (h * count + r) * E;
                                    for (long e = 0; e < E; e += LANES)
                                        store(to + e, load(from + e) * share[h * count + r]);
                                }
                        }
                }
            }
        }
        free(panels);
    }
    return failed;
}
