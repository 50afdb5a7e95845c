/* Which keys some rows see: what attend.c and gradients.c share. */

#include "vectors.h"

#define CHUNK 64 /* keys whose scores are made before they are used: their keys and values stay in the first cache */

/* What some rows may see of the keys from `key` on: bytes, 0 = may not, or null; and first and last key, or null. */
typedef struct {
    const uint8_t *mask;
    long step;
    const int64_t *first, *last;
    long key;
} Sight;

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
        s->mask += begin;
    }
    s->key += *from;
}
