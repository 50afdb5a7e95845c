/* Vectors of LANES floats, and the product that all loops here are made of. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(LANES)
/* as asked for */
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* most vectors side by side in a product, and most rows; its sums and factors have to stay in registers */
#define WIDE 4
#define ROWS 6
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#define LN2 0.6931471805599453f

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef vec anywhere __attribute__((aligned(4), may_alias));
typedef ivec int_anywhere __attribute__((aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE vec load(const float *p) { return *(const anywhere *)p; }
INLINE ivec load_int(const int32_t *p) { return *(const int_anywhere *)p; }
INLINE void store(float *p, vec x) { *(anywhere *)p = x; }

/* bfloat16 is the upper half of a float; the nearest, to even, and what is not a number stays none. */
INLINE float of_half(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
INLINE uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)nearest;
}
INLINE vec splat(float x) { return x - (vec){}; } /* not x + 0, which would change -0 and so be computed */
INLINE vec choose(ivec yes, vec a, vec b) { return (vec)((yes & (ivec)a) | (~yes & (ivec)b)); }

/* a where it is larger, else b, also where either is NaN: one instruction of x86, which compilers do not find */
INLINE vec larger(vec a, vec b) {
#if defined(__AVX__) && LANES == 8
    return __builtin_ia32_maxps256(a, b);
#elif defined(__SSE__) && LANES == 4
    return __builtin_ia32_maxps(a, b);
#else
    return choose(a > b, a, b);
#endif
}

/* Load it once, and not again for every use. */
#if defined(__AVX512F__)
#define HOLD(X) __asm__("" : "+v"(X))
#elif (defined(__AVX__) && LANES <= 8) || (defined(__SSE2__) && LANES == 4)
#define HOLD(X) __asm__("" : "+x"(X))
#elif defined(__aarch64__) && LANES == 4
#define HOLD(X) __asm__("" : "+w"(X))
#else
#define HOLD(X)
#endif

INLINE float sum_of(vec x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

INLINE float top_of(vec x) {
    float t = x[0];
    for (int i = 1; i < LANES; i++) t = x[i] > t ? x[i] : t;
    return t;
}

INLINE int any_of(ivec x) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

/* 2^x to 2e-7; 0 below 2^-126. NaN stays NaN. */
INLINE vec exp2_of(vec x) {
    const vec round = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = larger(splat(-127.0f), x);
    vec shifted = x + round;
    ivec n = (ivec)shifted - (ivec)round;
    vec f = x - (shifted - round);
    vec y = splat(1.5403530e-4f);
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return y * (vec)((n + 127) << 23);
}

/* tanh x to 3e-7 of itself, by t = e^2x - 1, which is exact about 0: t / (t + 2). NaN stays NaN. */
INLINE vec tanh_of(vec x) {
    const vec round = splat(12582912.0f);
    x *= 2 / LN2;
    x = choose(x < -40.0f, splat(-40.0f), choose(x > 40.0f, splat(40.0f), x));
    vec shifted = x + round;
    ivec n = (ivec)shifted - (ivec)round;
    vec f = x - (shifted - round);
    vec y = splat(1.5403530e-4f);
    y = y * f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    vec whole = (vec)((n + 127) << 23), t = whole * (y * f) + (whole - 1);
    return t / (t + 2);
}

/* Where the factors of a product lie: a[r * step_a + j * jump_a + k], b[j * jump_b + k * step_k + v * step_v], j < outer,
 * k < depth. */
typedef struct {
    long step_a, step_k, step_v, depth, outer, jump_a, jump_b;
} Layout;

/* c (rows, width vectors) = or += a b, summed over j and k */
INLINE void product_of(const int rows, const int width, const int add, const float *restrict a,
                       const float *restrict b, const Layout *at, float *restrict c, long step_c) {
    const long step_a = at->step_a, step_k = at->step_k, step_v = at->step_v;
    vec sums[ROWS][WIDE];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < width; v++) sums[r][v] = add ? load(c + r * step_c + v * LANES) : (vec){};
    for (long j = 0; j < at->outer; j++, a += at->jump_a, b += at->jump_b)
        for (long k = 0; k < at->depth; k++) {
            vec x[WIDE];
            UNROLL for (int v = 0; v < width; v++) {
                x[v] = load(b + k * step_k + v * step_v);
                HOLD(x[v]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vec y = splat(a[r * step_a + k]);
                UNROLL for (int v = 0; v < width; v++) sums[r][v] += y * x[v];
            }
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < width; v++) store(c + r * step_c + v * LANES, sums[r][v]);
}

/* the same, compiled for each number of rows and vectors */
typedef void product(const float *, const float *, const Layout *, float *, long);
#define PRODUCT(NAME, R, W, ADD)                                                                                       \
    static void NAME##R##_##W(const float *a, const float *b, const Layout *at, float *c, long step_c) {               \
        product_of(R, W, ADD, a, b, at, c, step_c);                                                                    \
    }
#define EACH(MACRO, NAME, W, ADD)                                                                                      \
    MACRO(NAME, 1, W, ADD) MACRO(NAME, 2, W, ADD) MACRO(NAME, 3, W, ADD) MACRO(NAME, 4, W, ADD)                        \
    MACRO(NAME, 5, W, ADD) MACRO(NAME, 6, W, ADD)
#define NAMED(NAME, R, W, ADD) NAME##R##_##W,
#define LINE(NAME, W, ADD) {EACH(NAMED, NAME, W, ADD)},
EACH(PRODUCT, put, 1, 0) EACH(PRODUCT, put, 2, 0) EACH(PRODUCT, put, 3, 0) EACH(PRODUCT, put, 4, 0)
EACH(PRODUCT, add, 1, 1) EACH(PRODUCT, add, 2, 1) EACH(PRODUCT, add, 3, 1) EACH(PRODUCT, add, 4, 1)
#define LINES(NAME, ADD) LINE(NAME, 1, ADD) LINE(NAME, 2, ADD) LINE(NAME, 3, ADD) LINE(NAME, 4, ADD)
static product *const PUT[WIDE][ROWS] = {LINES(put, 0)};
static product *const ADD[WIDE][ROWS] = {LINES(add, 1)};

/* How many of `left` come next, where they are taken in parts as equal as they can be, of `most` at most. */
INLINE long next_part(long left, long most) {
    long parts = (left + most - 1) / most;
    return (left + parts - 1) / parts;
}

/* c = a b (PUT) or c += a b (ADD), as many vectors at a time as registers hold, in equal parts */
static void multiply(product *const (*kind)[ROWS], int rows, long vectors, const float *a, const float *b, Layout at,
                     float *c, long step_c) {
    long most = (REGISTERS - 1) / (rows + 1) < WIDE ? (REGISTERS - 1) / (rows + 1) : WIDE;
    for (long v = 0, width; v < vectors; v += width) {
        width = next_part(vectors - v, most);
        kind[width - 1][rows - 1](a, b + v * at.step_v, &at, c + v * LANES, step_c);
    }
}

static float *room(long floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

/* 8 x 8 elements transposed. */
#if LANES >= 8 && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TRANSPOSED 8
typedef float eight __attribute__((vector_size(32)));
typedef eight any_eight __attribute__((aligned(4), may_alias));
#define MIX(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
INLINE void transpose(const float *from, long step, float *to, long step_to) {
    eight x[8], y[8];
    UNROLL for (int i = 0; i < 8; i++) x[i] = *(const any_eight *)(from + i * step);
    UNROLL for (int i = 0; i < 8; i += 2) {
        y[i] = MIX(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        y[i + 1] = MIX(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLL for (int i = 0; i < 8; i += 4)
        UNROLL for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = MIX(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            x[i + 2 * j + 1] = MIX(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    UNROLL for (int i = 0; i < 4; i++) {
        *(any_eight *)(to + i * step_to) = MIX(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(any_eight *)(to + (i + 4) * step_to) = MIX(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}
#endif
#endif

/* Keys of a row as panels (vectors, D, LANES), filled up with zeros. */
static inline void fill(float *panels, const float *from, long step, long keys, long vectors, long D) {
    for (long v = 0; v < vectors; v++, keys -= LANES, from += LANES * step, panels += LANES * D) {
        long d = 0;
#ifdef TRANSPOSED
        if (keys >= LANES)
            for (; d + 8 <= D; d += 8)
                for (int i = 0; i < LANES; i += 8) transpose(from + i * step + d, step, panels + d * LANES + i, LANES);
#endif
        for (; d < D; d++)
            for (long i = 0; i < LANES; i++) panels[d * LANES + i] = i < keys ? from[i * step + d] : 0.0f;
    }
}
