/* Layer normalisation of many tasks at once: forward, backward, second backward. Legend in vectors.h; here
 * x lies as [T, R, D]: R rows of D numbers each are normalised alone, with a weight and a bias [T, D] of each task.
 *
 * With d = x - mean, s = 1 / sqrt(variance + eps), n = s d and u = weight gradient:
 *     y = weight n + bias
 *     to_x = s (u - mean(u) - n mean(u n)), to_weight = sum of gradient n, to_bias = sum of gradient, over rows.
 */
#include "vectors.h"

/* The sum of the lanes. */
INLINE double across(Vector value) {
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += (double)value[lane];
    return sum;
}

/* SUMS(vector of one place, column, count of lanes) adds to vectors, which AND_THEN takes after RUN of them, and at the
 * end. */
#define OVER_ROW(SUMS, AND_THEN) \
    do { \
        int more = 0; \
        for (whole column = 0; column < size; column += LANES) { \
            whole count = least(size - column, LANES); \
            SUMS; \
            if (++more == RUN) { \
                AND_THEN; \
                more = 0; \
            } \
        } \
        AND_THEN; \
    } while (0)
#define MOVE(vector, sum) \
    do { \
        (sum) += across(vector); \
        (vector) = (Vector){0}; \
    } while (0)

/* The first `count` lanes of value, zeros beyond. */
INLINE Vector only(Vector value, whole count) {
    for (whole lane = count; lane < LANES; lane++) value[lane] = 0;
    return value;
}

/* y, and mean and s of each row. */
static int layer_norm_part(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *mean, REAL *scale, whole rows, whole size,
    double eps, whole first, whole last, whole first_row, whole last_row
) {
    for (whole t = first; t < last; t++)
        for (whole row = t * rows + first_row; row < t * rows + last_row; row++) {
            const REAL *from = x + row * size;
            double total = 0, squares = 0;
            Vector sum = {0};
            OVER_ROW(sum += load(from + column, count), MOVE(sum, total));
            REAL centre = (REAL)(total / (double)size);
            OVER_ROW(
                Vector d = only(load(from + column, count) - centre, count);
                sum += d * d, MOVE(sum, squares)
            );
            REAL spread = (REAL)(1 / sqrt(squares / (double)size + eps));
            mean[row] = centre;
            scale[row] = spread;
            for (whole column = 0; column < size; column += LANES) {
                whole count = least(size - column, LANES);
                Vector value = (load(from + column, count) - centre) * spread;
                if (weight) value *= load(weight + t * size + column, count);
                if (bias) value += load(bias + t * size + column, count);
                store(y + row * size + column, value, count);
            }
        }
    return 0;
}

/* What the gradient of y sends to x. */
static int to_x_part(
    const REAL *gradient, const REAL *x, const REAL *weight, const REAL *mean, const REAL *scale, REAL *to_x,
    whole rows, whole size, whole first, whole last, whole first_row, whole last_row
) {
    for (whole t = first; t < last; t++)
        for (whole row = t * rows + first_row; row < t * rows + last_row; row++) {
            REAL centre = mean[row], s = scale[row];
            double total = 0, product = 0;
            Vector sum = {0}, along = {0};
#define U \
    Vector u = load(gradient + row * size + column, count), n = (load(x + row * size + column, count) - centre) * s; \
    if (weight) u *= load(weight + t * size + column, count)
            OVER_ROW(U; sum += u; along += u * n, MOVE(sum, total); MOVE(along, product));
            REAL mean_u = (REAL)(total / (double)size), mean_un = (REAL)(product / (double)size);
            for (whole column = 0; column < size; column += LANES) {
                whole count = least(size - column, LANES);
                U;
                store(to_x + row * size + column, s * (u - mean_u - n * mean_un), count);
            }
#undef U
        }
    return 0;
}

/* Over the rows of some columns: CALL adds to sum[w] and other[w] what it finds `at` there, and total and product get
 * them. */
#define OVER_ROWS(CALL) \
    for (whole r = 0; r < rows; r += RUN) { \
        Vector sum[BAND], other[BAND]; \
        UNROLL for (int w = 0; w < wide; w++) sum[w] = other[w] = (Vector){0}; \
        for (whole row = r; row < least(rows, r + RUN); row++) \
            UNROLL for (int w = 0; w < wide; w++) { \
                whole at = row * size + w * LANES; \
                CALL; \
            } \
        for (int w = 0; w < wide; w++) \
            for (int lane = 0; lane < LANES; lane++) { \
                total[w][lane] += (double)sum[w][lane]; \
                product[w][lane] += (double)other[w][lane]; \
            } \
    }

INLINE void to_weight_some(
    int wide, whole count, const REAL *gradient, const REAL *x, const REAL *mean, const REAL *scale, REAL *products,
    REAL *totals, whole rows, whole size
) {
    double total[BAND][LANES] = {{0}}, product[BAND][LANES] = {{0}};
    OVER_ROWS(
        Vector slope = load(gradient + at, count); sum[w] += slope;
        other[w] += slope * ((load(x + at, count) - mean[row]) * scale[row])
    )
    for (int w = 0; w < wide; w++) {
        Vector all = {0}, weighted = {0};
        for (int lane = 0; lane < LANES; lane++) {
            all[lane] = (REAL)total[w][lane];
            weighted[lane] = (REAL)product[w][lane];
        }
        store(totals + w * LANES, all, count);
        store(products + w * LANES, weighted, count);
    }
}

/* What the gradient of y sends to the weight (products) and the bias (totals). */
static int to_weight_part(
    const REAL *gradient, const REAL *x, const REAL *mean, const REAL *scale, REAL *products, REAL *totals, whole rows,
    whole size, whole first, whole last, whole channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
        whole all = t * rows * size;
#define CALL(wide, column, count) \
    to_weight_some( \
        wide, count, gradient + all + column, x + all + column, mean + t * rows, scale + t * rows, \
        products + t * size + column, totals + t * size + column, rows, size \
    )
        OVER_CHANNELS(CALL);
#undef CALL
    }
    return 0;
}

/* With a the adjoint of to_x, alpha of products, beta of totals, P(v) = v - mean(v) - n mean(v n) and
 * e = alpha gradient - s (a mean(u n) + u mean(a n)):
 *     to the gradient  weight s P(a) + alpha n + beta,    to the weight  sum over rows of gradient s P(a),
 *     to x             s P(e) - s^2 n mean(a P(u)).
 * `means` [2, T, R] keeps mean(a) and mean(a n) for what goes to the weight. */
static int second_part(
    const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient, const REAL *x, const
    REAL *weight, const REAL *mean, const REAL *scale, REAL *to_gradient, REAL *to_x, REAL *means, whole tasks, whole
    rows, whole size, whole first, whole last, whole first_row, whole last_row
) {
    for (whole t = first; t < last; t++)
        for (whole row = t * rows + first_row; row < t * rows + last_row; row++) {
            REAL centre = mean[row], s = scale[row];
            double of_a = 0, of_an = 0, of_u = 0, of_un = 0, of_au = 0, of_g = 0, of_gn = 0;
            Vector a_sum = {0}, an_sum = {0}, u_sum = {0}, un_sum = {0}, au_sum = {0}, g_sum = {0}, gn_sum = {0};
#define PLACES \
    Vector slope = load(gradient + row * size + column, count); \
    Vector n = (load(x + row * size + column, count) - centre) * s; \
    Vector a = adjoint ? load(adjoint + row * size + column, count) : (Vector){0}; \
    Vector factor = weight ? load(weight + t * size + column, count) : (Vector){0} + 1; \
    Vector alpha = to_products ? load(to_products + t * size + column, count) : (Vector){0}; \
    Vector u = factor * slope, g = alpha * slope
            OVER_ROW(
                PLACES; a_sum += a; an_sum += a * n; u_sum += u; un_sum += u * n; au_sum += a * u; g_sum += g;
                gn_sum += g * n, MOVE(a_sum, of_a); MOVE(an_sum, of_an); MOVE(u_sum, of_u); MOVE(un_sum, of_un);
                MOVE(au_sum, of_au); MOVE(g_sum, of_g); MOVE(gn_sum, of_gn)
            );
            double d = (double)size, ma = of_a / d, man = of_an / d, mu = of_u / d, mun = of_un / d;
            double me = of_g / d - s * (ma * mun + mu * man), men = of_gn / d - 2 * s * man * mun;
            REAL mean_a = (REAL)ma, mean_an = (REAL)man, by_a = (REAL)(-s * mun), by_u = (REAL)(-s * man);
            REAL mean_e = (REAL)me, by_n = (REAL)(-men - s * (of_au / d - ma * mu - man * mun));
            means[row] = mean_a;
            means[tasks * rows + row] = mean_an;
            for (whole column = 0; column < size; column += LANES) {
                whole count = least(size - column, LANES);
                PLACES;
                Vector back = factor * (s * (a - mean_a - n * mean_an)) + alpha * n;
                if (to_totals) back += load(to_totals + t * size + column, count);
                store(to_gradient + row * size + column, back, count);
                store(to_x + row * size + column, s * (g + by_a * a + by_u * u - mean_e + by_n * n), count);
            }
#undef PLACES
        }
    return 0;
}

INLINE void second_to_weight_some(
    int wide, whole count, const REAL *adjoint, const REAL *gradient, const REAL *x, const REAL *mean, const REAL
    *scale, const REAL *mean_a, const REAL *mean_an, REAL *to_weight, whole rows, whole size
) {
    double total[BAND][LANES] = {{0}}, product[BAND][LANES] = {{0}};
    OVER_ROWS(
        Vector n = (load(x + at, count) - mean[row]) * scale[row];
        sum[w] += load(gradient + at, count) * scale[row] * (load(adjoint + at, count) - mean_a[row] - n * mean_an[row])
    )
    for (int w = 0; w < wide; w++) {
        Vector all = {0};
        for (int lane = 0; lane < LANES; lane++) all[lane] = (REAL)total[w][lane];
        store(to_weight + w * LANES, all, count);
    }
}

static int second_to_weight_part(
    const REAL *adjoint, const REAL *gradient, const REAL *x, const REAL *mean, const REAL *scale, const REAL *means,
    REAL *to_weight, whole tasks, whole rows, whole size, whole first, whole last, whole channel, whole last_channel
) {
    for (whole t = first; t < last; t++) {
        whole all = t * rows * size;
        if (!adjoint) {
            for (whole column = channel; column < last_channel; column++) to_weight[t * size + column] = 0;
            continue;
        }
#define CALL(wide, column, count) \
    second_to_weight_some( \
        wide, count, adjoint + all + column, gradient + all + column, x + all + column, mean + t * rows, \
        scale + t * rows, means + t * rows, means + (tasks + t) * rows, to_weight + t * size + column, rows, size \
    )
        OVER_CHANNELS(CALL);
#undef CALL
    }
    return 0;
}

/* For all tasks. */
int layer_norm(
    const REAL *x, const REAL *weight, const REAL *bias, REAL *y, REAL *mean, REAL *scale, whole rows, whole size,
    double eps, whole tasks, int threads
) {
    BY_THREADS(layer_norm_part(x, weight, bias, y, mean, scale, rows, size, eps, SPLIT(rows, 1)))
}

static int to_x_of(
    const REAL *gradient, const REAL *x, const REAL *weight, const REAL *mean, const REAL *scale, REAL *to_x,
    whole rows, whole size, whole tasks, int threads
) {
    BY_THREADS(to_x_part(gradient, x, weight, mean, scale, to_x, rows, size, SPLIT(rows, 1)))
}

static int to_weight_of(
    const REAL *gradient, const REAL *x, const REAL *mean, const REAL *scale, REAL *products, REAL *totals, whole rows,
    whole size, whole tasks, int threads
) {
    BY_THREADS(to_weight_part(gradient, x, mean, scale, products, totals, rows, size, SPLIT(size, LANES)))
}

/* What the gradient of y sends to x, to the weight (products) and to the bias (totals). */
int layer_norm_backward(
    const REAL *gradient, const REAL *x, const REAL *weight, const REAL *mean, const REAL *scale, REAL *to_x, REAL
    *products, REAL *totals, whole rows, whole size, whole tasks, int threads
) {
    int failed = to_x_of(gradient, x, weight, mean, scale, to_x, rows, size, tasks, threads);
    return failed | to_weight_of(gradient, x, mean, scale, products, totals, rows, size, tasks, threads);
}

static int second_of(
    const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient, const REAL *x, const
    REAL *weight, const REAL *mean, const REAL *scale, REAL *to_gradient, REAL *to_x, REAL *means, whole rows, whole
    size, whole tasks, int threads
) {
    BY_THREADS(second_part(
        adjoint, to_products, to_totals, gradient, x, weight, mean, scale, to_gradient, to_x, means, tasks, rows, size,
        SPLIT(rows, 1)
    ))
}

static int second_to_weight_of(
    const REAL *adjoint, const REAL *gradient, const REAL *x, const REAL *mean, const REAL *scale, const REAL *means,
    REAL *to_weight, whole rows, whole size, whole tasks, int threads
) {
    BY_THREADS(second_to_weight_part(
        adjoint, gradient, x, mean, scale, means, to_weight, tasks, rows, size, SPLIT(size, LANES)
    ))
}

/* What the adjoints of `layer_norm_backward`'s results (null: zero) send to the gradient, to x and to the weight.
 * `means` is room for 2 T R numbers. */
int layer_norm_second_backward(
    const REAL *adjoint, const REAL *to_products, const REAL *to_totals, const REAL *gradient, const REAL *x, const
    REAL *weight, const REAL *mean, const REAL *scale, REAL *to_gradient, REAL *to_x, REAL *to_weight, REAL *means,
    whole rows, whole size, whole tasks, int threads
) {
    int failed = second_of(
        adjoint, to_products, to_totals, gradient, x, weight, mean, scale, to_gradient, to_x, means, rows, size, tasks,
        threads
    );
    return failed | second_to_weight_of(adjoint, gradient, x, mean, scale, means, to_weight, rows, size, tasks, threads);
}
