/* Convolution of many tasks at once, each with a weight of its own: forward, and what its gradient sends to the input
 * and to the weight. Legend in vectors.h. */
#include "tiles.h"

/* What is read again and again is kept to so much: a part of a second-level cache. */
#define NEXT_BYTES ((whole)262144)
/* So many positions at a time are copied together for the weight's sums: with the next ones, which are fetched meanwhile,
 * they stay in a second-level cache. */
#define POSITIONS 96

/* What is read next, fetched into a second-level cache a share at a time. */
typedef struct {
    const char *at, *end;
    whole share;
} Ahead;

static inline Ahead ahead(const REAL *from, const REAL *end, whole times) {
    Ahead found = {(const char *)from, (const char *)end, over((end - from) * (whole)sizeof(REAL), times)};
    return found;
}

INLINE void fetch(Ahead *next) {
    const char *end = next->end - next->at < next->share ? next->end : next->at + next->share;
    for (; next->at < end; next->at += 64) __builtin_prefetch(next->at, 0, 2);
}

/* Along one side of a result: position n sees taps tap[m] of the source at place[m], from[n] <= m < from[n + 1]. */
typedef struct {
    whole *from, *tap, *place;
} Seen;

/* Of `count` positions by `taps` taps on a source of `size`: forward, position n sees n * stride - padding + tap * dilation;
 * backwards (n a place of the input), what saw n. Returns 0 where there is no memory. */
static int see(
    Seen *seen, whole count, whole taps, whole size, whole stride, whole padding, whole dilation, int backwards
) {
    seen->from = malloc((size_t)(count + 1 + 2 * count * taps) * sizeof(whole));
    if (!seen->from) return 0;
    seen->tap = seen->from + count + 1;
    seen->place = seen->tap + count * taps;
    whole m = 0;
    for (whole n = 0; n < count; n++) {
        seen->from[n] = m;
        for (whole tap = 0; tap < taps; tap++) {
            whole place = backwards ? n + padding - tap * dilation : n * stride - padding + tap * dilation;
            if (backwards && place % stride) continue;
            if (backwards) place /= stride;
            if (place < 0 || place >= size) continue;
            seen->tap[m] = tap;
            seen->place[m++] = place;
        }
    }
    seen->from[count] = m;
    return 1;
}

/* How a result is gathered. `backwards`: g is `exchanged`, and a position of the result sees what saw it. `joined`: taps side
 * by side, and what they see, follow on each other in memory: one longer sum, of the same order. */
typedef struct {
    const Geometry *g;
    int backwards, joined;
    whole in_step, width_step, height_step; /* of the weight as it is read */
    Seen down, along;
    Taps taps;
} Gathering;

/* What position (p, q) sees, from channel c on, with its weights; returns of how many taps each of its sums is. */
static whole look(Gathering *way, whole p, whole q, whole c, const REAL *weight) {
    const Seen *down = &way->down, *along = &way->along;
    whole first = along->from[q], seen = along->from[q + 1] - first, last = first + (way->joined ? least(seen, 1) : seen);
    Taps *taps = &way->taps;
    taps->count = 0;
    for (whole i = down->from[p]; i < down->from[p + 1]; i++)
        for (whole j = first; j < last; j++) {
            taps->place[taps->count] = (down->place[i] * way->g->in_width + along->place[j]) * way->g->in_channels + c;
            taps->weight[taps->count++] = weight + down->tap[i] * way->height_step + along->tap[j] * way->width_step;
        }
    return way->joined ? seen : 1;
}

/* `depth` channels from c on of the sums of columns `column` to `last_column` of `rows` rows, at all positions. All
 * columns of a position, which lie side by side, before the next one. `weight` begins with channel c. */
static void gathered_part(
    Gathering *way, const REAL *source, const REAL *weight, const REAL *bias, REAL *result, whole rows, whole c, whole depth,
    whole column, whole last_column
) {
    const Geometry *g = way->g;
    whole out = g->out_channels, source_step = g->in_height * g->in_width * g->in_channels;
    whole result_step = g->out_height * g->out_width * out;
    for (whole p = 0; p < g->out_height; p++)
        for (whole q = 0; q < g->out_width; q++) {
            whole length = depth * look(way, p, q, c, weight + column);
            for (whole k = column; k < last_column; k += COLUMNS) {
                gather(
                    source, source_step, &way->taps, length, way->in_step, bias ? bias + k : 0,
                    result + (p * g->out_width + q) * out + k, result_step, rows, least(out - k, COLUMNS), c > 0
                );
                for (whole n = 0; n < way->taps.count; n++) way->taps.weight[n] += COLUMNS;
            }
        }
}

/* result [T, B, out_height, out_width, out_channels] = bias + for each position the sum over what it sees of the source
 * times the weight; rows `row` to `last_row` of tasks `first` to `last`. */
static int gathered(
    const REAL *source, const REAL *weight, const REAL *bias, REAL *result, const Geometry *g, int backwards, whole first,
    whole last, whole row, whole last_row
) {
    if (row >= last_row) return 0;
    whole in = g->in_channels, out = g->out_channels, padded = over(out, LANES) * LANES, taps_all = g->height * g->width;
    whole source_step = g->in_height * g->in_width * in, result_step = g->out_height * g->out_width * out;
    int lies = g->out_step == 1 && out == padded; /* as it is read */
    Gathering way = {g, backwards, 0, padded, in * padded, g->width * in * padded, {0}, {0}, {0}};
    if (lies) way.in_step = g->in_step, way.width_step = g->width_step, way.height_step = g->height_step;
    whole weight_bytes = taps_all * in * padded * (whole)sizeof(REAL);
    /* Parts of the depth, for a tile's columns of their weights to stay in a cache; and of the rows, for theirs to; and
     * of the columns, for what is read of a position's weights to. */
    whole parts = over(in, most(16, NEXT_BYTES / (taps_all * WIDE * VECTOR_BYTES)));
    whole near = most(NEXT_BYTES, 2 * weight_bytes) / (source_step * (whole)sizeof(REAL));
    whole blocks = over(last_row - row, most(TALL, near / TALL * TALL));
    whole columns = most(COLUMNS, NEXT_BYTES / (taps_all * in * (whole)sizeof(REAL)) / COLUMNS * COLUMNS);
    way.joined = !backwards && g->dilation_width == 1 && parts == 1 && way.width_step == in * way.in_step;
    REAL *packed = lies ? 0 : calloc(1, (size_t)weight_bytes);
    way.taps.place = malloc((size_t)taps_all * sizeof(whole));
    way.taps.weight = malloc((size_t)taps_all * sizeof(REAL *));
    int failed = (!lies && !packed) || !way.taps.place || !way.taps.weight || !see(
        &way.down, g->out_height, g->height, g->in_height, g->stride_height, g->padding_height, g->dilation_height, backwards
    ) || !see(
        &way.along, g->out_width, g->width, g->in_width, g->stride_width, g->padding_width, g->dilation_width, backwards
    );
    for (whole t = first; t < last && !failed; t++) {
        const REAL *w = weight + t * g->task_step;
        for (whole i = 0; !lies && i < g->height; i++)
            for (whole j = 0; j < g->width; j++)
                packed_rows(
                    w + i * g->height_step + j * g->width_step, g->in_step, g->out_step, in, out,
                    packed + i * way.height_step + j * way.width_step, padded
                );
        if (!lies) w = packed;
        for (whole block = 0; block < blocks; block++) {
            whole b = row + (last_row - row) * block / blocks, rows = row + (last_row - row) * (block + 1) / blocks - b;
            for (whole column = 0; column < out; column += columns)
                for (whole part = 0; part < parts; part++) {
                    whole c = in * part / parts, depth = in * (part + 1) / parts - c;
                    gathered_part(
                        &way, source + (t * g->rows + b) * source_step, w + c * way.in_step, bias ? bias + t * out : 0,
                        result + (t * g->rows + b) * result_step, rows, c, depth, column, least(out, column + columns)
                    );
                }
        }
    }
    free(packed);
    free(way.taps.place);
    free(way.taps.weight);
    free(way.down.from);
    free(way.along.from);
    return failed;
}

/* W(x, gradient) as below, of an image: few channels fill no tile, all of the taps together do. With zeros around the image,
 * what a line of taps sees lies side by side. */
static int convolution_weight_of_image(
    const REAL *x, const REAL *gradient, REAL *weight, REAL *to_bias, const Geometry *g, whole first, whole last
) {
    whole C = g->in_channels, K = g->out_channels, B = g->rows, P = g->out_height, Q = g->out_width;
    whole height = (P - 1) * g->stride_height + (g->height - 1) * g->dilation_height + 1;
    whole width = (Q - 1) * g->stride_width + g->width, along = g->width * C, depth = g->height * along;
    whole left = g->padding_width, right = least(width, g->in_width + left);
    whole padded = over(K, COLUMNS) * COLUMNS, lines = most(1, POSITIONS / Q);
    /* What is copied is copied by fours: beyond its end, before what follows. */
    REAL *frame = calloc((size_t)(B * height * width * C + 4), sizeof(REAL));
    REAL *v = malloc((size_t)(lines * Q * depth + 4) * sizeof(REAL));
    REAL *z = K == padded ? 0 : calloc((size_t)(lines * Q * padded), sizeof(REAL));
    REAL *sums = K == padded ? 0 : malloc((size_t)(depth * padded) * sizeof(REAL));
    int failed = !frame || !v || (K != padded && (!z || !sums));
    for (whole t = first; t < last && !failed; t++) {
        REAL *to = sums ? sums : weight + t * depth * K;
        if (to_bias) channel_sums_part(gradient, to_bias, B * P * Q, K, t, t + 1, 0, K);
        for (whole b = 0; b < B; b++)
            for (whole h = 0; h < height; h++) {
                whole from = h - g->padding_height;
                if (from < 0 || from >= g->in_height || right <= left) continue;
                memcpy(
                    frame + ((b * height + h) * width + left) * C,
                    x + ((t * B + b) * g->in_height + from) * g->in_width * C, (size_t)((right - left) * C) * sizeof(REAL)
                );
            }
        for (whole line = 0; line < B * P; line += lines) {
            whole next = least(B * P, line + lines), after = least(B * P * (last - t), next + lines);
            const REAL *other = gradient + (t * B * P + line) * Q * K;
            Ahead gradients = ahead(
                gradient + (t * B * P + next) * Q * K, gradient + (t * B * P + after) * Q * K, lines * Q
            );
            REAL *to_v = v;
            for (whole n = line; n < next; n++)
                for (whole q = 0; q < Q; q++) {
                    const REAL *at = frame + ((n / P * height + n % P * g->stride_height) * width + q * g->stride_width) * C;
                    fetch(&gradients);
                    for (whole i = 0; i < g->height; i++, at += g->dilation_height * width * C, to_v += along)
                        for (whole c = 0; c < along; c += 4) memcpy(to_v + c, at + c, 4 * sizeof(REAL));
                }
            for (whole n = 0; z && n < (next - line) * Q; n++) copied(z + n * padded, other + n * K, K);
            for (whole column = 0; column < padded; column += COLUMNS)
                for (whole d = 0; d < depth; d += PANEL)
                    product(
                        v + d, depth, (z ? z : other) + column, padded, (next - line) * Q, least(PANEL, depth - d), WIDE,
                        to + d * padded + column, padded, line > 0
                    );
        }
        if (sums)
            for (whole d = 0; d < depth; d++)
                memcpy(weight + (t * depth + d) * K, sums + d * padded, (size_t)K * sizeof(REAL));
    }
    free(frame);
    free(v);
    free(z);
    free(sums);
    return failed;
}

/* W(x, gradient): [T, height, width, C, K] densely, what the gradient of the output sends to the weight; channels
 * `channel` to `last_channel` of the input. to_bias [T, K]: what it sends to a bias; or null. */
static int convolution_weight_part(
    const REAL *x, const REAL *gradient, REAL *weight, REAL *to_bias, const Geometry *g, whole first, whole last,
    whole channel, whole last_channel
) {
    if (channel >= last_channel) return 0;
    if (g->in_channels < TALL && g->dilation_width == 1)
        return convolution_weight_of_image(x, gradient, weight, to_bias, g, first, last);
    whole C = g->in_channels, K = g->out_channels, B = g->rows, P = g->out_height, Q = g->out_width;
    whole height = g->in_height, width = g->in_width;
    whole taps = g->height * g->width, blocks = over(K, COLUMNS), padded = blocks * COLUMNS;
    whole depth = last_channel - channel, panels = over(depth, PANEL), panel_step = least(depth, PANEL);
    whole lines = most(1, POSITIONS / Q), size = lines * Q;
    REAL *v = malloc((size_t)(panels * size * panel_step) * sizeof(REAL));
    REAL *z = calloc((size_t)(size * padded), sizeof(REAL));
    REAL *sums = K == padded ? 0 : malloc((size_t)(taps * C * padded) * sizeof(REAL));
    int failed = !v || !z || (K != padded && !sums);
    for (whole t = first; t < last && !failed; t++) {
        const REAL *source = x + t * B * height * width * C, *other = gradient + t * B * P * Q * K;
        REAL *to = sums ? sums : weight + t * taps * C * K;
        /* It brings the task's gradients into a cache, too. */
        if (to_bias && !channel) channel_sums_part(gradient, to_bias, B * P * Q, K, t, t + 1, 0, K);
        for (whole line = 0; line < B * P; line += lines) {
            /* Tasks lie one after the other, as their rows do. */
            whole next = least(B * P, line + lines), after = least(B * P * (last - t), next + lines);
#define LINE(n) (source + ((n) / P * height + (n) % P * g->stride_height) * width * C)
            Ahead inputs = ahead(LINE(next), LINE(after), taps * panels * blocks);
            Ahead gradients = ahead(other + next * Q * K, other + after * Q * K, taps * panels * blocks);
#undef LINE
            for (whole i = 0; i < g->height; i++)
                for (whole j = 0; j < g->width; j++) {
                    /* What the tap sees at these lines of the output, and their gradients, put together. */
                    whole along = j * g->dilation_width - g->padding_width, count = 0;
                    whole q_first = along < 0 ? over(-along, g->stride_width) : 0;
                    whole q_last = along >= width ? 0 : least(Q, (width - 1 - along) / g->stride_width + 1);
                    for (whole n = line; n < next; n++) {
                        whole h = n % P * g->stride_height - g->padding_height + i * g->dilation_height;
                        if (h < 0 || h >= height) continue;
                        for (whole q = q_first; q < q_last; q++, count++) {
                            const REAL *at = source + ((n / P * height + h) * width + q * g->stride_width + along) * C;
                            for (whole panel = 0; panel < panels; panel++)
                                copied(
                                    v + (panel * size + count) * panel_step, at + channel + panel * PANEL,
                                    least(PANEL, depth - panel * PANEL)
                                );
                            for (whole block = 0; block < blocks; block++)
                                copied(
                                    z + (block * size + count) * COLUMNS, other + (n * Q + q) * K + block * COLUMNS,
                                    least(COLUMNS, K - block * COLUMNS)
                                );
                        }
                    }
                    for (whole panel = 0; panel < panels; panel++)
                        for (whole block = 0; block < blocks; block++) {
                            fetch(&inputs);
                            fetch(&gradients);
                            product(
                                v + panel * size * panel_step, panel_step, z + block * size * COLUMNS, COLUMNS, count,
                                least(PANEL, depth - panel * PANEL), WIDE,
                                to + ((i * g->width + j) * C + channel + panel * PANEL) * padded + block * COLUMNS, padded,
                                line > 0
                            );
                        }
                }
        }
        if (sums)
            for (whole tap = 0; tap < taps; tap++)
                for (whole n = tap * C + channel; n < tap * C + last_channel; n++)
                    memcpy(weight + (t * taps * C + n) * K, sums + n * padded, (size_t)K * sizeof(REAL));
    }
    free(v);
    free(z);
    free(sums);
    return failed;
}

/* Whether a convolution is one by 3 x 3 at a stride and a dilation of 1 that takes, by `winograd.c`, so many fewer products
 * that its transforms are paid for: those of the weight, once for each task, too. By shapes alone, so that it is the same
 * everywhere. */
static int by_winograd(const Geometry *g) {
    if (g->height != 3 || g->width != 3 || g->stride_height != 1 || g->stride_width != 1) return 0;
    if (g->dilation_height != 1 || g->dilation_width != 1 || least(g->in_channels, g->out_channels) < 16) return 0;
    whole down = 0, along = 0; /* taps that see the image */
    for (whole p = 0; p < g->out_height; p++)
        down += most(0, least(g->in_height, p - g->padding_height + 3) - most(0, p - g->padding_height));
    for (whole q = 0; q < g->out_width; q++)
        along += most(0, least(g->in_width, q - g->padding_width + 3) - most(0, q - g->padding_width));
    whole products = down * along, fewer = 16 * over(g->out_height, 2) * over(g->out_width, 2);
    return 4 * products >= 5 * fewer && g->rows * (products - fewer) >= 96;
}

/* F(x, w) + bias, for all tasks. */
int convolution(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, const Geometry *g, whole tasks, int threads
) {
    if (by_winograd(g)) return winograd(x, weight, bias, y, g, tasks, threads);
    BY_THREADS(gathered(x, weight, bias, y, g, 0, SPLIT(g->rows, 1)))
}

/* I(gradient, w): what the gradient of the output sends to the input. */
int convolution_input(const REAL *gradient, const REAL *weight, REAL *x, const Geometry *g, whole tasks, int threads) {
    if (by_winograd(g)) return winograd_input(gradient, weight, x, g, tasks, threads);
    Geometry back = exchanged(g);
    BY_THREADS(gathered(gradient, weight, 0, x, &back, 1, SPLIT(g->rows, 1)))
}

/* W(x, gradient), and with `to_bias` the sums of the gradient by channel. */
int convolution_weight(
    const REAL *x, const REAL *gradient, REAL *weight, REAL *to_bias, const Geometry *g, whole tasks, int threads
) {
    if (by_winograd(g)) return winograd_weight(x, gradient, weight, to_bias, g, tasks, threads);
    whole step = g->in_channels < TALL ? TALL : 1; /* those of an image go together */
    BY_THREADS(convolution_weight_part(x, gradient, weight, to_bias, g, SPLIT(g->in_channels, step)))
}
