/* Batch normalisation of many tasks at once, with the ReLU behind it: forward, backward, second backward; and sums by
 * channel. Legend in vectors.h. */
#include "vectors.h"

/* y = w s (x - mean) + b. Written once, so that every pass finds the same bits. */
INLINE Vector normal(Vector x, Vector mean, Vector factor, Vector bias) { return (x - mean) * factor + bias; }

/* value where y > 0, else 0; what is not a number lets pass, so that it is seen. */
INLINE Vector gated(Vector value, Vector y) {
    /* A comparison gives -1, all bits set, where it holds. */
    return (Vector)((__typeof__(y <= y))value & ~(y <= (Vector){0}));
}

/* The values of some channels that a batch norm is made of. */
typedef struct {
    Vector mean[BAND], scale[BAND], factor[BAND], bias[BAND];
} Norm;

INLINE void set_norm(
    Norm *norm, int wide, whole count, const REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale
) {
    UNROLL for (int w = 0; w < wide; w++) {
        norm->mean[w] = load(mean + w * LANES, count);
        norm->scale[w] = load(scale + w * LANES, count);
        norm->factor[w] = weight ? norm->scale[w] * load(weight + w * LANES, count) : norm->scale[w];
        norm->bias[w] = bias ? load(bias + w * LANES, count) : (Vector){0};
    }
}

/* mean and scale = 1 / sqrt(variance + eps) of n values a channel. The variance is that of runs of RUN values around
 * the run's own mean, joined one after the other (Chan, Golub and LeVeque). */
INLINE void statistics(
    int wide, whole count, const REAL *x, whole n, whole channels, double eps, REAL *mean, REAL *scale
) {
    double centre[BAND][LANES], squares[BAND][LANES];
    for (int w = 0; w < wide; w++)
        for (int lane = 0; lane < LANES; lane++) centre[w][lane] = squares[w][lane] = 0;
    for (whole row = 0; row < n; row += RUN) {
        whole end = least(n, row + RUN);
        Vector middle[BAND], square[BAND];
        UNROLL for (int w = 0; w < wide; w++) middle[w] = square[w] = (Vector){0};
        for (whole r = row; r < end; r++)
            UNROLL for (int w = 0; w < wide; w++) middle[w] += load(x + r * channels + w * LANES, count);
        UNROLL for (int w = 0; w < wide; w++) middle[w] /= (REAL)(end - row);
        for (whole r = row; r < end; r++)
            UNROLL for (int w = 0; w < wide; w++) {
                Vector d = load(x + r * channels + w * LANES, count) - middle[w];
                square[w] += d * d;
            }
        double part = (double)(end - row) / (double)end, joined = (double)row * part;
        for (int w = 0; w < wide; w++)
            for (int lane = 0; lane < LANES; lane++) {
                double apart = (double)middle[w][lane] - centre[w][lane];
                centre[w][lane] += apart * part;
                squares[w][lane] += (double)square[w][lane] + apart * apart * joined;
            }
    }
    for (int w = 0; w < wide; w++) {
        Vector middle = {0}, spread = {0};
        for (int lane = 0; lane < LANES; lane++) {
            middle[lane] = (REAL)centre[w][lane];
            spread[lane] = (REAL)(1 / sqrt(squares[w][lane] / (double)n + eps));
        }
        store(mean + w * LANES, middle, count);
        store(scale + w * LANES, spread, count);
    }
}

INLINE void normalise_some(
    int wide, whole count, const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *mean, REAL *scale,
    whole n, whole channels, double eps, int rectify
) {
    Norm norm;
    statistics(wide, count, x, n, channels, eps, mean, scale);
    set_norm(&norm, wide, count, weight, bias, mean, scale);
    for (whole r = 0; r < n; r++)
        UNROLL for (int w = 0; w < wide; w++) {
            Vector value = load(x + r * channels + w * LANES, count);
            value = normal(value, norm.mean[w], norm.factor[w], norm.bias[w]);
            store(y + r * channels + w * LANES, rectify ? gated(value, value) : value, count);
        }
}

/* y = w s (x - mean) + b of n values a channel each, or max(y, 0) with `rectify`; mean; and scale, which is s. */
static int normalise_part(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *mean, REAL *scale, whole n, whole channels,
    double eps, int rectify, whole first, whole last, whole channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
        whole all = t * n * channels;
#define CALL(wide, column, count) \
    normalise_some( \
        wide, count, x + all + column, weight ? weight + t * channels + column : 0, \
        bias ? bias + t * channels + column : 0, y + all + column, mean + t * channels + column, \
        scale + t * channels + column, n, channels, eps, rectify \
    )
        OVER_CHANNELS(CALL);
#undef CALL
    }
    return 0;
}

/* The gradient of y behind the gate of the ReLU. */
INLINE Vector slope_at(const REAL *gradient, whole count, Vector x, const Norm *norm, int w, int rectify) {
    Vector slope = load(gradient, count);
    return rectify ? gated(slope, normal(x, norm->mean[w], norm->factor[w], norm->bias[w])) : slope;
}

INLINE void normalise_backward_some(
    int wide, whole count, const REAL *gradient, const REAL *x, const REAL *weight, const REAL *bias, const REAL *mean,
    const REAL *scale, REAL *to_x, REAL *products, REAL *totals, whole n, whole channels, int rectify
) {
    Norm norm;
    double total[BAND][LANES], product[BAND][LANES];
    set_norm(&norm, wide, count, weight, bias, mean, scale);
    for (int w = 0; w < wide; w++)
        for (int lane = 0; lane < LANES; lane++) total[w][lane] = product[w][lane] = 0;
    for (whole row = 0; row < n; row += RUN) {
        whole end = least(n, row + RUN);
        Vector sum[BAND], along[BAND];
        UNROLL for (int w = 0; w < wide; w++) sum[w] = along[w] = (Vector){0};
        for (whole r = row; r < end; r++)
            UNROLL for (int w = 0; w < wide; w++) {
                whole at = r * channels + w * LANES;
                Vector value = load(x + at, count);
                Vector slope = slope_at(gradient + at, count, value, &norm, w, rectify);
                sum[w] += slope;
                along[w] += slope * (value - norm.mean[w]);
            }
        for (int w = 0; w < wide; w++)
            for (int lane = 0; lane < LANES; lane++) {
                total[w][lane] += (double)sum[w][lane];
                product[w][lane] += (double)along[w][lane];
            }
    }
    Vector by_distance[BAND] = {{0}}, alone[BAND] = {{0}};
    for (int w = 0; w < wide; w++) {
        Vector all = {0}, weighted = {0};
        for (int lane = 0; lane < LANES; lane++) {
            double s = norm.scale[w][lane], f = norm.factor[w][lane];
            by_distance[w][lane] = (REAL)(-f * s * s * product[w][lane] / (double)n);
            alone[w][lane] = (REAL)(-f * total[w][lane] / (double)n);
            all[lane] = (REAL)total[w][lane];
            weighted[lane] = (REAL)(s * product[w][lane]);
        }
        store(products + w * LANES, weighted, count);
        store(totals + w * LANES, all, count);
    }
    for (whole r = 0; r < n; r++)
        UNROLL for (int w = 0; w < wide; w++) {
            whole at = r * channels + w * LANES;
            Vector value = load(x + at, count);
            Vector slope = slope_at(gradient + at, count, value, &norm, w, rectify);
            Vector result = alone[w] + norm.factor[w] * slope + by_distance[w] * (value - norm.mean[w]);
            store(to_x + at, result, count);
        }
}

/* What the gradient of y sends to x, and by channel to the weight (products) and the bias (totals). */
static int normalise_backward_part(
    const REAL *gradient, const REAL *x, const REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale,
    REAL *to_x, REAL *products, REAL *totals, whole n, whole channels, int rectify, whole first, whole last, whole
    channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
        whole all = t * n * channels;
#define CALL(wide, column, count) \
    normalise_backward_some( \
        wide, count, gradient + all + column, x + all + column, weight ? weight + t * channels + column : 0, \
        bias ? bias + t * channels + column : 0, mean + t * channels + column, scale + t * channels + column, \
        to_x + all + column, products + t * channels + column, totals + t * channels + column, n, channels, rectify \
    )
        OVER_CHANNELS(CALL);
#undef CALL
    }
    return 0;
}

INLINE void normalise_second_backward_some(
    int wide, whole count, const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient,
    const REAL *x, const REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale, const REAL *products,
    const REAL *totals, REAL *to_gradient, REAL *to_x, REAL *to_weight, whole n, whole channels, int rectify
) {
    Norm norm;
    double total[BAND][LANES], product[BAND][LANES], shared[BAND][LANES];
    set_norm(&norm, wide, count, weight, bias, mean, scale);
    for (int w = 0; w < wide; w++)
        for (int lane = 0; lane < LANES; lane++) total[w][lane] = product[w][lane] = shared[w][lane] = 0;
    for (whole row = 0; adjoint && row < n; row += RUN) {
        whole end = least(n, row + RUN);
        Vector sum[BAND], along[BAND], common[BAND];
        UNROLL for (int w = 0; w < wide; w++) sum[w] = along[w] = common[w] = (Vector){0};
        for (whole r = row; r < end; r++)
            UNROLL for (int w = 0; w < wide; w++) {
                whole at = r * channels + w * LANES;
                Vector value = load(x + at, count), wish = load(adjoint + at, count);
                Vector slope = slope_at(gradient + at, count, value, &norm, w, rectify);
                sum[w] += wish;
                along[w] += wish * (value - norm.mean[w]);
                common[w] += wish * slope;
            }
        for (int w = 0; w < wide; w++)
            for (int lane = 0; lane < LANES; lane++) {
                total[w][lane] += (double)sum[w][lane];
                product[w][lane] += (double)along[w][lane];
                shared[w][lane] += (double)common[w][lane];
            }
    }
    /* Both results are linear in the adjoint (wish), the gradient (slope), the distance from the mean, and 1. */
    Vector back_distance[BAND] = {{0}}, back_alone[BAND] = {{0}}, by_slope[BAND] = {{0}}, by_wish[BAND] = {{0}};
    Vector by_distance[BAND] = {{0}}, alone[BAND] = {{0}};
    for (int w = 0; w < wide; w++) {
        Vector a = to_products ? load(to_products + w * LANES, count) : (Vector){0};
        Vector c = to_totals ? load(to_totals + w * LANES, count) : (Vector){0};
        Vector gw = load(products + w * LANES, count), gb = load(totals + w * LANES, count);
        Vector own = {0};
        for (int lane = 0; lane < LANES; lane++) {
            double s = norm.scale[w][lane], f = norm.factor[w][lane], size = (double)n, p = s * product[w][lane];
            double difference = shared[w][lane] - (total[w][lane] * gb[lane] + p * gw[lane]) / size;
            double of_slope = a[lane] - f * p / size, of_wish = -f * gw[lane] / size;
            back_distance[w][lane] = (REAL)(s * of_slope);
            back_alone[w][lane] = (REAL)(c[lane] - f * total[w][lane] / size);
            by_slope[w][lane] = (REAL)(s * of_slope);
            by_wish[w][lane] = (REAL)(s * of_wish);
            by_distance[w][lane] = (REAL)(-s * s * (of_slope * gw[lane] + of_wish * p + f * difference) / size);
            alone[w][lane] = (REAL)(-s * (of_slope * gb[lane] + of_wish * total[w][lane]) / size);
            own[lane] = (REAL)(s * difference);
        }
        store(to_weight + w * LANES, own, count);
    }
    for (whole r = 0; r < n; r++)
        UNROLL for (int w = 0; w < wide; w++) {
            whole at = r * channels + w * LANES;
            Vector value = load(x + at, count), d = value - norm.mean[w];
            Vector slope = load(gradient + at, count), wish = adjoint ? load(adjoint + at, count) : (Vector){0};
            Vector back = back_alone[w] + norm.factor[w] * wish + back_distance[w] * d;
            if (rectify) {
                Vector y = normal(value, norm.mean[w], norm.factor[w], norm.bias[w]);
                slope = gated(slope, y);
                back = gated(back, y);
            }
            store(to_gradient + at, back, count);
            store(to_x + at, alone[w] + by_slope[w] * slope + by_wish[w] * wish + by_distance[w] * d, count);
        }
}

/* What the adjoints of `normalise_backward`'s results send to the gradient, to x and to the weight. Adjoints that are
 * not there (null) are zero. */
static int normalise_second_backward_part(
    const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient, const REAL *x, const
    REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale, const REAL *products, const REAL *totals,
    REAL *to_gradient, REAL *to_x, REAL *to_weight, whole n, whole channels, int rectify, whole first, whole last,
    whole channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
        whole all = t * n * channels;
#define AT(values) ((values) ? (values) + t * channels + column : 0)
#define CALL(wide, column, count) \
    normalise_second_backward_some( \
        wide, count, adjoint ? adjoint + all + column : 0, AT(to_products), AT(to_totals), gradient + all + column, \
        x + all + column, AT(weight), AT(bias), AT(mean), AT(scale), AT(products), AT(totals), \
        to_gradient + all + column, to_x + all + column, AT(to_weight), n, channels, rectify \
    )
        OVER_CHANNELS(CALL);
#undef CALL
#undef AT
    }
    return 0;
}

INLINE void channel_sums_some(int wide, whole count, const REAL *x, REAL *sums, whole n, whole channels) {
    double total[BAND][LANES];
    for (int w = 0; w < wide; w++)
        for (int lane = 0; lane < LANES; lane++) total[w][lane] = 0;
    for (whole row = 0; row < n; row += RUN) {
        whole end = least(n, row + RUN);
        Vector sum[BAND];
        UNROLL for (int w = 0; w < wide; w++) sum[w] = (Vector){0};
        for (whole r = row; r < end; r++)
            UNROLL for (int w = 0; w < wide; w++) sum[w] += load(x + r * channels + w * LANES, count);
        for (int w = 0; w < wide; w++)
            for (int lane = 0; lane < LANES; lane++) total[w][lane] += (double)sum[w][lane];
    }
    for (int w = 0; w < wide; w++) {
        Vector found = {0};
        for (int lane = 0; lane < LANES; lane++) found[lane] = (REAL)total[w][lane];
        store(sums + w * LANES, found, count);
    }
}

/* The sums of n values a channel each. */
void channel_sums_part(
    const REAL *x, REAL *sums, whole n, whole channels, whole first, whole last, whole channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
#define CALL(wide, column, count) \
    channel_sums_some(wide, count, x + t * n * channels + column, sums + t * channels + column, n, channels)
        OVER_CHANNELS(CALL);
#undef CALL
    }
}

/* For all tasks. */
int normalise(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *mean, REAL *scale, whole n, whole channels,
    double eps, int rectify, whole tasks, int threads
) {
    BY_THREADS(normalise_part(x, weight, bias, y, mean, scale, n, channels, eps, rectify, SPLIT(channels, LANES)))
}

int normalise_backward(
    const REAL *gradient, const REAL *x, const REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale,
    REAL *to_x, REAL *products, REAL *totals, whole n, whole channels, int rectify, whole tasks, int threads
) {
    BY_THREADS(normalise_backward_part(
        gradient, x, weight, bias, mean, scale, to_x, products, totals, n, channels, rectify, SPLIT(channels, LANES)
    ))
}

int normalise_second_backward(
    const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient, const REAL *x, const
    REAL *weight, const REAL *bias, const REAL *mean, const REAL *scale, const REAL *products, const REAL *totals,
    REAL *to_gradient, REAL *to_x, REAL *to_weight, whole n, whole channels, int rectify, whole tasks, int threads
) {
    BY_THREADS(normalise_second_backward_part(
        adjoint, to_products, to_totals, gradient, x, weight, bias, mean, scale, products, totals, to_gradient, to_x,
        to_weight, n, channels, rectify, SPLIT(channels, LANES)
    ))
}

int channel_sums(const REAL *x, REAL *sums, whole n, whole channels, whole tasks, int threads) {
    BY_THREADS((channel_sums_part(x, sums, n, channels, SPLIT(channels, LANES)), 0))
}
