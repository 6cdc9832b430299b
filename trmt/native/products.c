/* Products of a few rows with constant weights: y = x @ weights' + bias, then relu if wanted.

   fp32: each output is one chain of additions, whatever the number of rows and threads.

   int8 is one arithmetic, the same to the last bit on every processor here and in plain PyTorch
   (trmt/nets/linear.py):
     a row x with largest magnitude m becomes q = round(x * (127 / m)), half to even, of scale m / 127;
     rows with m below 2^-100 count as zero, rows with infinities or NaN become NaN;
     sums of q times weights are exact in 32 bits;
     y = ((float)sum * scale of the row) * scale of the output, + bias, each operation rounded to fp32.
   The compiler must not contract these into fused ones (-ffp-contract=off).

   Weights never hold -128. The code for each kind of processor is chosen when it runs. */

#include "products.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { MOST_ROWS = 12, MOST_PANELS = 8 }; /* of a block */
enum { CHUNK = 1 << 18 };                 /* bytes of weights that stay in the cache while rows pass by */
enum { ON_STACK = 1 << 16 };              /* bytes that go on the stack */

typedef struct {
  int64_t inputs, depth;
  int8_t *values; /* [rows, depth] */
  float *scale;
} Quantised;

INLINE uint32_t bits(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return b;
}

/* The factor that quantises a row whose largest magnitude has these bits; `scale` is its inverse. */
INLINE float to_quantised(uint32_t most, float *scale) {
  float m;
  memcpy(&m, &most, 4);
  if (most >= 0x7f800000) return *scale = NAN, 0.0f;
  if (m < 0x1p-100f) return *scale = 0.0f, 0.0f;
  *scale = m / 127.0f;
  return 127.0f / m;
}

#define NAME(x) plain_##x
#define TARGET
#define LANES 4
#define FLIP 0
#define SHAPES(X, ...) X(3, 1, __VA_ARGS__) X(1, 2, __VA_ARGS__)
#define ALL(f) ((plain_floats){f, f, f, f})
#define FMA(a, b, c) ((a) * (b) + (c))
#define DOT plain_dot
typedef int32_t dot_ints __attribute__((vector_size(16), aligned(4)));
typedef int8_t dot_bytes __attribute__((vector_size(16), aligned(1)));
INLINE dot_ints plain_dot(dot_ints sum, int32_t x, dot_bytes w) {
  int8_t xs[4];
  memcpy(xs, &x, 4);
  for (int i = 0; i < 16; i++) sum[i / 4] += xs[i % 4] * w[i];
  return sum;
}
#include "panels.h"
#undef NAME
#undef TARGET
#undef LANES
#undef FLIP
#undef SHAPES
#undef ALL
#undef FMA
#undef DOT

#if defined(__x86_64__)
#include "products_x86.h"
#undef NAME
#undef TARGET
#else
static int x86_processors(void) { return 0; }
#endif

/* The processors whose code runs here, one bit for each. */
int trmt_processors(void) { return 1 << PLAIN | x86_processors(); }

static void quantise(const Quantised *q, const float *x, int64_t from, int64_t to, int processor) {
  switch (processor) {
#if defined(__x86_64__)
    case AMX: avx512_quantise(q, x, from, to, 0); return;
    case AVX512_VNNI: avx512_quantise(q, x, from, to, 0x80); return;
    case AVX_VNNI: avx_vnni_quantise(q, x, from, to, 0x80); return;
    case AVX2: avx2_quantise(q, x, from, to, 0); return;
#endif
    default: plain_quantise(q, x, from, to, 0);
  }
}

static void int8_panels(const Matrix *m, const Quantised *q, int64_t rows, float *y, int64_t from, int64_t to,
                        int processor) {
  switch (processor) {
#if defined(__x86_64__)
    case AMX: amx_panels(m, q, rows, y, from, to); return;
    case AVX512_VNNI: avx512_int8_panels(m, q, rows, y, from, to); return;
    case AVX_VNNI: avx_vnni_int8_panels(m, q, rows, y, from, to); return;
    case AVX2: avx2_int8_panels(m, q, rows, y, from, to); return;
#endif
    default: plain_int8_panels(m, q, rows, y, from, to);
  }
}

static void fp32_panels(const Matrix *m, const float *x, int64_t rows, float *y, int64_t from, int64_t to,
                        int processor) {
  switch (processor) {
#if defined(__x86_64__)
    case AMX:
    case AVX512_VNNI: avx512_fp32_panels(m, x, rows, y, from, to); return;
    case AVX_VNNI: avx_vnni_fp32_panels(m, x, rows, y, from, to); return;
    case AVX2: avx2_fp32_panels(m, x, rows, y, from, to); return;
#endif
    default: plain_fp32_panels(m, x, rows, y, from, to);
  }
}

enum { TILES_FROM = 4 }; /* rows, measured; with fewer, loading tiles takes longer than it saves */
enum { WORTH_THREADS = 1 << 17 }; /* multiplications below which another thread only costs */

/* How many threads work is worth. With one, the code for several is left out: asking
   for one thread takes as long as a small product. */
static int64_t threads_for(int64_t work, int64_t least) {
#ifdef _OPENMP
  if (work >= least) return omp_get_max_threads();
#endif
  return 1;
}

/* How many of so many rows a thread takes, all where there are fewer than `least`. */
static int64_t share_of(int64_t rows, int64_t least) {
  int64_t threads = threads_for(rows, least);
  return (rows + threads - 1) / threads;
}

static int64_t chunk_of(const Matrix *m, int64_t threads) {
  int64_t bytes = m->depth * PANEL * (m->is_int8 ? 1 : 4), chunk = CHUNK / bytes / 8 * 8;
  int64_t share = (m->panels + threads - 1) / threads;
  if (threads > 1 && share < chunk) chunk = share;
  return chunk < 4 ? 4 : chunk;
}

static void some_panels(const Matrix *m, const Quantised *q, const float *x, int64_t rows, float *y,
                        int64_t from, int64_t chunk, int processor) {
  int64_t to = from + chunk < m->panels ? from + chunk : m->panels;
  if (m->is_int8)
    int8_panels(m, q, rows, y, from, to, processor);
  else
    fp32_panels(m, x, rows, y, from, to, processor);
}

static void quantise_all(const Quantised *q, const float *x, int64_t rows, int processor) {
  int64_t share = share_of(rows, 32);
  if (share >= rows) return quantise(q, x, 0, rows, processor);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += share)
    quantise(q, x, row, row + share < rows ? row + share : rows, processor);
}

int trmt_product(const Matrix *m, const float *x, int64_t rows, float *y, int processor) {
  int64_t threads = threads_for(rows * m->outputs * m->inputs, WORTH_THREADS), chunk = chunk_of(m, threads);
  if (processor == AMX && rows < TILES_FROM) processor = AVX512_VNNI;
  Quantised q = {m->inputs, m->depth, 0, 0};
  int8_t small[ON_STACK] __attribute__((aligned(64)));
  if (m->is_int8) {
    int64_t padded = (rows + 31) / 32 * 32, size = padded * (m->depth + 64); /* whole tiles */
    q.values = size <= ON_STACK ? small : aligned_alloc(64, size);
    if (!q.values) return OUT_OF_MEMORY;
    q.scale = (float *)(q.values + padded * m->depth);
    quantise_all(&q, x, rows, processor);
  }
  if (threads > 1) {
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < m->panels; panel += chunk)
      some_panels(m, &q, x, rows, y, panel, chunk, processor);
  } else
    for (int64_t panel = 0; panel < m->panels; panel += chunk)
      some_panels(m, &q, x, rows, y, panel, chunk, processor);
  if (q.values != small) free(q.values);
  return 0;
}

/* Rows of weights [outputs, inputs] into panels; `shift` as in Matrix. */
void trmt_pack_int8(const int8_t *w, int64_t outputs, int64_t inputs, int64_t depth, int8_t *packed,
                    int32_t *shift) {
  for (int64_t n = 0; n < outputs; n++) {
    int8_t *panel = packed + n / PANEL * PANEL * depth + n % PANEL * 4;
    int32_t sum = 0;
    for (int64_t k = 0; k < inputs; k++) {
      panel[k / 4 * 4 * PANEL + k % 4] = w[n * inputs + k];
      sum += w[n * inputs + k];
    }
    shift[n] = 128 * sum;
  }
}

void trmt_pack_fp32(const float *w, int64_t outputs, int64_t inputs, float *packed) {
  for (int64_t n = 0; n < outputs; n++)
    for (int64_t k = 0; k < inputs; k++)
      packed[n / PANEL * PANEL * inputs + k * PANEL + n % PANEL] = w[n * inputs + k];
}
