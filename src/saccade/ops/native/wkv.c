/* Bidirectional WKV: sums of decayed exponentials over the tokens before and after each token. Float32.
 *
 *     y_t = (sum_{i != t} e^(k_i - w d(t, i)) v_i + e^(u + k_t) v_t) / (the same with v = 1)
 *
 * A sum is kept relative to its largest term, e^(key - w age), and that as key and age: see ops/wkv/scan.py, which
 * computes the same. A task is a row of the batch and some vectors of channels. What comes after a token is summed from
 * the end, first to have the sums at the end of each segment, then once more inside a segment, while they stay in cache
 * for the way forward.
 *
 * Backward is the same sums over the tokens around each, with 1 / denominators as weights, from the other end.
 */

#include "vectors.h"

#define SEGMENT 64   /* tokens */
#define EMPTY -1e30f /* the key of a sum without terms */

/* forward, forward with what backward needs, backward */
enum { PLAIN, KEEP, BACK };

/* moments: each term times its distance, less the age */
typedef struct {
    vec key, age, sums[2], moments[2];
} Sums;

typedef struct {
    const float *k, *v, *w, *u, *y, *key, *age, *slope, *grad;
    float *to_y, *to_key, *to_age, *to_slope, *to_k, *to_v, *to_w, *to_u;
    long T, C, chunk, shift;
} Problem;

/* log x for normal x > 0, to 1e-7 of itself or of 1 */
INLINE vec log_of(vec x) {
    ivec bits = (ivec)x, n = (bits - 0x3f3504f3) >> 23; /* so that the rest is between sqrt(1/2) and sqrt(2) */
    vec m = (vec)(bits - (n << 23)), f = (m - 1) / (m + 1), s = f * f;
    vec y = 2 * f * (1 + s * (1 / 3.0f + s * (1 / 5.0f + s * (1 / 7.0f + s * (1 / 9.0f)))));
    return choose(x == x, y + __builtin_convertvector(n, vec) * LN2, x);
}

INLINE vec exp_of(vec x) { return exp2_of(x * (1 / LN2)); }

INLINE Sums nothing(void) { return (Sums){.key = splat(EMPTY)}; }

/* a += b, which are seen from the same place */
INLINE void join(Sums *a, const Sums *b, const int moments, vec w) {
    vec ages = a->age - b->age, gap = (a->key - b->key) - w * ages, one = splat(1);
    ivec first = gap > 0;
    vec less = exp_of(-larger(-gap, gap)); /* NaN stays */
    vec of_a = choose(first, one, less), of_b = choose(first, less, one);
    a->key = choose(first, a->key, b->key);
    a->age = choose(first, a->age, b->age);
    for (int i = 0; i < 2; i++) {
        vec x = of_a * a->sums[i], y = of_b * b->sums[i];
        a->sums[i] = x + y;
        if (moments) /* one of the two is counted from another term now */
            a->moments[i] = of_a * a->moments[i] + of_b * b->moments[i] + choose(first, -y, x) * ages;
    }
}

/* One token alone: key and value; or backward 1 / denominator, and the gradient, alone and times y. */
INLINE Sums token(const Problem *at, const int backward, long x) {
    if (backward) {
        vec grad = load(at->grad + x);
        return (Sums){-load(at->key + x), -load(at->age + x), {grad, grad * load(at->y + x)}, {{}, {}}};
    }
    return (Sums){larger(splat(EMPTY), load(at->k + x)), {}, {load(at->v + x), splat(1)}, {{}, {}}};
}

/* sums over what stands before place p + 1, of those before p */
INLINE void take_in(Sums *a, const Problem *at, const int kind, long x, vec w) {
    Sums one = token(at, kind == BACK, x);
    a->age += 1;
    join(a, &one, kind == KEEP, w);
}

/* y at x, of the sums over all others there, and what backward needs */
INLINE void put(const Problem *at, const Sums *others, const int kind, long x, long c) {
    Sums own = token(at, 0, x);
    own.key += load(at->u + c);
    join(&own, others, kind == KEEP, load(at->w + c));
    vec y = own.sums[0] / own.sums[1];
    store(at->to_y + x, y);
    if (kind != KEEP) return;
    store(at->to_key + x, own.key + log_of(own.sums[1]));
    store(at->to_age + x, own.age);
    store(at->to_slope + x, (y * own.moments[1] - own.moments[0]) / own.sums[1]);
}

/* gradients at x; those of w and u are added to the sums over tokens */
INLINE void put_back(const Problem *at, const Sums *others, long x, long c, vec *w_sum, vec *u_sum) {
    vec k = load(at->k + x), v = load(at->v + x), w = load(at->w + c), y = load(at->y + x);
    vec weight = exp_of(k + others->key - w * others->age);
    vec grad = load(at->grad + x);
    vec own = exp_of(load(at->u + c) + k - load(at->key + x) + w * load(at->age + x)) * grad;
    vec of_v = weight * others->sums[0] + own;
    store(at->to_v + x, of_v);
    store(at->to_k + x, of_v * v - weight * others->sums[1] - own * y);
    *w_sum += grad * load(at->slope + x);
    *u_sum += own * (v - y);
}

/* The channels from c on, `vectors` of them, of batch row b; `places` and `ends` are working memory. Place p is token p,
 * or backward token T - 1 - p. */
INLINE void around(const Problem *at, const int kind, long b, long c, int vectors, Sums *places, Sums *ends) {
    const long T = at->T, C = at->C, segments = (T + SEGMENT - 1) / SEGMENT;
    const float apart = 1 - at->shift;
    Sums after[WIDE], inside[WIDE], before[WIDE];
    vec w_sums[WIDE] = {}, u_sums[WIDE] = {};
    for (int i = 0; i < vectors; i++) after[i] = inside[i] = before[i] = nothing();
#define AT(P) ((b * T + (kind == BACK ? T - 1 - (P) : (P))) * C + c)
    for (long s = segments - 1; s >= 0; s--) {
        memcpy(ends + s * vectors, after, vectors * sizeof(Sums));
        for (long p = (s + 1) * SEGMENT < T ? (s + 1) * SEGMENT - 1 : T - 1; p >= s * SEGMENT && s; p--)
            for (int i = 0; i < vectors; i++)
                take_in(after + i, at, kind, AT(p) + i * LANES, load(at->w + c + i * LANES));
    }
    for (long s = 0; s < segments; s++) {
        long start = s * SEGMENT, stop = start + SEGMENT < T ? start + SEGMENT : T;
        memcpy(after, ends + s * vectors, vectors * sizeof(Sums));
        for (long p = stop - 1; p >= start; p--)
            for (int i = 0; i < vectors; i++) {
                places[(p - start) * vectors + i] = after[i];
                take_in(after + i, at, kind, AT(p) + i * LANES, load(at->w + c + i * LANES));
            }
        vec w_part[WIDE] = {}, u_part[WIDE] = {};
        for (long p = start; p < stop; p++) {
            const int first = p && (kind == BACK ? T - p : p) % at->chunk == 0;
            for (int i = 0; i < vectors; i++) {
                const long x = AT(p) + i * LANES, channel = c + i * LANES;
                const vec w = load(at->w + channel);
                if (first) {
                    join(before + i, inside + i, kind == KEEP, w);
                    inside[i] = nothing();
                }
                Sums sum = places[(p - start) * vectors + i];
                sum.age += apart;
                join(&sum, inside + i, kind == KEEP, w);
                if (at->chunk < T) {
                    Sums past = before[i];
                    past.age += apart;
                    join(&sum, &past, kind == KEEP, w);
                    before[i].age += 1;
                }
                if (kind == BACK)
                    put_back(at, &sum, x, channel, w_part + i, u_part + i);
                else
                    put(at, &sum, kind, x, channel);
                take_in(inside + i, at, kind, x, w);
            }
        }
        for (int i = 0; i < vectors; i++) w_sums[i] += w_part[i], u_sums[i] += u_part[i];
    }
#undef AT
    if (kind == BACK)
        for (int i = 0; i < vectors; i++) {
            store(at->to_w + b * C + c + i * LANES, w_sums[i]);
            store(at->to_u + b * C + c + i * LANES, u_sums[i]);
        }
}

INLINE int all_of(const Problem *at, const int kind, long B, long vectors, int threads) {
    long groups = (at->C / LANES + vectors - 1) / vectors, segments = (at->T + SEGMENT - 1) / SEGMENT;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        Sums *places = (Sums *)room((SEGMENT + segments) * vectors * (long)(sizeof(Sums) / sizeof(float)));
        if (!places) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < B * groups; task++) {
            if (!places) continue;
            long c = task % groups * vectors * LANES, left = (at->C - c) / LANES;
            int some = (int)(left < vectors ? left : vectors);
            around(at, kind, task / groups, c, some, places, places + SEGMENT * vectors);
        }
        free(places);
    }
    return failed;
}

/* k, v, y, and where they are asked for the denominators' logarithms key - w age and the slopes by w: (B, T, C),
 * contiguous, C whole vectors; w, u (C). Distances and chunks as in ops/wkv; a task takes `vectors` of channels, at most
 * WIDE. */
int saccade_wkv(const float *k, const float *v, const float *w, const float *u, float *y, float *key, float *age,
                float *slope, long B, long T, long C, long chunk, long shift, long vectors, int threads) {
    Problem at = {.k = k, .v = v, .w = w, .u = u, .to_y = y, .to_key = key, .to_age = age, .to_slope = slope,
                  .T = T, .C = C, .chunk = chunk, .shift = shift};
    return key ? all_of(&at, KEEP, B, vectors, threads) : all_of(&at, PLAIN, B, vectors, threads);
}

/* The gradients of k and v, (B, T, C), and those of w and u from each row of the batch, (B, C). */
int saccade_wkv_backward(const float *k, const float *v, const float *w, const float *u, const float *y,
                         const float *key, const float *age, const float *slope, const float *grad, float *to_k,
                         float *to_v, float *to_w, float *to_u, long B, long T, long C, long chunk, long shift,
                         long vectors, int threads) {
    Problem at = {.k = k, .v = v, .w = w, .u = u, .y = y, .key = key, .age = age, .slope = slope, .grad = grad,
                  .to_k = to_k, .to_v = to_v, .to_w = to_w, .to_u = to_u,
                  .T = T, .C = C, .chunk = chunk, .shift = shift};
    return all_of(&at, BACK, B, vectors, threads);
}
