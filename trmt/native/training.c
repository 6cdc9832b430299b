/* What training on the CPU computes beside its matrix products, each in one pass over memory.

   Composed of PyTorch's operations, each of these would go over its tensors three to six times and draw
   dropout from a slow generator. The Python side is training.py; the same in plain PyTorch is in
   trmt/nets/layers.py. Rows are a multiple of LANES wide, those of logits aside.

   Activations and their gradients are fp32 or bf16; arithmetic, weights, and sums over rows are fp32.

   Plain C with the vector types of gcc and clang, compiled for the kind of processor that it runs on. Sums
   over rows are made in blocks of fixed size, so that results do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 64 }; /* floats of a vector; rows of a block that is summed by itself */
enum { OUT_OF_RANGE = 1, OUT_OF_MEMORY = 2 }; /* what kernels return that can fail; as in products.h */

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float f) { return (vec){0} + f; }

#if !defined(__clang__) && __GNUC__ < 12
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#else
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

INLINE vec where(ivec condition, vec a, vec b) { return (vec)(((ivec)a & condition) | ((ivec)b & ~condition)); }
INLINE vec larger(vec a, vec b) { return where(a > b, a, b); }

/* Over all lanes by halves: fewer steps that wait for each other than one lane after another. */
#define OVER_LANES(v, join)                                                                          \
  v = join(v, PICK(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));                     \
  v = join(v, PICK(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));                     \
  v = join(v, PICK(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));                     \
  v = join(v, PICK(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));                     \
  return v[0];

#define PLUS(a, b) ((a) + (b))

INLINE float sum(vec v) { OVER_LANES(v, PLUS) }
INLINE float largest(vec v) { OVER_LANES(v, larger) }

/* e to the x for x <= 0, to 2 units in the last place; 0 where x is below -87. */
INLINE vec exponential(vec x) {
  ivec tiny = x < -87.0f;
  x = (vec)((ivec)x & ~tiny); /* keeps the shift below in range; the result is dropped anyway */
  vec n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  vec scale = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
  return (vec)((ivec)(y * scale) & ~tiny);
}

/* Dropout: element (row, column) of call `seed` is kept or not by a hash, so that nothing is stored and
   the backward pass draws the same again. */

INLINE uint32_t row_key(uint64_t seed, int64_t row) { /* splitmix64 */
  uint64_t z = seed + (uint64_t)(row + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (uint32_t)((z ^ (z >> 31)) >> 16);
}

/* The factors of LANES elements: `scale`, or 0 for those that are dropped. */
INLINE vec kept(uint32_t key, int64_t column, uint32_t threshold, float scale) {
  const uvec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  uvec x = key + ((uint32_t)column + lanes) * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return (vec)((uvec)all(scale) & (uvec)((x ^ (x >> 16)) >= threshold));
}

INLINE int64_t end_of(int64_t from, int64_t rows) { return from + ROWS < rows ? from + ROWS : rows; }

/* bf16: the upper half of a float, rounded to the nearest, to even in the middle. */

typedef uint16_t bf16;
typedef bf16 hvec __attribute__((vector_size(32), aligned(2)));

INLINE float float_of(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
INLINE bf16 rounded(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  uint32_t up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return f != f ? 0x7fc0 : up;
}
#ifdef __AVX512F__ /* gcc would compile the code below to conversions of half vectors */
INLINE vec load_bf16(const bf16 *p) {
  return (vec)((uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)) << 16);
}
INLINE void store_bf16(bf16 *p, vec v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  uvec bits = (uvec)v, up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  __m512i halves = _mm512_mask_set1_epi32((__m512i)up, nan, 0x7fc0);
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(halves));
#endif
}
#else
INLINE vec load_bf16(const bf16 *p) {
  return (vec)(__builtin_convertvector(*(const hvec *)p, uvec) << 16);
}
INLINE void store_bf16(bf16 *p, vec v) {
  uvec bits = (uvec)v, up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (uvec)(v != v);
  *(hvec *)p = __builtin_convertvector((up & ~nan) | (0x7fc0 & nan), hvec);
}
#endif

typedef struct {
  int64_t rows, width;
  uint64_t seed;
  uint32_t threshold; /* of dropout; 0 keeps everything */
  float scale, epsilon;
} Shape;

/* Attention over sentences that stand in a row without padding. Row i of the queries begins at
   query + i * query_stride; head h takes columns h * head_dim up to (h + 1) * head_dim, and head_dim is a multiple
   of LANES. Sentence s has the rows query_starts[s] up to query_starts[s + 1], and attends to the rows
   key_starts[s] up to key_starts[s + 1] of keys and values. */

typedef struct {
  const void *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  const int64_t *query_starts, *key_starts;
  int64_t sentences, heads, head_dim;
  int64_t causal;
  float scale;
} Attention;

typedef struct {
  void *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
} Gradients;

/* c [R, n] = a [R, k] b [k, n]; element (i, j) of a lies at a[i * row + j * column]. */
#define PRODUCT_OF(R)                                                                                \
  INLINE void product_##R(int64_t n, int64_t k, const float *a, int64_t row, int64_t column,         \
                          const float *b, int64_t b_stride, float *c, int64_t c_stride) {            \
    for (int64_t j = 0; j < n; j += LANES) {                                                         \
      vec acc[R];                                                                                    \
      for (int u = 0; u < R; u++) acc[u] = all(0);                                                   \
      for (int64_t l = 0; l < k; l++) {                                                              \
        vec right = load(b + l * b_stride + j);                                                      \
        for (int u = 0; u < R; u++) acc[u] += a[u * row + l * column] * right;                       \
      }                                                                                              \
      for (int u = 0; u < R; u++) store(c + u * c_stride + j, acc[u]);                               \
    }                                                                                                \
  }
PRODUCT_OF(1)
PRODUCT_OF(2)
PRODUCT_OF(3)
PRODUCT_OF(4)
PRODUCT_OF(5)
PRODUCT_OF(6)
PRODUCT_OF(7)
PRODUCT_OF(8)

/* The same for any number of rows, in as few and as even blocks as there are registers for. */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t row, int64_t column,
                    const float *b, int64_t b_stride, float *c, int64_t c_stride) {
  for (int64_t i = 0; i < m;) {
    int64_t left = m - i, blocks = (left + 7) / 8, block = (left + blocks - 1) / blocks;
    const float *ai = a + i * row;
    float *ci = c + i * c_stride;
    switch (block) {
    case 1: product_1(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 2: product_2(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 3: product_3(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 4: product_4(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 5: product_5(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 6: product_6(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    case 7: product_7(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    default: product_8(n, k, ai, row, column, b, b_stride, ci, c_stride); break;
    }
    i += block;
  }
}

/* Transposes a square of vectors: smaller and smaller squares within it are exchanged. */
INLINE void transpose_square(vec v[LANES]) {
#define EXCHANGE(step, FIRST, SECOND)                                                                \
  for (int i = 0; i < LANES; i++)                                                                    \
    if (!(i & step)) {                                                                               \
      vec a = v[i], b = v[i + step];                                                                 \
      v[i] = FIRST, v[i + step] = SECOND;                                                            \
    }
  EXCHANGE(8, PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
           PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
  EXCHANGE(4, PICK(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
           PICK(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  EXCHANGE(2, PICK(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
           PICK(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  EXCHANGE(1, PICK(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
           PICK(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef EXCHANGE
}

INLINE int64_t whole_lanes(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* Turns scores into weights, row by row; `norms` is the logarithm of each row's sum, written unless `known`. */
INLINE void softmax(float *scores, int64_t rows, int64_t keys, int64_t width, const Attention *a,
                    float *norms, int64_t norm_stride, int known) {
  const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t i = 0; i < rows; i++) {
    float *x = scores + i * width;
    int64_t seen = a->causal && i + 1 < keys ? i + 1 : keys;
    vec high = all(-INFINITY), total = all(0);
    for (int64_t j = 0; j < width; j += LANES) {
      vec scaled = where(lanes < (int32_t)(seen - j), load(x + j) * a->scale, all(-INFINITY));
      high = larger(scaled, high);
      store(x + j, scaled);
    }
    float shift = known ? norms[i * norm_stride] : largest(high);
    for (int64_t j = 0; j < width; j += LANES) {
      vec e = exponential(load(x + j) - shift);
      total += e;
      store(x + j, e);
    }
    if (known) continue;
    float denominator = sum(total), factor = 1.0f / denominator;
    norms[i * norm_stride] = shift + logf(denominator);
    for (int64_t j = 0; j < width; j++) x[j] *= factor;
  }
}

static int64_t longest(const int64_t *starts, int64_t sentences) {
  int64_t most = 0;
  for (int64_t s = 0; s < sentences; s++)
    if (starts[s + 1] - starts[s] > most) most = starts[s + 1] - starts[s];
  return most;
}

/* Scratch memory of a thread; 0 where there is none left. */
static float *scratch(int64_t floats) { return aligned_alloc(64, whole_lanes(floats + 1) * sizeof(float)); }

/* Everything for activations in fp32, and again for activations in bf16. */

#define REAL float
#define NAME(name) name##_fp32
#define GET(x) (x)
#define PUT(x) (x)
#define LOAD load
#define STORE store
#include "training_kernels.h"

#define REAL bf16
#define NAME(name) name##_bf16
#define GET float_of
#define PUT rounded
#define LOAD load_bf16
#define STORE store_bf16
#include "training_kernels.h"
