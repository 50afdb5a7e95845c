/* What grid.c and grid_gradients.c share: windows on three axes, and the keys that tiles of queries see.
 *
 * A tile is a few queries side by side along x. The keys that they see are the same stretch of x in each of the rows
 * (z, y) of their window. From tile to tile that stretch moves on by a few keys, so each row of keys is held as a ring:
 * key x stands in the lane that is its rest by the length of the ring, and only keys that were not seen before are
 * brought in. What a query adds to the score of each lane (a bias by relative position, -inf where it does not see the
 * key that stands there) is worked out once for a tile and used by all rows of queries.
 *
 * Letters as in attend.c.
 */

#ifndef SACCADE_GRID_H
#define SACCADE_GRID_H

#include "vectors.h"

/* rows of queries that go through the rows of keys together */
#define HIGH 8

/* floats of keys that these rows go through at a time, to stay in the first cache; bytes of a task's keys, for the
 * second */
#define CACHED 4096
#define HELD (320L << 10)

typedef struct {
    const int64_t *first, *last; /* window of each position, inclusive */
    long length, step;           /* positions, and tokens from one to the next */
    long deep, cuts, most;       /* queries of a task, tasks, and keys that a task sees at most */
} Axis;

/* A grid, and how it is cut: tasks are boxes of queries in z and y, all of x or a part of it. */
typedef struct {
    Axis z, y, x;
    long offset, tile, vectors, stretch; /* first token; queries of a tile; vectors and lanes that hold its keys */
} Space;

/* What is added to scores: entries by relative position on each axis, of each head; or 0 where there is no table. */
typedef struct {
    const float *table;
    long z, y, x;
} Bias;

/* Keys of a row: those that stand in lanes now, and which lane key 0 would stand in. */
typedef struct {
    long low, high, phase;
} Ring;

/* First and last key that the queries [from, to) of an axis see. */
static inline void reach(const Axis *axis, long from, long to, long *low, long *high) {
    *low = axis->first[from];
    *high = axis->last[from];
    for (long i = from + 1; i < to; i++) {
        *low = axis->first[i] < *low ? axis->first[i] : *low;
        *high = axis->last[i] > *high ? axis->last[i] : *high;
    }
}

INLINE long least_of(long a, long b) { return a < b ? a : b; }

/* Cut an axis into tasks of `deep` queries. */
static void cut(Axis *axis, long deep) {
    long low, high;
    axis->deep = deep < axis->length ? deep : axis->length;
    axis->cuts = (axis->length + axis->deep - 1) / axis->deep;
    axis->most = 0;
    for (long i = 0; i < axis->length; i += axis->deep) {
        reach(axis, i, least_of(i + axis->deep, axis->length), &low, &high);
        axis->most = high - low + 1 > axis->most ? high - low + 1 : axis->most;
    }
}

/* windows: firsts of z, lasts of z, firsts of y, ..; floats: that are held for a key. Tasks are as deep as the second
 * cache allows: the deeper, the fewer keys are brought in for a row of queries. */
static Space survey(const int64_t *lengths, const int64_t *steps, const int64_t *windows, long offset, long tile,
                    long vectors, long floats) {
    Space s = {.offset = offset, .tile = tile, .vectors = vectors, .stretch = vectors * LANES};
    Axis *axes[3] = {&s.z, &s.y, &s.x};
    for (int a = 0; a < 3; windows += 2 * lengths[a++])
        *axes[a] = (Axis){windows, windows + lengths[a], lengths[a], steps[a], 0, 0, 0};
    cut(&s.x, s.x.length);
    double best = INFINITY;
    long deep_z = 1, deep_y = 1;
    for (long z = 1; z <= 8; z *= 2)
        for (long y = 2; y <= 32; y *= 2) {
            if ((z > 1 && z > s.z.length) || (y > 2 && y / 2 >= s.y.length)) continue;
            cut(&s.z, z);
            cut(&s.y, y);
            double rows = (double)s.z.most * s.y.most, cost = rows / (s.z.deep * s.y.deep);
            double bytes = rows * s.stretch * floats * sizeof(float);
            if (bytes > HELD) cost *= bytes / HELD; /* all too large: the smallest */
            if (cost < best) best = cost, deep_z = z, deep_y = y;
        }
    cut(&s.z, deep_z);
    cut(&s.y, deep_y);
    return s;
}

/* The part a..b of `some` keys from c on that a query of an axis sees; whether there is one. */
INLINE int part(const Axis *axis, long query, long c, long some, long *a, long *b) {
    *a = c > axis->first[query] ? c : axis->first[query];
    *b = c + some - 1 < axis->last[query] ? c + some - 1 : axis->last[query];
    return *a <= *b;
}

INLINE long width_of(const Axis *axis, long query) { return axis->last[query] - axis->first[query] + 1; }

INLINE long lane_of(const Space *s, const Ring *ring, long key) { return (key + ring->phase) % s->stretch; }

/* The first key of a tile, such that whole vectors of keys are there, as far as there are as many. */
static long first_key(const Space *s, long x, int count) {
    long low, high;
    reach(&s->x, x, x + count, &low, &high);
    if (low + s->stretch > s->x.length) low = s->x.length > s->stretch ? s->x.length - s->stretch : 0;
    return low;
}

/* `count` keys (each D floats, `step` from each other) into the lanes from `lane` on of panels (vectors, D, LANES). */
static void enter(float *panels, long lane, const float *from, long step, long count, long D) {
    while (count > 0) {
        float *to = panels + lane / LANES * LANES * D + lane % LANES;
        long left = least_of(LANES - lane % LANES, count), some = 1, d = 0;
#ifdef TRANSPOSED
        typedef float two __attribute__((vector_size(8)));
        typedef float four __attribute__((vector_size(16)));
        typedef two any_two __attribute__((aligned(4), may_alias));
        typedef four any_four __attribute__((aligned(4), may_alias));
        some = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (some == 8)
            for (; d + 8 <= D; d += 8) transpose(from + d, step, to + d * LANES, LANES);
        if (some == 4)
            for (; d + 4 <= D; d += 4) {
                four x[4], y[4];
                UNROLL for (int i = 0; i < 4; i++) x[i] = *(const any_four *)(from + i * step + d);
                UNROLL for (int i = 0; i < 4; i += 2) {
                    y[i] = MIX(x[i], x[i + 1], 0, 4, 1, 5);
                    y[i + 1] = MIX(x[i], x[i + 1], 2, 6, 3, 7);
                }
                UNROLL for (int i = 0; i < 2; i++) {
                    *(any_four *)(to + (d + 2 * i) * LANES) = MIX(y[i], y[i + 2], 0, 1, 4, 5);
                    *(any_four *)(to + (d + 2 * i + 1) * LANES) = MIX(y[i], y[i + 2], 2, 3, 6, 7);
                }
            }
        if (some == 2)
            for (; d + 4 <= D; d += 4) {
                four x = *(const any_four *)(from + d), y = *(const any_four *)(from + step + d);
                four low = MIX(x, y, 0, 4, 1, 5), high = MIX(x, y, 2, 6, 3, 7);
                *(any_two *)(to + d * LANES) = MIX(low, low, 0, 1);
                *(any_two *)(to + (d + 1) * LANES) = MIX(low, low, 2, 3);
                *(any_two *)(to + (d + 2) * LANES) = MIX(high, high, 0, 1);
                *(any_two *)(to + (d + 3) * LANES) = MIX(high, high, 2, 3);
            }
#endif
        for (; d < D; d++)
            for (long i = 0; i < some; i++) to[d * LANES + i] = from[i * step + d];
        from += some * step;
        lane += some;
        count -= some;
    }
}

/* Rows of keys, of `floats` floats each, that some rows of queries go through together. Where those of a window stay in
 * the first cache, all: from row to row of queries only one is new. */
static long passed(const Axis *axis, long floats) {
    long own = 1;
    for (long i = 0; i < axis->length; i++) own = width_of(axis, i) > own ? width_of(axis, i) : own;
    if (own * floats <= CACHED + CACHED / 2) return axis->length;
    return CACHED / floats ? CACHED / floats : 1;
}

/* Ask for `floats` floats that will be needed soon. */
INLINE void announce(const float *from, long floats) {
    for (long i = 0; i < floats; i += 16) __builtin_prefetch(from + i);
}

/* What a head adds to the scores of the lanes, for each query x.. of a tile: (count, z * y, stretch), -inf where the
 * query does not see the lane's key. */
static void spread(const Space *s, const Bias *bias, long head, const Ring *ring, long x, int count, float *to) {
    long entries = bias->z * bias->y;
    const float *table = bias->table ? bias->table + head * entries * bias->x : 0;
    for (int r = 0; r < count; r++) {
        for (long i = 0; i < entries * s->stretch; i++) to[r * entries * s->stretch + i] = -INFINITY;
        for (long key = s->x.first[x + r]; key <= s->x.last[x + r]; key++) {
            float *lane = to + r * entries * s->stretch + lane_of(s, ring, key);
            for (long i = 0; i < entries; i++)
                lane[i * s->stretch] = table ? table[i * bias->x + key - (x + r) + bias->x / 2] : 0.0f;
        }
    }
}

/* Where in what `spread` made the entry of a query's first row of keys stands, and how far it is to the next plane and
 * row: no way, where there is no table. */
INLINE const float *entry(const Space *s, const Bias *bias, const float *from, int r, long z, long y, long *plane,
                          long *row) {
    *row = bias->table ? s->stretch : 0;
    *plane = *row * bias->y;
    from += r * bias->z * bias->y * s->stretch;
    return from + (s->z.first[z] - z + bias->z / 2) * *plane + (s->y.first[y] - y + bias->y / 2) * *row;
}

#endif
