/* Tiles of a product of matrices, whose sums stay in registers, and what a convolution is; for `convolution.c` and
 * `winograd.c`. Legend in vectors.h. */
#ifndef TILES_H
#define TILES_H
#include "vectors.h"

/* A tile of TALL rows by WIDE vectors stays in registers, with the operands that are multiplied into it. */
#define TALL 6
#define COLUMNS ((whole)(WIDE * LANES))
/* Of channels that lie together, row after row; whole tiles, and whole vectors. */
#define PANEL ((whole)48)
/* Some steps of a sum in one turn: what a core decodes at once is what limits a tile where another one shares it. */
#define DEEPER _Pragma("GCC unroll 4")
/* So many rows of a panel and of COLUMNS stay in a first-level cache. */
#define NEAR_ROWS ((whole)96)

typedef struct {
    whole rows, in_height, in_width, in_channels, out_height, out_width, out_channels;
    whole height, width, stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
    /* Of a weight [T, K, C, height, width], in elements. */
    whole task_step, out_step, in_step, height_step, width_step;
} Geometry;

/* A convolution whose input is this one's output: in and out exchanged, of a weight too. */
static inline Geometry exchanged(const Geometry *g) {
    Geometry other = *g;
    other.in_height = g->out_height, other.in_width = g->out_width, other.in_channels = g->out_channels;
    other.out_height = g->in_height, other.out_width = g->in_width, other.out_channels = g->in_channels;
    other.out_step = g->in_step, other.in_step = g->out_step;
    return other;
}

/* `winograd.c`, of what `convolution.c` takes. */
int winograd(const REAL *, const REAL *, const REAL *, REAL *, const Geometry *, whole tasks, int threads);
int winograd_input(const REAL *, const REAL *, REAL *, const Geometry *, whole tasks, int threads);
int winograd_weight(const REAL *, const REAL *, REAL *, REAL *, const Geometry *, whole tasks, int threads);

/* What a position of the result gathers from: places in a row of the source, and the weight of each, [depth, width]. */
typedef struct {
    whole count;
    whole *place;
    const REAL **weight;
} Taps;

/* At most TALL rows of WIDE vectors: y[r] = bias + sum over taps and depth of x[r, tap, depth] weight[tap, depth]. */
INLINE void gather_tile(
    int tall, int wide, const REAL *x, whole x_step, const Taps *taps, whole depth, whole weight_step, const REAL *bias,
    REAL *y, whole y_step, whole width, int more
) {
    Vector sum[TALL][WIDE];
    UNROLL
    for (int w = 0; w < wide; w++) {
        Vector start = {0};
        if (bias) start = load(bias + w * LANES, width - w * LANES);
        UNROLL
        for (int r = 0; r < tall; r++) sum[r][w] = more ? load(y + r * y_step + w * LANES, width - w * LANES) : start;
    }
    for (whole tap = 0; tap < taps->count; tap++) {
        const REAL *weight = taps->weight[tap], *from = x + taps->place[tap];
        DEEPER
        for (whole d = 0; d < depth; d++, weight += weight_step) {
            Vector factor[WIDE];
            UNROLL
            for (int w = 0; w < wide; w++) factor[w] = *(const Vector *)(weight + w * LANES);
            UNROLL
            for (int r = 0; r < tall; r++) {
                Vector value = all_lanes(from[r * x_step + d]);
                UNROLL
                for (int w = 0; w < wide; w++) sum[r][w] = fused(value, factor[w], sum[r][w]);
            }
        }
    }
    UNROLL
    for (int r = 0; r < tall; r++)
        UNROLL
        for (int w = 0; w < wide; w++) store(y + r * y_step + w * LANES, sum[r][w], width - w * LANES);
}

/* A tile whose size is known when the program runs, by tiles whose size is known when it is compiled. */
#define TILES_OF(wide, CALL) \
    switch (tall) { \
    case 1: CALL(1, wide); break; \
    case 2: CALL(2, wide); break; \
    case 3: CALL(3, wide); break; \
    case 4: CALL(4, wide); break; \
    case 5: CALL(5, wide); break; \
    default: CALL(6, wide); \
    }
#if WIDE == 4
#define TILES(CALL) \
    switch (wide) { \
    case 1: TILES_OF(1, CALL) break; \
    case 2: TILES_OF(2, CALL) break; \
    case 3: TILES_OF(3, CALL) break; \
    default: TILES_OF(4, CALL) \
    }
#else
#define TILES(CALL) \
    switch (wide) { \
    case 1: TILES_OF(1, CALL) break; \
    default: TILES_OF(2, CALL) \
    }
#endif

/* One position of the result in all rows: `width` channels, in at most WIDE vectors. `more`: y has the sums so far. */
static void gather(
    const REAL *x, whole x_step, const Taps *taps, whole depth, whole weight_step, const REAL *bias, REAL *y,
    whole y_step, whole rows, whole width, int more
) {
    int wide = (int)over(width, LANES);
    whole tiles = over(rows, TALL);
    for (whole tile = 0, row = 0, next; tile < tiles; tile++, row = next) {
        next = tile + 1 < tiles ? rows * (tile + 1) / tiles : rows;
        int tall = (int)(next - row);
        const REAL *from = x + row * x_step;
        REAL *to = y + row * y_step;
#define CALL(tall, wide) \
    gather_tile(tall, wide, from, x_step, taps, depth, weight_step, bias, to, y_step, width, more)
        TILES(CALL)
#undef CALL
    }
}

/* to[r, w] = (more: to[r, w] +) the sum over `count` rows of v[row, r] z[row, w]. */
INLINE void product_tile(
    int tall, int wide, const REAL *v, whole v_step, const REAL *z, whole z_step, whole count, REAL *to, whole to_step,
    int more
) {
    Vector sum[TALL][WIDE];
    UNROLL
    for (int r = 0; r < tall; r++)
        UNROLL
        for (int w = 0; w < wide; w++) sum[r][w] = more ? *(const Vector *)(to + r * to_step + w * LANES) : (Vector){0};
    DEEPER
    for (whole n = 0; n < count; n++, v += v_step, z += z_step) {
        Vector factor[WIDE];
        UNROLL
        for (int w = 0; w < wide; w++) factor[w] = *(const Vector *)(z + w * LANES);
        UNROLL
        for (int r = 0; r < tall; r++) {
            Vector value = all_lanes(v[r]);
            UNROLL
            for (int w = 0; w < wide; w++) sum[r][w] = fused(value, factor[w], sum[r][w]);
        }
    }
    UNROLL
    for (int r = 0; r < tall; r++)
        UNROLL
        for (int w = 0; w < wide; w++) *(Vector *)(to + r * to_step + w * LANES) = sum[r][w];
}

/* to[depth, wide vectors] = (more: itself +) the sum over `count` rows of v[row, depth] z[row, wide vectors]; at most
 * PANEL of depth. */
static void product(
    const REAL *v, whole v_step, const REAL *z, whole z_step, whole count, whole depth, int wide, REAL *to,
    whole to_step, int more
) {
    whole tiles = over(depth, TALL), from[PANEL / TALL + 1];
    for (whole tile = 0; tile <= tiles; tile++) from[tile] = depth * tile / tiles;
    whole n = 0;
    do { /* once for no rows, too: the sums are zeros then */
        whole some = least(NEAR_ROWS, count - n);
        for (whole tile = 0; tile < tiles; tile++) {
            whole d = from[tile];
            int tall = (int)(from[tile + 1] - d);
#define CALL(tall, wide) \
    product_tile( \
        tall, wide, v + n * v_step + d, v_step, z + n * z_step, z_step, some, to + d * to_step, to_step, more \
    )
            TILES(CALL)
#undef CALL
        }
        more = 1;
    } while ((n += NEAR_ROWS) < count);
}

/* Vector by vector: what is copied is short. */
INLINE void copied(REAL *to, const REAL *from, whole count) {
    whole n = 0;
    for (; n + LANES <= count; n += LANES) *(Vector *)(to + n) = *(const Vector *)(from + n);
    for (; n < count; n++) to[n] = from[n];
}

#if defined(__clang__) || __GNUC__ >= 12 /* which know __builtin_shufflevector */
#define BY_SQUARES 1
/* to[k, c] = from[c, k] for 4 x 4 numbers: rows of `to_step` and `from_step`. */
typedef REAL Four __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL))));
INLINE void transposed_square(const REAL *from, whole from_step, REAL *to, whole to_step) {
    Four a = *(const Four *)from, b = *(const Four *)(from + from_step);
    Four c = *(const Four *)(from + 2 * from_step), d = *(const Four *)(from + 3 * from_step);
    Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    *(Four *)to = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(Four *)(to + to_step) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), cd = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *(Four *)(to + 2 * to_step) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    *(Four *)(to + 3 * to_step) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
#endif

/* to[k, c] (rows of `step`) = from[k * k_step + c * c_step], in squares, whose lines of memory stay in a cache. */
static void packed_rows(const REAL *from, whole k_step, whole c_step, whole rows, whole columns, REAL *to, whole step) {
    if (c_step == 1) {
        for (whole k = 0; k < rows; k++) memcpy(to + k * step, from + k * k_step, (size_t)columns * sizeof(REAL));
        return;
    }
    for (whole k0 = 0; k0 < rows; k0 += 16)
        for (whole c0 = 0; c0 < columns; c0 += 16) {
            whole k1 = least(rows, k0 + 16), c1 = least(columns, c0 + 16);
#ifdef BY_SQUARES
            if (k_step == 1 && k1 == k0 + 16 && c1 == c0 + 16) {
                for (whole k = k0; k < k1; k += 4)
                    for (whole c = c0; c < c1; c += 4)
                        transposed_square(from + k + c * c_step, c_step, to + k * step + c, step);
                continue;
            }
#endif
            for (whole k = k0; k < k1; k++)
                for (whole c = c0; c < c1; c++) to[k * step + c] = from[k * k_step + c * c_step];
        }
}

#endif
