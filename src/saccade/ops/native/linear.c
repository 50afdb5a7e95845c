/* Linear attention by chunks. Float32, forward.
 *
 *     o_i = scale * sum_{j<=i} decay^(i-j) (q_i . k_j) v_j        with a decay for each head, or 1
 *
 * A chunk's tokens meet each other by their scores, and what came before by the state S, which stays in the first cache
 * as the chunk goes by: nothing but the output is written to memory. Heads that are too few for all threads are cut into
 * segments: their sums first (saccade_linear_sums), from which the caller makes the state before each.
 *
 * Where normalised, a column of ones behind the values carries the denominators.
 *
 * Letters: D width of q and k, E of v, W of values and states here: E and the ones, in whole vectors.
 */

#include "vectors.h"

#define TOKENS 64 /* of a chunk */

/* Tokens of a head: where they begin, and from one to the next; inside a token numbers lie side by side. */
typedef struct {
    const float *from;
    long step;
} Tokens;

/* The head's tokens of (batch, heads, tokens, width) with these strides; `group` heads share one. */
static Tokens tokens_of(const float *x, const int64_t *strides, long head, long H, long group) {
    return (Tokens){x + head / H * strides[0] + head % H / group * strides[1], strides[2]};
}

/* decay^0, decay^1, .. decay^TOKENS */
static void powers(double decay, float *power) {
    for (int t = 0; t <= TOKENS; t++) power[t] = (float)pow(decay, t);
}

/* The values of `count` tokens, with ones, and zeros up to whole vectors of tokens and channels. */
static void take(Tokens v, long start, int count, long E, long W, int ones, float *values) {
    for (int i = 0; i < (count + LANES - 1) / LANES * LANES; i++) {
        float *to = values + i * W;
        memset(to + E, 0, (W - E) * sizeof(float));
        if (i < count) {
            memcpy(to, v.from + (start + i) * v.step, E * sizeof(float));
            if (ones) to[E] = 1;
        } else
            memset(to, 0, E * sizeof(float));
    }
}

/* S <- decay^count S + sum_j decay^(count-1-j) k_j^T v_j; the values are overwritten */
static void absorb(const float *panels, float *values, int count, long D, long W, const float *power, float *state) {
    if (power) {
        for (int j = 0; j < count; j++)
            for (long e = 0; e < W; e += LANES)
                store(values + j * W + e, load(values + j * W + e) * power[count - 1 - j]);
        for (long x = 0; x < D * W; x += LANES) store(state + x, load(state + x) * power[count]);
    }
    long vectors = (count + LANES - 1) / LANES;
    for (long d = 0, some; d < D; d += some) {
        some = next_part(D - d, ROWS);
        multiply(ADD, (int)some, W / LANES, panels + d * LANES, values,
                 (Layout){LANES, W, LANES, LANES, vectors, LANES * D, LANES * W}, state + d * W, W);
    }
}

/* sums (B H, segments, D, W) of the segments, as if nothing had come before each. decays (H) or null; strides: of batch,
 * head and token of k and of v. */
int saccade_linear_sums(const float *k, const float *v, float *sums, const double *decays, const int64_t *strides,
                        long B, long H, long K, long N, long D, long E, long W, long segment, int ones, int threads) {
    long segments = (N + segment - 1) / segment;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *panels = room(TOKENS * (D + W) + TOKENS + 1), *values = panels + TOKENS * D, *power = values + TOKENS * W;
        if (!panels) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < B * H * segments; task++) {
            if (!panels) continue;
            long head = task / segments, start = task % segments * segment;
            long stop = start + segment < N ? start + segment : N;
            Tokens key = tokens_of(k, strides, head, H, H / K), value = tokens_of(v, strides + 3, head, H, H / K);
            float *state = sums + task * D * W;
            memset(state, 0, D * W * sizeof(float));
            if (decays) powers(decays[head % H], power);
            for (long i = start; i < stop; i += TOKENS) {
                int count = stop - i < TOKENS ? (int)(stop - i) : TOKENS;
                fill(panels, key.from + i * key.step, key.step, count, (count + LANES - 1) / LANES, D);
                take(value, i, count, E, W, ones, values);
                absorb(panels, values, count, D, W, decays ? power : 0, state);
            }
        }
        free(panels);
    }
    return failed;
}

/* states (B H, segments, D, W): before each segment, and after it when this returns. out (B H, N, E), contiguous.
 * decays (H) or null; strides: of batch, head and token of q, k and v. */
int saccade_linear(const float *q, const float *k, const float *v, float *states, float *out, const double *decays,
                   const int64_t *strides, long B, long H, long K, long N, long D, long E, long W, long segment,
                   int ones, float scale, int threads) {
    long segments = (N + segment - 1) / segment;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *panels = room(TOKENS * (D + 2 * W + TOKENS) + D * W + 4 * TOKENS);
        float *values = panels + TOKENS * D, *sums = values + TOKENS * W, *scores = sums + TOKENS * W;
        float *state = scores + TOKENS * TOKENS, *power = state + D * W, *weight = power + TOKENS + LANES;
        if (!panels) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < B * H * segments; task++) {
            if (!panels) continue;
            long head = task / segments, start = task % segments * segment;
            long stop = start + segment < N ? start + segment : N;
            Tokens query = tokens_of(q, strides, head, H, 1);
            Tokens key = tokens_of(k, strides + 3, head, H, H / K), value = tokens_of(v, strides + 6, head, H, H / K);
            memcpy(state, states + task * D * W, D * W * sizeof(float));
            if (decays) powers(decays[head % H], power);
            /* weight[TOKENS - 1 - i + j] is what the score of token i and key j counts for: 0 where j > i */
            for (int t = 0; t < TOKENS; t++) {
                weight[t] = decays ? power[TOKENS - 1 - t] : 1;
                weight[TOKENS + t] = 0;
            }
            for (long i = start; i < stop; i += TOKENS) {
                int count = stop - i < TOKENS ? (int)(stop - i) : TOKENS;
                fill(panels, key.from + i * key.step, key.step, count, (count + LANES - 1) / LANES, D);
                take(value, i, count, E, W, ones, values);
                for (int r = 0, some; r < count; r += some) {
                    some = (int)next_part(count - r, ROWS);
                    const float *row = query.from + (i + r) * query.step;
                    float *sum = sums + r * W;
                    multiply(PUT, some, W / LANES, row, state, (Layout){query.step, W, LANES, D, 1, 0, 0}, sum, W);
                    int vectors = (r + some + LANES - 1) / LANES;
                    float *x = scores + r * TOKENS;
                    multiply(PUT, some, vectors, row, panels, (Layout){query.step, LANES, LANES * D, D, 1, 0, 0}, x,
                             TOKENS);
                    for (int u = 0; u < some; u++) {
                        const float *counts = weight + TOKENS - 1 - r - u;
                        for (int j = 0; j < vectors * LANES; j += LANES)
                            store(x + u * TOKENS + j, load(x + u * TOKENS + j) * load(counts + j));
                        if (decays)
                            for (long e = 0; e < W; e += LANES)
                                store(sum + u * W + e, load(sum + u * W + e) * power[r + u + 1]);
                    }
                    multiply(ADD, some, W / LANES, x, values, (Layout){TOKENS, W, LANES, r + some, 1, 0, 0}, sum, W);
                    for (int u = 0; u < some; u++) {
                        float total = ones ? sum[u * W + E] : 1, factor = ones ? (total == 0 ? 0 : 1 / total) : scale;
                        float *to = out + (head * N + i + r + u) * E;
                        for (long e = 0; e < E; e++) to[e] = sum[u * W + e] * factor;
                    }
                }
                absorb(panels, values, count, D, W, decays ? power : 0, state);
            }
            memcpy(states + task * D * W, state, D * W * sizeof(float));
        }
        free(panels);
    }
    return failed;
}
