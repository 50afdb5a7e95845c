/* Which keys some rows see, and what becomes of their scores: what attend.c and gradients.c share. */

#include "vectors.h"

#define CHUNK 64 /* keys whose scores are made before they are used: their keys and values stay in the first cache */

/* What some rows may see of the keys from `key` on; each may be null. mask: bytes, 0 = may not. first, last: key of each
 * row. born, until: first and last place of a row that sees each key; place: of each row. */
typedef struct {
    const uint8_t *mask;
    long step, key;
    const int64_t *first, *last;
    const int32_t *born, *until, *place;
} Sight;

/* The same for all tasks; what a row is, and a key, is where they stand in these arrays. */
typedef struct {
    const int64_t *run_mask, *row_first, *row_last;
    const int32_t *row_place, *key_born, *key_until;
    const uint8_t *masks;
    long mask_step;
} Sights;

/* Where a key stands in the panels, counted in keys, each block having been filled up to whole vectors. */
INLINE long in_panels(long key_of_all, long M, long block) {
    long per_head = (M + block - 1) / block, per_block = (block + LANES - 1) / LANES;
    long head = key_of_all / M, key = key_of_all % M;
    return (head * per_head + key / block) * per_block * LANES + key % block;
}

/* What `row` and those after it see of the keys j.. of a run, whose first key is `first` of its head and `key_of_all` of
 * all; line: of the run's mask, where the row stands. */
INLINE Sight look(const Sights *all, long run, long line, long row, long first, long key_of_all, long j) {
    Sight s = {0, all->mask_step, first + j, 0, 0, 0, 0, 0};
    if (all->run_mask && all->run_mask[run] >= 0) s.mask = all->masks + all->run_mask[run] + line * all->mask_step + j;
    if (all->row_first) s.first = all->row_first + row, s.last = all->row_last + row;
    if (all->key_born) {
        s.born = all->key_born + key_of_all + j;
        s.until = all->key_until + key_of_all + j;
        s.place = all->row_place + row;
    }
    return s;
}

/* The part from..to, in whole vectors, of the next `keys` keys that any of the rows sees; it may be empty. Forgets
 * limits that no row reaches. */
static void narrow(Sight *s, int rows, int keys, int *from, int *to) {
    *from = 0;
    *to = keys;
    if (s->first) {
        int64_t low = s->first[0], high = s->last[0], most = low, least = high;
        for (int r = 1; r < rows; r++) {
            low = s->first[r] < low ? s->first[r] : low;
            most = s->first[r] > most ? s->first[r] : most;
            high = s->last[r] > high ? s->last[r] : high;
            least = s->last[r] < least ? s->last[r] : least;
        }
        if (low > s->key) *from = low - s->key < keys ? (int)(low - s->key) / LANES * LANES : keys;
        if (high < s->key + keys - 1) *to = high < s->key ? 0 : (int)(high - s->key) + 1;
        if (most <= s->key + *from && least >= s->key + *to - 1) s->first = s->last = 0;
    }
    if (s->mask) {
        int begin = *to, end = *from;
        for (int j = *from; j < *to; j += LANES) {
            uint8_t some = 0;
            int stop = *to - j < LANES ? *to : j + LANES;
            for (int r = 0; r < rows; r++)
                for (int i = j; i < stop; i++) some |= s->mask[r * s->step + i];
            if (!some) continue;
            begin = j < begin ? j : begin;
            end = stop;
        }
        *from = begin;
        *to = end;
    }
    if (s->born) {
        int begin = *to, end = *from, low = s->place[0], high = low;
        for (int r = 1; r < rows; r++) {
            low = s->place[r] < low ? s->place[r] : low;
            high = s->place[r] > high ? s->place[r] : high;
        }
        for (int j = *from; j < *to; j += LANES) {
            if (!any_of((load_int(s->born + j) <= high) & (load_int(s->until + j) >= low))) continue;
            begin = j < begin ? j : begin;
            end = *to - j < LANES ? *to : j + LANES;
        }
        *from = begin;
        *to = end;
        s->born += begin;
        s->until += begin;
    }
    if (s->mask) s->mask += *from;
    s->key += *from;
}

/* Which lanes of vector v row r sees, by the limits of rows and keys. */
INLINE ivec seen_by(const Sight *s, int r, int v) {
    ivec key, sees;
    for (int i = 0; i < LANES; i++) key[i] = v * LANES + i;
    sees = key >= 0;
    if (s->first) {
        long low = s->first[r] - s->key, high = s->last[r] - s->key;
        low = low > CHUNK ? CHUNK : low < 0 ? 0 : low;
        high = high > CHUNK ? CHUNK : high < -1 ? -1 : high;
        sees &= (key >= (int)low) & (key <= (int)high);
    }
    if (s->born) sees &= (load_int(s->born + v * LANES) <= s->place[r]) & (load_int(s->until + v * LANES) >= s->place[r]);
    return sees;
}

/* What becomes of scores before a mask says no. Either `values` are added, of which one line belongs to each row and has
 * a value for each key; or there are none, and the score is capped: cap * tanh(score / cap), in units of log 2.
 * grads: the gradient of the values, added to, or null. The steps say where the lines of batch row, head and row lie,
 * those of grads also where those of each part. */
typedef struct {
    const float *values;
    float *grads;
    int64_t step_batch, step_head, step_row, grad_part, grad_batch, grad_head, grad_row;
    double cap;
} Change;

/* One after the other; rows are counted through `heads` heads of `queries` queries; owners through `parts` of a head. */
typedef struct {
    const Change *each;
    int64_t count, heads, queries, parts;
} Changes;

/* Where the values of row `row` lie for each change, and (if not null) those of their gradients; `step` from change to
 * change. */
static void lines_of(const Changes *all, long row, long owner, int64_t *values, int64_t *grads, long step) {
    if (!all->count) return;
    long query = row % all->queries, head = row / all->queries % all->heads, batch = row / all->queries / all->heads;
    for (int c = 0; c < all->count; c++) {
        const Change *one = all->each + c;
        values[c * step] = batch * one->step_batch + head * one->step_head + query * one->step_row;
        if (grads)
            grads[c * step] = owner % all->parts * one->grad_part + batch * one->grad_batch + head * one->grad_head +
                              query * one->grad_row;
    }
}

/* What becomes of a row's scores for the keys from `key` on. kept (changes, CHUNK), or null: the tanh of each cap. */
static void change(const Changes *all, const int64_t *lines, long step, long key, int keys, float *scores, float *kept) {
    for (int c = 0; c < all->count; c++) {
        const Change *one = all->each + c;
        int j = 0;
        if (one->values) {
            const float *values = one->values + lines[c * step] + key;
            for (; j + LANES <= keys; j += LANES) store(scores + j, load(scores + j) + load(values + j) * (1 / LN2));
            /* what lies after the last key is another's */
            for (; j < keys; j++) scores[j] += values[j] * (1 / LN2);
        } else {
            float cap = (float)one->cap, factor = 1 / cap;
            for (; j < keys; j += LANES) {
                vec y = tanh_of(load(scores + j) * factor);
                if (kept) store(kept + c * CHUNK + j, y);
                store(scores + j, y * cap);
            }
        }
    }
}

/* The way back: from d of what `change` made to d of what it was given, adding to the gradients of the values. */
static void change_back(const Changes *all, const int64_t *lines, long step, long key, int keys, float *slopes,
                        const float *kept) {
    for (int c = (int)all->count - 1; c >= 0; c--) {
        const Change *one = all->each + c;
        int j = 0;
        if (one->grads) {
            float *grads = one->grads + lines[c * step] + key;
            for (; j + LANES <= keys; j += LANES) store(grads + j, load(grads + j) + load(slopes + j));
            for (; j < keys; j++) grads[j] += slopes[j];
        } else if (!one->values) {
            for (; j < keys; j += LANES) {
                vec y = load(kept + c * CHUNK + j);
                store(slopes + j, load(slopes + j) * (1 - y * y));
            }
        }
    }
}
