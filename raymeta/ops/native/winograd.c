/* Convolution by 3 x 3 at a stride of 1, with fewer products: Winograd's minimal filtering (Lavin, Gray 2015, arXiv
 * 1509.09308, section 4.1: F(2 x 2, 3 x 3)). Legend in vectors.h.
 *
 * For d a 4 x 4 tile of the input, w the weight, y the 2 x 2 tile of the output at the same place,
 *
 *     y = A' [(G w G') * (B' d B)] A     in which * is a product number by number, ' transposes, and
 *     B' = (1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 1 0 -1), G = (1 0 0; 1/2 1/2 1/2; 1/2 -1/2 1/2; 0 0 1), A' = (1 1 1 0; 0 1 -1 -1),
 *
 * 16 products where the sum has 36. Summed over channels, they are 16 products of matrices, [tiles, C] by [C, K].
 * <a, y> is linear in a, d and w, so what it sends to the input is the same convolution by the weight turned around, and
 * what it sends to the weight is G' [sum over tiles of (A a A') * (B' d B)] G.
 */
#include "tiles.h"

#define POINTS 16 /* of a tile, transformed */
/* What 16 products in a row read and write is kept to so much: a part of a second-level cache. */
#define BLOCK_BYTES 196608
/* So much beyond a multiple of a page are what is read of several points apart: else they share one set of a cache. */
#define APART ((whole)(64 / sizeof(REAL)))
/* A transformed weight of more than this is transformed anew for each block of tiles, of which there are then few. */
#define KEPT_BYTES 2097152
#define LARGE_BLOCK_BYTES 4194304

/* The transforms along one side of a tile: B', A, G and G' of it. (A' is in `output_tile`, where a bias begins its sums.) */
INLINE void by_input(const Vector d[4], Vector to[4]) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
}

INLINE void by_gradient(const Vector a[2], Vector to[4]) {
    to[0] = a[0], to[1] = a[0] + a[1], to[2] = a[0] - a[1], to[3] = -a[1];
}

INLINE void by_weight(const Vector g[3], Vector to[4]) {
    Vector ends = (REAL)0.5 * (g[0] + g[2]), middle = (REAL)0.5 * g[1];
    to[0] = g[0], to[1] = ends + middle, to[2] = ends - middle, to[3] = g[2];
}

INLINE void back_to_weight(const Vector m[4], Vector to[3]) {
    Vector both = (REAL)0.5 * (m[1] + m[2]);
    to[0] = m[0] + both, to[1] = (REAL)0.5 * (m[1] - m[2]), to[2] = both + m[3];
}

/* The 16 places of an image [height, width, C] from (h, l) on; those outside it are zeros. */
typedef struct {
    const REAL *at[4][4];
} Places;

static inline Places places(const REAL *x, whole height, whole width, whole C, whole h, whole l, const REAL *zeros) {
    Places found;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            int inside = h + i >= 0 && h + i < height && l + j >= 0 && l + j < width;
            found.at[i][j] = inside ? x + ((h + i) * width + l + j) * C : zeros;
        }
    return found;
}

/* B' d B of one vector of channels, to v[point * step]. */
INLINE void input_vector(const Places *places, whole c, REAL *v, whole step, whole count) {
    Vector half[4][4]; /* by columns, which are then its rows */
    UNROLL
    for (int j = 0; j < 4; j++) {
        Vector d[4], one[4];
        UNROLL
        for (int i = 0; i < 4; i++) d[i] = load(places->at[i][j] + c, count);
        by_input(d, one);
        UNROLL
        for (int i = 0; i < 4; i++) half[i][j] = one[i];
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        Vector one[4];
        by_input(half[i], one);
        UNROLL
        for (int j = 0; j < 4; j++) store(v + (4 * i + j) * step, one[j], count);
    }
}

/* Of the channels `channel` to `last_channel`, to v[point * step + channel - first channel]. */
static void input_tile(const Places *places, whole channel, whole last_channel, REAL *v, whole step) {
    whole c = channel;
    for (; c + LANES <= last_channel; c += LANES) input_vector(places, c, v + c - channel, step, LANES);
    if (c < last_channel) input_vector(places, c, v + c - channel, step, last_channel - c);
}

/* A' m A of one tile, m[point * step], plus bias, to the places of an image [height, width, K] from (p, q) on. */
static void output_tile(
    const REAL *m, whole step, const REAL *bias, REAL *y, whole height, whole width, whole all, whole p, whole q,
    whole columns
) {
    for (whole k = 0; k < columns; k += LANES) {
        Vector s[2][4];
        UNROLL
        for (int j = 0; j < 4; j++) {
            Vector one[4];
            UNROLL
            for (int i = 0; i < 4; i++) one[i] = *(const Vector *)(m + (4 * i + j) * step + k);
            s[0][j] = one[0] + one[1] + one[2];
            s[1][j] = one[1] - one[2] - one[3];
        }
        Vector start = {0};
        whole count = columns - k;
        if (bias) start = load(bias + k, count);
        UNROLL
        for (int i = 0; i < 2; i++) {
            if (p + i >= height) continue;
            REAL *to = y + ((p + i) * width + q) * all + k;
            store(to, start + s[i][0] + s[i][1] + s[i][2], count);
            if (q + 1 < width) store(to + all, start + s[i][1] - s[i][2] - s[i][3], count);
        }
    }
}

/* A a A' of the 2 x 2 places of an image [height, width, K] from (p, q) on, to z[point * step], for channels `k` to
 * k + COLUMNS, with zeros beyond `K`. */
static void gradient_tile(
    const REAL *gradient, whole height, whole width, whole K, whole p, whole q, whole k, REAL *z, whole step
) {
    const REAL *at = gradient + (p * width + q) * K;
    int below = p + 1 < height, beside = q + 1 < width;
    for (whole w = 0; w < WIDE; w++, k += LANES, z += LANES) {
        const Vector none = {0};
        whole count = most(0, K - k);
        Vector a[2][2] = {
            {load(at + k, count), below ? load(at + width * K + k, count) : none},
            {beside ? load(at + K + k, count) : none, below && beside ? load(at + (width + 1) * K + k, count) : none},
        }; /* by columns */
        Vector half[4][2];
        UNROLL
        for (int j = 0; j < 2; j++) {
            Vector one[4];
            by_gradient(a[j], one);
            UNROLL
            for (int i = 0; i < 4; i++) half[i][j] = one[i];
        }
        UNROLL
        for (int i = 0; i < 4; i++) {
            Vector one[4];
            by_gradient(half[i], one);
            UNROLL
            for (int j = 0; j < 4; j++) *(Vector *)(z + (4 * i + j) * step) = one[j];
        }
    }
}

/* G w G' of `depth` channels of the input and at most COLUMNS of the output: u[point, depth, COLUMNS]; `packed` has room
 * for 9 of 16 points. */
static void weight_block(const REAL *w, const Geometry *g, whole depth, whole columns, REAL *packed, REAL *u) {
    whole step = depth * COLUMNS;
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            packed_rows(
                w + i * g->height_step + j * g->width_step, g->in_step, g->out_step, depth, columns,
                packed + (3 * i + j) * step, COLUMNS
            );
    for (whole at = 0; at < step; at += LANES) {
        Vector half[4][3];
        UNROLL
        for (int j = 0; j < 3; j++) {
            Vector tap[3], one[4];
            UNROLL
            for (int i = 0; i < 3; i++) tap[i] = *(const Vector *)(packed + (3 * i + j) * step + at);
            by_weight(tap, one);
            UNROLL
            for (int i = 0; i < 4; i++) half[i][j] = one[i];
        }
        UNROLL
        for (int i = 0; i < 4; i++) {
            Vector one[4];
            by_weight(half[i], one);
            UNROLL
            for (int j = 0; j < 4; j++) *(Vector *)(u + (4 * i + j) * step + at) = one[j];
        }
    }
}

/* y [T, B, P, Q, K] from x [T, B, H, W, C], rows `row` to `last_row` of tasks `first` to `last`. */
static int filtered(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const Geometry *g, whole first, whole last, whole row,
    whole last_row
) {
    whole C = g->in_channels, K = g->out_channels, B = g->rows, H = g->in_height, W = g->in_width;
    whole P = g->out_height, Q = g->out_width, along = over(Q, 2), of_image = over(P, 2) * along;
    whole tiles = (last_row - row) * of_image;
    whole column_blocks = over(K, COLUMNS);
    whole depth_most = most(16, BLOCK_BYTES / 2 / (POINTS * COLUMNS * (whole)sizeof(REAL)));
    whole depth_blocks = over(C, depth_most);
    whole weight_bytes = POINTS * C * column_blocks * COLUMNS * (whole)sizeof(REAL);
    int kept = weight_bytes <= KEPT_BYTES;
    whole size = (kept ? BLOCK_BYTES : LARGE_BLOCK_BYTES) / (POINTS * C * (whole)sizeof(REAL));
    size = least(tiles, most(TALL, size / TALL * TALL));
    if (tiles <= 0) return 0;
    whole depth_size = least(C, depth_most);
    whole v_step = size * C + APART, m_step = size * COLUMNS + APART; /* of a point */
    REAL *v = malloc((size_t)(POINTS * v_step) * sizeof(REAL));
    REAL *m = malloc((size_t)(POINTS * m_step) * sizeof(REAL));
    REAL *u = malloc(kept ? (size_t)weight_bytes : (size_t)(POINTS * depth_size * COLUMNS) * sizeof(REAL));
    REAL *packed = calloc((size_t)(9 * depth_size * COLUMNS), sizeof(REAL));
    REAL *zeros = calloc((size_t)C, sizeof(REAL));
    int failed = !v || !m || !u || !packed || !zeros;
    for (whole t = first; t < last && !failed; t++)
        for (whole begin = 0; begin < tiles; begin += size) {
            whole count = least(size, tiles - begin);
            for (whole n = 0; n < count; n++) {
                whole b = row + (begin + n) / of_image, place = (begin + n) % of_image;
                Places seen = places(
                    x + (t * B + b) * H * W * C, H, W, C, place / along * 2 - g->padding_height,
                    place % along * 2 - g->padding_width, zeros
                );
                input_tile(&seen, 0, C, v + n * C, v_step);
            }
            for (whole block = 0; block < column_blocks; block++) {
                whole column = block * COLUMNS, columns = least(COLUMNS, K - column);
                for (whole part = 0; part < depth_blocks; part++) {
                    whole c = C * part / depth_blocks, depth = C * (part + 1) / depth_blocks - c;
                    REAL *own = kept ? u + POINTS * COLUMNS * (block * C + c) : u;
                    if (!kept || !begin) {
                        const REAL *w = weight + t * g->task_step + column * g->out_step + c * g->in_step;
                        weight_block(w, g, depth, columns, packed, own);
                    }
                    for (whole point = 0; point < POINTS; point++) {
                        whole place = 0;
                        const REAL *factor = own + point * depth * COLUMNS;
                        Taps taps = {1, &place, &factor};
                        gather(
                            v + point * v_step + c, C, &taps, depth, COLUMNS, 0, m + point * m_step, COLUMNS,
                            count, COLUMNS, part > 0
                        );
                    }
                }
                for (whole n = 0; n < count; n++) {
                    whole b = row + (begin + n) / of_image, place = (begin + n) % of_image;
                    output_tile(
                        m + n * COLUMNS, m_step, bias ? bias + t * K + column : 0,
                        y + (t * B + b) * P * Q * K + column, P, Q, K, place / along * 2, place % along * 2, columns
                    );
                }
            }
        }
    free(v);
    free(m);
    free(u);
    free(packed);
    free(zeros);
    return failed;
}

/* G' m G of `depth` channels of the input and at most COLUMNS of the output, m[point, PANEL, COLUMNS], to a weight
 * [3, 3, C, K] from `to` on, whose taps are `step` apart. */
static void weight_from(const REAL *m, whole depth, whole columns, REAL *to, whole step, whole K) {
    for (whole d = 0; d < depth; d++)
        for (whole k = 0; k < columns; k += LANES) {
            Vector half[3][4];
            UNROLL
            for (int j = 0; j < 4; j++) {
                Vector sum[4], one[3];
                UNROLL
                for (int i = 0; i < 4; i++)
                    sum[i] = *(const Vector *)(m + ((4 * i + j) * PANEL + d) * COLUMNS + k);
                back_to_weight(sum, one);
                UNROLL
                for (int i = 0; i < 3; i++) half[i][j] = one[i];
            }
            UNROLL
            for (int i = 0; i < 3; i++) {
                Vector one[3];
                back_to_weight(half[i], one);
                UNROLL
                for (int j = 0; j < 3; j++) store(to + (3 * i + j) * step + d * K + k, one[j], columns - k);
            }
        }
}

/* W(x, gradient): [T, 3, 3, C, K] densely; channels `channel` to `last_channel` of the input. to_bias [T, K]: what
 * it sends to a bias; or null. */
static int filtered_weight(
    const REAL *x, const REAL *gradient, REAL *weight, REAL *to_bias, const Geometry *g, whole first, whole last,
    whole channel, whole last_channel
) {
    whole C = g->in_channels, K = g->out_channels, B = g->rows, H = g->in_height, W = g->in_width;
    whole P = g->out_height, Q = g->out_width, along = over(Q, 2), of_image = over(P, 2) * along, tiles = B * of_image;
    whole own = last_channel - channel, blocks = over(K, COLUMNS), panels = over(own, PANEL);
    if (own <= 0) return 0;
    /* Large sums are gone through once for each block of tiles: those are larger then. */
    whole bytes = most(2 * BLOCK_BYTES, 2 * POINTS * C * blocks * COLUMNS * (whole)sizeof(REAL));
    whole size = least(tiles, most(16, bytes / (POINTS * (C + blocks * COLUMNS) * (whole)sizeof(REAL))));
    int whole_sums = size < tiles; /* else a block of channels is done with at once */
    whole v_step = panels * size * PANEL + APART, z_step = blocks * size * COLUMNS + APART; /* of a point */
    REAL *v = malloc((size_t)(POINTS * v_step) * sizeof(REAL));
    REAL *z = malloc((size_t)(POINTS * z_step) * sizeof(REAL));
    REAL *m = malloc((size_t)(POINTS * PANEL * COLUMNS * (whole_sums ? panels * blocks : 1)) * sizeof(REAL));
    REAL *zeros = calloc((size_t)C, sizeof(REAL));
    int failed = !v || !z || !m || !zeros;
    for (whole t = first; t < last && !failed; t++) {
        if (to_bias && !channel) channel_sums_part(gradient, to_bias, B * P * Q, K, t, t + 1, 0, K);
        for (whole begin = 0; begin < tiles; begin += size) {
            whole count = least(size, tiles - begin);
            for (whole n = 0; n < count; n++) {
                whole b = (begin + n) / of_image, p = (begin + n) % of_image / along * 2;
                whole q = (begin + n) % of_image % along * 2;
                const REAL *image = x + (t * B + b) * H * W * C, *other = gradient + (t * B + b) * P * Q * K;
                Places seen = places(image, H, W, C, p - g->padding_height, q - g->padding_width, zeros);
                for (whole panel = 0; panel < panels; panel++) {
                    whole c = channel + panel * PANEL;
                    input_tile(&seen, c, least(last_channel, c + PANEL), v + (panel * size + n) * PANEL, v_step);
                }
                for (whole block = 0; block < blocks; block++) {
                    REAL *to = z + (block * size + n) * COLUMNS;
                    gradient_tile(other, P, Q, K, p, q, block * COLUMNS, to, z_step);
                }
            }
            for (whole panel = 0; panel < panels; panel++)
                for (whole block = 0; block < blocks; block++) {
                    whole depth = least(PANEL, own - panel * PANEL), columns = least(COLUMNS, K - block * COLUMNS);
                    REAL *sums = m + (whole_sums ? (panel * blocks + block) * POINTS * PANEL * COLUMNS : 0);
                    for (whole point = 0; point < POINTS; point++)
                        product(
                            v + point * v_step + panel * size * PANEL, PANEL,
                            z + point * z_step + block * size * COLUMNS, COLUMNS, count, depth, (int)over(columns, LANES),
                            sums + point * PANEL * COLUMNS, COLUMNS, begin > 0
                        );
                    if (begin + count < tiles) continue;
                    whole c = channel + panel * PANEL;
                    weight_from(sums, depth, columns, weight + (t * 9 * C + c) * K + block * COLUMNS, C * K, K);
                }
        }
    }
    free(v);
    free(z);
    free(m);
    free(zeros);
    return failed;
}

/* For all tasks; of what `convolution`, `convolution_input`, `convolution_weight` take, what is 3 x 3 at a stride and a
 * dilation of 1. */
int winograd(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const Geometry *g, whole tasks, int threads
) {
    BY_THREADS(filtered(x, weight, bias, y, g, SPLIT(g->rows, 1)))
}

int winograd_input(const REAL *gradient, const REAL *weight, REAL *x, const Geometry *g, whole tasks, int threads) {
    Geometry turned = exchanged(g);
    turned.padding_height = 2 - g->padding_height, turned.padding_width = 2 - g->padding_width;
    turned.height_step = -g->height_step, turned.width_step = -g->width_step; /* from the last tap on */
    const REAL *last = weight + 2 * g->height_step + 2 * g->width_step;
    return winograd(gradient, last, 0, x, &turned, tasks, threads);
}

int winograd_weight(
    const REAL *x, const REAL *gradient, REAL *weight, REAL *to_bias, const Geometry *g, whole tasks, int threads
) {
    BY_THREADS(filtered_weight(x, gradient, weight, to_bias, g, SPLIT(g->in_channels, LANES)))
}
