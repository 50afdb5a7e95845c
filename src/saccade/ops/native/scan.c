/* Selective scan: a linear recurrence of N states a channel, whose decay, input and output change with the token.
 *
 *     h_t = e^(d_t a) h_(t-1) + d_t u_t b_t      y_t = c_t . h_t                                Float32.
 *
 * A task is a batch row, a group (which shares b and c) and some vectors of channels; the states stay in the cache. The
 * states at the start of each segment are kept, and backward makes the others of a segment from them again.
 *
 * Backward, with g_t the gradient of h_t, from the end:
 *
 *     g_t = c_t dy_t + e^(d_(t+1) a) g_(t+1)      dc_t = dy_t h_t      db_t = g_t d_t u_t      du_t = d_t (g_t . b_t)
 *     dd_t = u_t (g_t . b_t) + g_t . (a e^(d_t a) h_(t-1))             da = sum_t g_t d_t e^(d_t a) h_(t-1)
 */

#include "vectors.h"

typedef struct {
    const float *u, *d, *a, *b, *c, *kept, *grad;
    float *to_y, *to_kept, *to_u, *to_d, *to_a, *to_b, *to_c;
    long T, G, C, N, segment, segments, parts;
} Problem;

/* e^(d a) of d and -a / log 2; what is too large for a float is infinite, NaN stays */
INLINE vec decay_of(vec d, vec fall) { return exp2_of(-larger(splat(-128.0f), d * fall)); }

/* the sum of all lanes, in halves: the compiler may not reorder one sum */
INLINE float folded(vec x) {
    float s[LANES];
    store(s, x);
    for (int w = LANES / 2; w; w /= 2)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}

/* where token t of group g lies among rows as wide as `width` */
INLINE long at_token(const Problem *at, long row, long t, long g, long width) {
    return ((row * at->T + t) * at->G + g) * width;
}

INLINE long at_states(const Problem *at, long row, long segment, long g) {
    return ((row * at->segments + segment) * at->G + g) * at->N * at->C;
}

/* The channels from c on, `vectors` of them; h: working memory (vectors, N). */
INLINE void onwards(const Problem *at, long row, long g, long c, int vectors, vec *h) {
    const long T = at->T, C = at->C, N = at->N;
    const float *a = at->a + g * N * C + c;
    memset(h, 0, vectors * N * sizeof(vec));
    for (long t = 0; t < T; t++) {
        const float *b_t = at->b + at_token(at, row, t, g, N), *c_t = at->c + at_token(at, row, t, g, N);
        if (at->to_kept && t % at->segment == 0) {
            float *kept = at->to_kept + at_states(at, row, t / at->segment, g) + c;
            for (int i = 0; i < vectors; i++)
                for (long n = 0; n < N; n++) store(kept + n * C + i * LANES, h[i * N + n]);
        }
        for (int i = 0; i < vectors; i++) {
            const long x = at_token(at, row, t, g, C) + c + i * LANES;
            const vec d = load(at->d + x), in = d * load(at->u + x);
            vec *state = h + i * N, y = {};
            for (long n = 0; n < N; n++) {
                state[n] = decay_of(d, load(a + n * C + i * LANES)) * state[n] + in * b_t[n];
                y += state[n] * c_t[n];
            }
            store(at->to_y + x, y);
        }
    }
}

/* Working memory of `back`: states (segment + 1, N), decays (segment, N) and part (N) of one vector of channels; of_b and
 * of_c (segment, N), sums over all vectors; later and of_a (vectors, N). */
typedef struct {
    vec *states, *decays, *of_b, *of_c, *part, *later, *of_a;
} Desk;

INLINE void back_over(const Problem *at, long row, long g, long c, long start, long stop, const Desk *desk, vec *later,
                      vec *of_a) {
    const long C = at->C, N = at->N;
    const float *a = at->a + g * N * C + c, *kept = at->kept + at_states(at, row, start / at->segment, g) + c;
    for (long n = 0; n < N; n++) desk->states[n] = load(kept + n * C);
    for (long t = start; t < stop; t++) {
        const long x = at_token(at, row, t, g, C) + c;
        const float *b_t = at->b + at_token(at, row, t, g, N);
        const vec d = load(at->d + x), in = d * load(at->u + x);
        vec *decays = desk->decays + (t - start) * N, *states = desk->states + (t - start) * N;
        for (long n = 0; n < N; n++) {
            decays[n] = decay_of(d, load(a + n * C));
            states[N + n] = decays[n] * states[n] + in * b_t[n];
        }
    }
    vec *part = desk->part;
    memset(part, 0, N * sizeof(vec));
    for (long t = stop - 1; t >= start; t--) {
        const long x = at_token(at, row, t, g, C) + c, place = (t - start) * N;
        const float *b_t = at->b + at_token(at, row, t, g, N), *c_t = at->c + at_token(at, row, t, g, N);
        const vec d = load(at->d + x), u = load(at->u + x), in = d * u, grad = load(at->grad + x);
        const vec *states = desk->states + place, *decays = desk->decays + place;
        vec *of_b = desk->of_b + place, *of_c = desk->of_c + place, of_in = {}, of_d = {};
        for (long n = 0; n < N; n++) {
            vec of_h = later[n] + grad * c_t[n];
            of_c[n] += grad * states[N + n];
            of_b[n] += of_h * in;
            of_in += of_h * b_t[n];
            later[n] = of_h * decays[n];
            vec of_power = later[n] * states[n];
            of_d += of_power * load(a + n * C);
            part[n] += of_power * d;
        }
        store(at->to_u + x, of_in * d);
        store(at->to_d + x, of_in * u - of_d * LN2);
    }
    for (long n = 0; n < N; n++) of_a[n] += part[n];
}

INLINE void back(const Problem *at, long row, long g, long part, long c, int vectors, const Desk *desk) {
    const long T = at->T, N = at->N;
    memset(desk->later, 0, vectors * N * sizeof(vec));
    memset(desk->of_a, 0, vectors * N * sizeof(vec));
    for (long s = at->segments - 1; s >= 0; s--) {
        const long start = s * at->segment, stop = start + at->segment < T ? start + at->segment : T;
        memset(desk->of_b, 0, (stop - start) * N * sizeof(vec));
        memset(desk->of_c, 0, (stop - start) * N * sizeof(vec));
        for (int i = 0; i < vectors; i++)
            back_over(at, row, g, c + i * LANES, start, stop, desk, desk->later + i * N, desk->of_a + i * N);
        for (long t = start; t < stop; t++) {
            const long x = (at_token(at, row, t, g, at->parts) + part) * N, place = (t - start) * N;
            for (long n = 0; n < N; n++) {
                at->to_b[x + n] = folded(desk->of_b[place + n]);
                at->to_c[x + n] = folded(desk->of_c[place + n]);
            }
        }
    }
    for (int i = 0; i < vectors; i++)
        for (long n = 0; n < N; n++)
            store(at->to_a + ((row * at->G + g) * N + n) * at->C + c + i * LANES, desk->of_a[i * N + n]);
}

INLINE int all_of(const Problem *at, const int backward, long B, long vectors, int threads) {
    const long N = at->N, deep = at->segment * N, wide = vectors * N;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        long count = backward ? 4 * deep + 2 * N + 2 * wide : wide;
        vec *mine = (vec *)room(count * LANES);
        if (!mine) {
#pragma omp atomic write
            failed = 1;
        }
        Desk desk = {mine, mine + deep + N, mine + 2 * deep + N, mine + 3 * deep + N, mine + 4 * deep + N,
                     mine + 4 * deep + 2 * N, mine + 4 * deep + 2 * N + wide};
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < B * at->G * at->parts; task++) {
            if (!mine) continue;
            long part = task % at->parts, g = task / at->parts % at->G, row = task / at->parts / at->G;
            long c = part * vectors * LANES, left = (at->C - c) / LANES;
            int some = (int)(left < vectors ? left : vectors);
            if (backward)
                back(at, row, g, part, c, some, &desk);
            else
                onwards(at, row, g, c, some, mine);
        }
        free(mine);
    }
    return failed;
}

/* u, d, y: (B, T, G, C), contiguous, C whole vectors; a: (G, N, C), -a / log 2; b, c: (B, T, G, N); kept, where it is
 * asked for: (B, segments, G, N, C). A task takes `vectors` of channels, of which a group has `parts`. */
int saccade_scan(const float *u, const float *d, const float *a, const float *b, const float *c, float *y, float *kept,
                 long B, long T, long G, long C, long N, long segment, long vectors, long parts, int threads) {
    Problem at = {.u = u, .d = d, .a = a, .b = b, .c = c, .to_y = y, .to_kept = kept, .T = T, .G = G, .C = C, .N = N,
                  .segment = segment, .segments = (T + segment - 1) / segment, .parts = parts};
    return all_of(&at, 0, B, vectors, threads);
}

/* The gradients of u and d (B, T, G, C), that of a from each batch row (B, G, N, C), those of b and c from each part of
 * the channels (B, T, G, parts, N). */
int saccade_scan_backward(const float *u, const float *d, const float *a, const float *b, const float *c,
                          const float *kept, const float *grad, float *to_u, float *to_d, float *to_a, float *to_b,
                          float *to_c, long B, long T, long G, long C, long N, long segment, long vectors, long parts,
                          int threads) {
    Problem at = {.u = u, .d = d, .a = a, .b = b, .c = c, .kept = kept, .grad = grad, .to_u = to_u, .to_d = to_d,
                  .to_a = to_a, .to_b = to_b, .to_c = to_c, .T = T, .G = G, .C = C, .N = N, .segment = segment,
                  .segments = (T + segment - 1) / segment, .parts = parts};
    return all_of(&at, 1, B, vectors, threads);
}
