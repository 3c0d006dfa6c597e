/* What the kernels share: sizes, vectors, and how the work is shared out among threads.
 *
 * Legend of all files: T tasks, B rows, H x W positions of the input, P x Q of the output, C channels of the input, K
 * of the output. Activations lie densely as [T, B, H, W, C] and [T, B, P, Q, K], weights in any layout. `first` to
 * `last` are one thread's tasks. A sum has one fixed order, whatever they are.
 *
 * Built once for each type, REAL. Vectors are those of GCC and Clang, as wide as the processor's.
 */
#ifndef VECTORS_H
#define VECTORS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* So many vectors side by side, each with sums of its own, stay in registers. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define WIDE 4
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define WIDE 2
#else
#define VECTOR_BYTES 16
#if defined(__aarch64__)
#define WIDE 4
#else
#define WIDE 2
#endif
#endif

/* So many values are added in the type itself, one after the other, before they go to a sum in double. */
#define RUN 32

typedef int64_t whole;

static inline whole least(whole a, whole b) { return a < b ? a : b; }
static inline whole most(whole a, whole b) { return a > b ? a : b; }
static inline whole over(whole a, whole b) { return (a + b - 1) / b; }

#define INLINE static inline __attribute__((always_inline))

#define LANES ((whole)(VECTOR_BYTES / sizeof(REAL)))

typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL))));

/* Less zero, which is nothing; "plus zero" would be an addition, for the sake of -0, and cost a register. */
INLINE Vector all_lanes(REAL value) { return value - (Vector){0}; }

/* a b + c, rounded once where the processor can. Said outright, and the compiler forbidden to (-ffp-contract=off): left to
 * itself GCC fuses in a tile of two rows and not in one of one (for some AMD processors), and bits depended on the rows. */
INLINE Vector fused(Vector a, Vector b, Vector c) {
    const int single = sizeof(REAL) == 4;
#if defined(__AVX512F__)
    if (single) return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    return (Vector)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
    if (single) return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    return (Vector)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    if (single) return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    return (Vector)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    (void)single;
    return a * b + c;
#endif
}

/* The first `count` lanes, zeros beyond. */
INLINE Vector load(const REAL *from, whole count) {
    if (count >= LANES) return *(const Vector *)from;
    Vector value = {0};
    memcpy(&value, from, (size_t)count * sizeof(REAL));
    return value;
}

INLINE void store(REAL *to, Vector value, whole count) {
    if (count >= LANES) *(Vector *)to = value;
    else memcpy(to, &value, (size_t)count * sizeof(REAL));
}

#define UNROLL _Pragma("GCC unroll 8")
/* So many vectors of channels at a time at most, where sums go by channel: CALL(wide, column, count of lanes). Whole rows
 * at once where they are as wide as that, else by 4 vectors, then fewer, then what is left of one. What lies side by side
 * is read together: by 2 vectors of 8, a batch norm of 15 MB took 7.8 ms, all 8 at once 3.9. */
#define BAND 8
#define OVER_CHANNELS(CALL) \
    do { \
        whole column = channel; \
        if (column + BAND * LANES == last_channel) { CALL(BAND, column, LANES); column = last_channel; } \
        for (; column + 4 * LANES <= last_channel; column += 4 * LANES) CALL(4, column, LANES); \
        if (column + 2 * LANES <= last_channel) { CALL(2, column, LANES); column += 2 * LANES; } \
        if (column + LANES <= last_channel) { CALL(1, column, LANES); column += LANES; } \
        if (column < last_channel) CALL(1, column, last_channel - column); \
    } while (0)

/* For all tasks, by so many threads: no sum depends on how many. They return 0, or 1 where there is no memory.
 * Each thread has some of the tasks; where they are fewer than the threads, some of the rows or channels of all. */
#define SHARE(size, step, all) \
    (all) ? 0 : least(size, over(size, step) * part / threads * (step)), \
        (all) ? (size) : least(size, over(size, step) * (part + 1) / threads * (step))
#define SPLIT(size, step) SHARE(tasks, 1, tasks < threads), SHARE(size, step, tasks >= threads)
#define BY_THREADS(part_of) \
    int failed = 0; \
    _Pragma("omp parallel for num_threads(threads) if (threads > 1) reduction(| : failed)") \
    for (int part = 0; part < threads; part++) failed |= part_of; \
    return failed;

/* `batch_norm.c`: the sums of n values a channel each, of channels `channel` to `last_channel`. */
void channel_sums_part(
    const REAL *x, REAL *sums, whole n, whole channels, whole first, whole last, whole channel, whole last_channel
);

#endif
