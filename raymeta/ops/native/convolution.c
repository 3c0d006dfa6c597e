/* Convolution of many tasks at once, each with a weight of its own: forward, and what its gradient sends to the input
 * and to the weight. Legend in vectors.h. */
#include "vectors.h"

/* A tile of TALL rows by WIDE vectors stays in registers, with the operands that are multiplied into it. */
#define TALL 6
/* What is read again and again is kept to so much: half of a first-level cache, and a part of a second-level one. */
#define NEAR_BYTES 16384
#define NEXT_BYTES 262144

typedef struct {
    whole rows, in_height, in_width, in_channels, out_height, out_width, out_channels;
    whole height, width, stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
    /* Of a weight [T, K, C, height, width], in elements. */
    whole task_step, out_step, in_step, height_step, width_step;
} Geometry;

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
#pragma GCC unroll 8
    for (int w = 0; w < wide; w++) {
        Vector start = {0};
        if (bias) start = load(bias + w * LANES, width - w * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < tall; r++) sum[r][w] = more ? load(y + r * y_step + w * LANES, width - w * LANES) : start;
    }
    for (whole tap = 0; tap < taps->count; tap++) {
        const REAL *weight = taps->weight[tap], *from = x + taps->place[tap];
        for (whole d = 0; d < depth; d++, weight += weight_step) {
            Vector factor[WIDE];
#pragma GCC unroll 8
            for (int w = 0; w < wide; w++) factor[w] = *(const Vector *)(weight + w * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < tall; r++) {
                Vector value = (Vector){0} + from[r * x_step + d];
#pragma GCC unroll 8
                for (int w = 0; w < wide; w++) sum[r][w] += value * factor[w];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++)
#pragma GCC unroll 8
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
    for (whole tile = 0; tile < tiles; tile++) {
        whole row = rows * tile / tiles;
        int tall = (int)(rows * (tile + 1) / tiles - row);
        const REAL *from = x + row * x_step;
        REAL *to = y + row * y_step;
#define CALL(tall, wide) \
    gather_tile(tall, wide, from, x_step, taps, depth, weight_step, bias, to, y_step, width, more)
        TILES(CALL)
#undef CALL
    }
}

/* In how many parts the channels are gone through, for a tile's columns of their weights to stay in a cache. */
static inline whole parts_of(whole channels, whole taps) {
    return over(channels, most(16, NEXT_BYTES / (taps * WIDE * VECTOR_BYTES)));
}

/* to[k, c] (rows of `step`) = from[k * k_step + c * c_step], in squares, whose lines of memory stay in a cache. */
static void packed_rows(const REAL *from, whole k_step, whole c_step, whole rows, whole columns, REAL *to, whole step) {
    for (whole k0 = 0; k0 < rows; k0 += 16)
        for (whole c0 = 0; c0 < columns; c0 += 16) {
            whole k1 = least(rows, k0 + 16), c1 = least(columns, c0 + 16);
            for (whole k = k0; k < k1; k++)
                for (whole c = c0; c < c1; c++) to[k * step + c] = from[k * k_step + c * c_step];
        }
}

static int taps_for(Taps *taps, const Geometry *g) {
    taps->place = malloc((size_t)(g->height * g->width) * sizeof(whole));
    taps->weight = malloc((size_t)(g->height * g->width) * sizeof(REAL *));
    return taps->place && taps->weight;
}

static void taps_done(Taps *taps) {
    free(taps->place);
    free(taps->weight);
}

/* F(x, w) + bias. */
static int convolution_part(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const Geometry *g, whole first, whole last, whole
    row, whole last_row
) {
    whole C = g->in_channels, K = g->out_channels, padded = over(K, LANES) * LANES, taps_all = g->height * g->width;
    whole x_step = g->in_height * g->in_width * C, y_step = g->out_height * g->out_width * K;
    whole parts = parts_of(C, taps_all);
    int lies = g->out_step == 1 && g->in_step == K && g->width_step == C * K && g->height_step == g->width * C * K;
    lies = lies && K == padded;
    Taps taps = {0};
    REAL *packed = lies ? 0 : calloc((size_t)(taps_all * C * padded), sizeof(REAL));
    if (!taps_for(&taps, g) || (!lies && !packed)) {
        taps_done(&taps);
        free(packed);
        return 1;
    }
    for (whole t = first; t < last; t++) {
        const REAL *w = weight + t * g->task_step;
        if (!lies) {
            for (whole i = 0; i < g->height; i++)
                for (whole j = 0; j < g->width; j++)
                    packed_rows(
                        w + i * g->height_step + j * g->width_step, g->in_step, g->out_step, C, K,
                        packed + (i * g->width + j) * C * padded, padded
                    );
            w = packed;
        }
        for (whole column = 0; column < K; column += WIDE * LANES)
            for (whole part = 0; part < parts; part++) {
                whole c = C * part / parts, depth = C * (part + 1) / parts - c;
                for (whole p = 0; p < g->out_height; p++)
                    for (whole q = 0; q < g->out_width; q++) {
                        taps.count = 0;
                        for (whole i = 0; i < g->height; i++) {
                            whole h = p * g->stride_height - g->padding_height + i * g->dilation_height;
                            if (h < 0 || h >= g->in_height) continue;
                            for (whole j = 0; j < g->width; j++) {
                                whole l = q * g->stride_width - g->padding_width + j * g->dilation_width;
                                if (l < 0 || l >= g->in_width) continue;
                                taps.place[taps.count] = (h * g->in_width + l) * C + c;
                                taps.weight[taps.count++] = w + ((i * g->width + j) * C + c) * padded + column;
                            }
                        }
                        gather(
                            x + (t * g->rows + row) * x_step, x_step, &taps, depth, padded,
                            bias ? bias + t * K + column : 0,
                            y + (t * g->rows + row) * y_step + (p * g->out_width + q) * K + column, y_step,
                            last_row - row, least(K - column, WIDE * LANES), part > 0
                        );
                    }
            }
    }
    taps_done(&taps);
    free(packed);
    return 0;
}

/* I(gradient, w): what the gradient of the output sends to the input. */
static int convolution_input_part(
    const REAL *gradient, const REAL *weight, REAL *x, const Geometry *g, whole first, whole last, whole row, whole
    last_row
) {
    whole C = g->in_channels, K = g->out_channels, padded = over(C, LANES) * LANES, taps_all = g->height * g->width;
    whole x_step = g->in_height * g->in_width * C, y_step = g->out_height * g->out_width * K;
    whole parts = parts_of(K, taps_all);
    Taps taps = {0};
    REAL *packed = calloc((size_t)(taps_all * K * padded), sizeof(REAL));
    if (!taps_for(&taps, g) || !packed) {
        taps_done(&taps);
        free(packed);
        return 1;
    }
    for (whole t = first; t < last; t++) {
        const REAL *w = weight + t * g->task_step;
        for (whole i = 0; i < g->height; i++)
            for (whole j = 0; j < g->width; j++) {
                const REAL *tap = w + i * g->height_step + j * g->width_step;
                packed_rows(tap, g->out_step, g->in_step, K, C, packed + (i * g->width + j) * K * padded, padded);
            }
        for (whole column = 0; column < C; column += WIDE * LANES)
            for (whole part = 0; part < parts; part++) {
                whole k = K * part / parts, depth = K * (part + 1) / parts - k;
                for (whole h = 0; h < g->in_height; h++)
                    for (whole l = 0; l < g->in_width; l++) {
                        taps.count = 0;
                        for (whole i = 0; i < g->height; i++) {
                            whole p = h + g->padding_height - i * g->dilation_height;
                            if (p < 0 || p % g->stride_height || p / g->stride_height >= g->out_height) continue;
                            for (whole j = 0; j < g->width; j++) {
                                whole q = l + g->padding_width - j * g->dilation_width;
                                if (q < 0 || q % g->stride_width || q / g->stride_width >= g->out_width) continue;
                                whole at = p / g->stride_height * g->out_width + q / g->stride_width;
                                taps.place[taps.count] = at * K + k;
                                taps.weight[taps.count++] = packed + ((i * g->width + j) * K + k) * padded + column;
                            }
                        }
                        gather(
                            gradient + (t * g->rows + row) * y_step, y_step, &taps, depth, padded, 0,
                            x + (t * g->rows + row) * x_step + (h * g->in_width + l) * C + column, x_step,
                            last_row - row, least(C - column, WIDE * LANES), part > 0
                        );
                    }
            }
    }
    taps_done(&taps);
    free(packed);
    return 0;
}

/* Where a weight's tap sees the input: rows of a block, and the output positions at which it is inside. */
typedef struct {
    whole row, last_row, p, last_p, q, last_q;
    whole x_row, x_height, x_width, y_row, y_height, y_width; /* steps in elements, of one step of row, p, q */
} Seen;

/* to[r, w] += sum over what is seen of x[r] gradient[w]. */
INLINE void outer_tile(
    int tall, int wide, const REAL *x, const REAL *gradient, const Seen *s, REAL *to, whole to_step
) {
    Vector sum[TALL][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++)
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) sum[r][w] = *(const Vector *)(to + r * to_step + w * LANES);
    for (whole row = s->row; row < s->last_row; row++)
        for (whole p = s->p; p < s->last_p; p++) {
            const REAL *from = x + row * s->x_row + p * s->x_height + s->q * s->x_width;
            const REAL *other = gradient + row * s->y_row + p * s->y_height + s->q * s->y_width;
            for (whole q = s->q; q < s->last_q; q++, from += s->x_width, other += s->y_width) {
                Vector factor[WIDE];
#pragma GCC unroll 8
                for (int w = 0; w < wide; w++) factor[w] = *(const Vector *)(other + w * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < tall; r++) {
                    Vector value = (Vector){0} + from[r];
#pragma GCC unroll 8
                    for (int w = 0; w < wide; w++) sum[r][w] += value * factor[w];
                }
            }
        }
#pragma GCC unroll 8
    for (int r = 0; r < tall; r++)
#pragma GCC unroll 8
        for (int w = 0; w < wide; w++) *(Vector *)(to + r * to_step + w * LANES) = sum[r][w];
}

/* to[depth, columns] += sum over what is seen of x[depth] gradient[columns]; columns in whole vectors. */
static void outer(
    const REAL *x, const REAL *gradient, const Seen *seen, REAL *to, whole depth, whole columns
) {
    whole tiles = over(depth, TALL);
    for (whole column = 0; column < columns; column += WIDE * LANES) {
        int wide = (int)(least(columns - column, WIDE * LANES) / LANES);
        for (whole tile = 0; tile < tiles; tile++) {
            whole d = depth * tile / tiles;
            int tall = (int)(depth * (tile + 1) / tiles - d);
#define CALL(tall, wide) outer_tile(tall, wide, x + d, gradient + column, seen, to + d * columns + column, columns)
            TILES(CALL)
#undef CALL
        }
    }
}

/* W(x, gradient): [T, height, width, C, K] densely, what the gradient of the output sends to the weight. */
static int convolution_weight_part(
    const REAL *x, const REAL *gradient, REAL *weight, const Geometry *g, whole first, whole last, whole channel,
    whole last_channel
) {
    whole C = g->in_channels, K = g->out_channels, B = g->rows, P = g->out_height, Q = g->out_width;
    whole columns = over(K, LANES) * LANES, taps = g->height * g->width;
    if (channel >= last_channel) return 0;
    whole x_step = g->in_height * g->in_width * C, y_step = P * Q * K;
    /* Few channels (an image's) fill no tile: with zeros around the image, the taps of one line are so many more. */
    int framed = C < TALL && g->dilation_width == 1;
    whole frame_height = (P - 1) * g->stride_height + (g->height - 1) * g->dilation_height + 1;
    whole frame_width = (Q - 1) * g->stride_width + g->width;
    REAL *frame = framed ? calloc((size_t)(B * frame_height * frame_width * C), sizeof(REAL)) : 0;
    REAL *wide_gradient = K == columns ? 0 : calloc((size_t)(B * P * Q * columns), sizeof(REAL));
    REAL *wide_weight = K == columns ? 0 : malloc((size_t)(taps * C * columns) * sizeof(REAL));
    if ((framed && !frame) || (K != columns && (!wide_gradient || !wide_weight))) {
        free(frame);
        free(wide_gradient);
        free(wide_weight);
        return 1;
    }
    whole line_bytes = Q * least(columns, WIDE * LANES) * (whole)sizeof(REAL); /* of what a tile reads */
    whole p_block = most(1, least(P, NEAR_BYTES / line_bytes));
    whole row_block = p_block < P ? 1 : most(1, NEAR_BYTES / (P * line_bytes));
    for (whole t = first; t < last; t++) {
        const REAL *source = x + t * B * x_step, *other = gradient + t * B * y_step;
        REAL *to = wide_weight ? wide_weight : weight + t * taps * C * K;
        for (whole tap = 0; tap < taps; tap++)
            memset(to + (tap * C + channel) * columns, 0, (size_t)((last_channel - channel) * columns) * sizeof(REAL));
        if (wide_gradient) {
            for (whole n = 0; n < B * P * Q; n++)
                memcpy(wide_gradient + n * columns, other + n * K, (size_t)K * sizeof(REAL));
            other = wide_gradient;
        }
        if (framed) {
            whole left = most(0, g->padding_width), right = least(frame_width, g->in_width + g->padding_width);
            for (whole b = 0; b < B; b++)
                for (whole h = 0; h < frame_height; h++) {
                    whole from = h - g->padding_height;
                    if (from < 0 || from >= g->in_height || right <= left) continue;
                    memcpy(
                        frame + ((b * frame_height + h) * frame_width + left) * C,
                        source + b * x_step + from * g->in_width * C, (size_t)((right - left) * C) * sizeof(REAL)
                    );
                }
            source = frame;
        }
        whole height = framed ? frame_height : g->in_height, width = framed ? frame_width : g->in_width;
        Seen seen = {
            .x_row = height * width * C, .x_height = g->stride_height * width * C, .x_width = g->stride_width * C,
            .y_row = P * Q * columns, .y_height = Q * columns, .y_width = columns,
        };
        for (whole row = 0; row < B; row += row_block)
            for (whole block = 0; block < P; block += p_block)
                for (whole i = 0; i < g->height; i++)
                    for (whole j = 0; j < (framed ? 1 : g->width); j++) {
                        whole up = i * g->dilation_height - (framed ? 0 : g->padding_height);
                        whole along = framed ? 0 : j * g->dilation_width - g->padding_width;
                        seen.row = row;
                        seen.last_row = least(B, row + row_block);
                        seen.p = most(block, up < 0 ? over(-up, g->stride_height) : 0);
                        seen.last_p = up >= height ? 0 : (height - 1 - up) / g->stride_height + 1;
                        seen.last_p = least(seen.last_p, least(P, block + p_block));
                        seen.q = along < 0 ? over(-along, g->stride_width) : 0;
                        seen.last_q = least(Q, along >= width ? 0 : (width - 1 - along) / g->stride_width + 1);
                        if (seen.p >= seen.last_p || seen.q >= seen.last_q) continue;
                        outer(
                            source + (up * width + along) * C + channel, other, &seen,
                            to + ((i * g->width + j) * C + channel) * columns,
                            framed ? g->width * C : last_channel - channel, columns
                        );
                    }
        if (wide_weight)
            for (whole tap = 0; tap < taps; tap++)
                for (whole n = tap * C + channel; n < tap * C + last_channel; n++)
                    memcpy(weight + (t * taps * C + n) * K, wide_weight + n * columns, (size_t)K * sizeof(REAL));
    }
    free(frame);
    free(wide_gradient);
    free(wide_weight);
    return 0;
}

/* For all tasks. */
int convolution(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const Geometry *g, whole tasks, int threads
) {
    BY_THREADS(convolution_part(x, weight, bias, y, g, SPLIT(g->rows, 1)))
}

int convolution_input(const REAL *gradient, const REAL *weight, REAL *x, const Geometry *g, whole tasks, int threads) {
    BY_THREADS(convolution_input_part(gradient, weight, x, g, SPLIT(g->rows, 1)))
}

int convolution_weight(const REAL *x, const REAL *gradient, REAL *weight, const Geometry *g, whole tasks, int threads) {
    whole step = g->in_channels < TALL ? TALL : 1; /* those of an image go together */
    BY_THREADS(convolution_weight_part(x, gradient, weight, g, SPLIT(g->in_channels, step)))
}
