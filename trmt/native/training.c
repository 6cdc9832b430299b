/* What training on the CPU computes beside its matrix products, each in one pass over memory.

   Composed of PyTorch's operations, each of these would go over its tensors three to six times and draw
   dropout from a slow generator. The Python side is training.py; the same in plain PyTorch is in trmt/nets/layers.py.

   Plain C with the vector types of gcc and clang, compiled for the kind of processor that it runs on. Sums
   over rows are made in blocks of fixed size, so that results do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16, ROWS = 64 }; /* floats of a vector; rows of a block that is summed by itself */

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float f) { return (vec){0} + f; }

#if !defined(__clang__) && __GNUC__ < 12
#define PICK(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#else
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif

INLINE vec larger(vec a, vec b) {
  ivec above = a > b;
  return (vec)(((ivec)a & above) | ((ivec)b & ~above));
}

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

INLINE float kept(uint32_t key, int64_t column, uint32_t threshold, float scale) {
  uint32_t x = key + (uint32_t)column * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return (x ^ (x >> 16)) >= threshold ? scale : 0.0f;
}

/* out = dropout(x) */
static void dropout_rows(const float *restrict x, float *restrict out, int64_t from, int64_t to, int64_t width,
                                uint64_t seed, uint32_t threshold, float scale) {
  for (int64_t row = from; row < to; row++) {
    uint32_t key = row_key(seed, row);
    const float *xr = x + row * width;
    float *outr = out + row * width;
    for (int64_t i = 0; i < width; i++) outr[i] = xr[i] * kept(key, i, threshold, scale);
  }
}

void trmt_dropout(const float *x, float *out, int64_t rows, int64_t width, uint64_t seed,
                  uint32_t threshold, float scale) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    dropout_rows(x, out, from, from + ROWS < rows ? from + ROWS : rows, width, seed, threshold, scale);
}

/* sum = x + dropout(y); out = norm(sum) * weight + bias. Without `bias` it is the root mean square norm.
   `statistics` receives mean and reciprocal deviation of each row. */

typedef struct {
  int64_t rows, width;
  uint64_t seed;
  uint32_t threshold; /* of dropout; 0 keeps everything */
  float scale, epsilon;
} Shape;

static void add_norm_rows(const Shape *s, const float *x, const float *y, const float *weight,
                                 const float *bias, float *added, float *out, float *statistics,
                                 int64_t from, int64_t to) {
  int64_t width = s->width;
  for (int64_t row = from; row < to; row++) {
    const float *xr = x + row * width, *yr = y + row * width;
    float *ar = added + row * width, *outr = out + row * width;
    if (s->threshold) {
      uint32_t key = row_key(s->seed, row);
      for (int64_t i = 0; i < width; i++) ar[i] = xr[i] + yr[i] * kept(key, i, s->threshold, s->scale);
    } else {
      for (int64_t i = 0; i < width; i++) ar[i] = xr[i] + yr[i];
    }
    float mean = 0, square = 0;
    if (bias) {
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < width; i++) mean += ar[i];
      mean /= width;
    }
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; i++) square += (ar[i] - mean) * (ar[i] - mean);
    float r = 1.0f / sqrtf(square / width + s->epsilon);
    statistics[2 * row] = mean, statistics[2 * row + 1] = r;
    if (bias)
      for (int64_t i = 0; i < width; i++) outr[i] = (ar[i] - mean) * r * weight[i] + bias[i];
    else
      for (int64_t i = 0; i < width; i++) outr[i] = ar[i] * r * weight[i];
  }
}

void trmt_add_norm(const Shape *s, const float *x, const float *y, const float *weight, const float *bias,
                   float *added, float *out, float *statistics) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < s->rows; from += ROWS)
    add_norm_rows(s, x, y, weight, bias, added, out, statistics, from,
                  from + ROWS < s->rows ? from + ROWS : s->rows);
}

/* The gradients of the above: of x and, where dropout makes it another, of y; of weight and bias as one
   row [2, width] of `partial` for each block of rows. `grad_added` may be null. */
static void add_norm_backward_rows(const Shape *s, const float *grad_out, const float *grad_added,
                                          const float *added, const float *weight, const float *statistics,
                                          int centred, float *grad_x, float *grad_y, float *partial,
                                          int64_t from, int64_t to) {
  int64_t width = s->width;
  memset(partial, 0, 2 * width * sizeof(float));
  for (int64_t row = from; row < to; row++) {
    const float *gr = grad_out + row * width, *ar = added + row * width;
    float *gx = grad_x + row * width;
    float mean = statistics[2 * row], r = statistics[2 * row + 1], s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
    for (int64_t i = 0; i < width; i++) {
      float normed = (ar[i] - mean) * r, g = gr[i] * weight[i];
      s1 += g;
      s2 += g * normed;
      partial[i] += gr[i] * normed;
      partial[width + i] += gr[i];
    }
    s1 = centred ? s1 / width : 0.0f;
    s2 /= width;
    for (int64_t i = 0; i < width; i++)
      gx[i] = r * (gr[i] * weight[i] - s1 - (ar[i] - mean) * r * s2);
    if (grad_added)
      for (int64_t i = 0; i < width; i++) gx[i] += grad_added[row * width + i];
    if (s->threshold) {
      uint32_t key = row_key(s->seed, row);
      float *gy = grad_y + row * width;
      for (int64_t i = 0; i < width; i++) gy[i] = gx[i] * kept(key, i, s->threshold, s->scale);
    }
  }
}

void trmt_add_norm_backward(const Shape *s, const float *grad_out, const float *grad_added,
                            const float *added, const float *weight, const float *statistics, int centred,
                            float *grad_x, float *grad_y, float *partial) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < s->rows; from += ROWS)
    add_norm_backward_rows(s, grad_out, grad_added, added, weight, statistics, centred, grad_x, grad_y,
                           partial + from / ROWS * 2 * s->width, from,
                           from + ROWS < s->rows ? from + ROWS : s->rows);
}

/* x = x + bias, in place; then relu if wanted. */
static void add_bias_rows(float *restrict x, const float *restrict bias, int64_t width, int relu, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; row++) {
    float *xr = x + row * width;
    if (relu)
      for (int64_t i = 0; i < width; i++) {
        float v = xr[i] + bias[i];
        xr[i] = v < 0 ? 0.0f : v; /* keeps NaN, so that nothing goes unnoticed */
      }
    else
      for (int64_t i = 0; i < width; i++) xr[i] += bias[i];
  }
}

void trmt_add_bias(float *x, const float *bias, int64_t rows, int64_t width, int relu) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    add_bias_rows(x, bias, width, relu, from, from + ROWS < rows ? from + ROWS : rows);
}

/* The gradient of the bias, as one row of `partial` for each block of rows. With relu's result `out`,
   gradients are first set to 0 where it is 0, which gives `masked`. */
static void bias_backward_rows(const float *restrict grad, const float *restrict out,
                               float *restrict masked, int64_t width, float *restrict partial,
                               int64_t from, int64_t to) {
  memset(partial, 0, width * sizeof(float));
  for (int64_t row = from; row < to; row++) {
    const float *gr = grad + row * width;
    if (out) {
      const float *outr = out + row * width;
      float *mr = masked + row * width;
      for (int64_t i = 0; i < width; i++) {
        mr[i] = outr[i] == 0 ? 0.0f : gr[i];
        partial[i] += mr[i];
      }
    } else {
      for (int64_t i = 0; i < width; i++) partial[i] += gr[i];
    }
  }
}

void trmt_bias_backward(const float *grad, const float *out, float *masked, int64_t rows, int64_t width,
                        float *partial) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    bias_backward_rows(grad, out, masked, width, partial + from / ROWS * width, from,
                       from + ROWS < rows ? from + ROWS : rows);
}

/* Label-smoothed cross-entropy of some rows of logits, which become its gradient. `losses` receives for
   each row the negative log likelihood and the mean over the vocabulary of the same. */
static void cross_entropy_rows(float *logits, const int64_t *target, float *losses, int64_t width,
                                      float smoothing, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; row++) {
    float *x = logits + row * width;
    if (target[row] < 0) { /* padding */
      memset(x, 0, width * sizeof(float));
      losses[2 * row] = losses[2 * row + 1] = 0;
      continue;
    }
    int64_t whole = width / LANES * LANES;
    vec high = all(x[0]), total = all(0), exponents = all(0);
    for (int64_t i = 0; i < whole; i += LANES) {
      vec v = load(x + i);
      high = larger(v, high);
      total += v;
    }
    float most = largest(high), sum_logits = sum(total);
    for (int64_t i = whole; i < width; i++) sum_logits += x[i], most = x[i] > most ? x[i] : most;
    float picked = x[target[row]] - most;
    for (int64_t i = 0; i < whole; i += LANES) {
      vec e = exponential(load(x + i) - most);
      exponents += e;
      store(x + i, e);
    }
    float sum_exponents = sum(exponents);
    for (int64_t i = whole; i < width; i++) sum_exponents += x[i] = expf(x[i] - most);
    float log_sum = logf(sum_exponents), factor = 1.0f / sum_exponents, spread = smoothing / width;
    losses[2 * row] = log_sum - picked;
    losses[2 * row + 1] = log_sum + most - sum_logits / width;
    for (int64_t i = 0; i < width; i++) x[i] = x[i] * factor - spread;
    x[target[row]] -= 1.0f - smoothing;
  }
}

/* Returns 1 and does nothing if a target is no column. */
int trmt_cross_entropy(float *logits, const int64_t *target, float *losses, int64_t rows, int64_t width,
                       float smoothing) {
  for (int64_t row = 0; row < rows; row++)
    if (target[row] >= width) return 1;
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += 8)
    cross_entropy_rows(logits, target, losses, width, smoothing, from, from + 8 < rows ? from + 8 : rows);
  return 0;
}

/* Attention over sentences that stand in a row without padding. Row i of the queries begins at
   query + i * query_stride; head h takes columns h * head_dim up to (h + 1) * head_dim, and head_dim is a multiple
   of LANES. Sentence s has the rows query_starts[s] up to query_starts[s + 1], and attends to the rows
   key_starts[s] up to key_starts[s + 1] of keys and values. */

typedef struct {
  const float *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  const int64_t *query_starts, *key_starts;
  int64_t sentences, heads, head_dim;
  int64_t causal;
  float scale;
} Attention;

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

/* out [head_dim, width] = rows [length, head_dim] transposed, with zeros behind `length`. */
INLINE void transpose(const float *rows, int64_t stride, int64_t length, int64_t head_dim, float *out,
                   int64_t width) {
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t p = 0; p < head_dim; p += LANES) {
      vec square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = j + i < length ? load(rows + (j + i) * stride + p) : all(0);
      transpose_square(square);
      for (int i = 0; i < LANES; i++) store(out + (p + i) * width + j, square[i]);
    }
}

INLINE int64_t whole_lanes(int64_t length) { return (length + LANES - 1) / LANES * LANES; }

/* Turns scores into weights, row by row; `norms` is the logarithm of each row's sum, written unless `known`. */
INLINE void softmax(float *scores, int64_t rows, int64_t keys, int64_t width, const Attention *a,
                    float *norms, int64_t norm_stride, int known) {
  for (int64_t i = 0; i < rows; i++) {
    float *x = scores + i * width;
    int64_t seen = a->causal && i + 1 < keys ? i + 1 : keys;
    for (int64_t j = seen; j < width; j++) x[j] = -INFINITY;
    vec high = all(-INFINITY), total = all(0);
    for (int64_t j = 0; j < width; j += LANES) {
      vec scaled = load(x + j) * a->scale;
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

static void attention_head(const Attention *a, int64_t sentence, int64_t head, float *space,
                                  float *out, float *norms) {
  int64_t first = a->query_starts[sentence], rows = a->query_starts[sentence + 1] - first;
  int64_t first_key = a->key_starts[sentence], keys = a->key_starts[sentence + 1] - first_key;
  int64_t head_dim = a->head_dim, width = whole_lanes(keys), out_stride = a->heads * head_dim;
  const float *query = a->query + first * a->query_stride + head * head_dim;
  const float *key = a->key + first_key * a->key_stride + head * head_dim;
  const float *value = a->value + first_key * a->value_stride + head * head_dim;
  float *transposed_keys = space, *scores = space + head_dim * width;
  transpose(key, a->key_stride, keys, head_dim, transposed_keys, width);
  product(rows, width, head_dim, query, a->query_stride, 1, transposed_keys, width, scores, width);
  softmax(scores, rows, keys, width, a, norms + first * a->heads + head, a->heads, 0);
  product(rows, head_dim, keys, scores, width, 1, value, a->value_stride,
          out + first * out_stride + head * head_dim, out_stride);
}

static int64_t longest(const int64_t *starts, int64_t sentences) {
  int64_t most = 0;
  for (int64_t s = 0; s < sentences; s++)
    if (starts[s + 1] - starts[s] > most) most = starts[s + 1] - starts[s];
  return most;
}

/* Scratch memory of a thread; 0 where there is none left. */
static float *scratch(int64_t floats) { return aligned_alloc(64, whole_lanes(floats + 1) * sizeof(float)); }

int trmt_attention(const Attention *a, float *out, float *norms) {
  int64_t width = whole_lanes(longest(a->key_starts, a->sentences));
  int64_t rows = longest(a->query_starts, a->sentences);
  int short_of_memory = 0;
#pragma omp parallel
  {
    float *space = scratch((a->head_dim + rows) * width);
    if (!space) {
#pragma omp atomic write
      short_of_memory = 1;
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < a->sentences * a->heads; item++)
      if (space) attention_head(a, item / a->heads, item % a->heads, space, out, norms);
    free(space);
  }
  return short_of_memory;
}

typedef struct {
  float *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
} Gradients;

static void attention_head_backward(const Attention *a, int64_t sentence, int64_t head,
                                           float *space, const float *grad_out, const float *norms,
                                           const Gradients *g) {
  int64_t first = a->query_starts[sentence], rows = a->query_starts[sentence + 1] - first;
  int64_t first_key = a->key_starts[sentence], keys = a->key_starts[sentence + 1] - first_key;
  int64_t head_dim = a->head_dim, width = whole_lanes(keys), out_stride = a->heads * head_dim;
  const float *query = a->query + first * a->query_stride + head * head_dim;
  const float *key = a->key + first_key * a->key_stride + head * head_dim;
  const float *value = a->value + first_key * a->value_stride + head * head_dim;
  const float *grad = grad_out + first * out_stride + head * head_dim;
  float *flat = space, *weights = space + head_dim * width, *grads = weights + rows * width;
  transpose(key, a->key_stride, keys, head_dim, flat, width);
  product(rows, width, head_dim, query, a->query_stride, 1, flat, width, weights, width);
  softmax(weights, rows, keys, width, a, (float *)norms + first * a->heads + head, a->heads, 1);
  transpose(value, a->value_stride, keys, head_dim, flat, width);
  product(rows, width, head_dim, grad, out_stride, 1, flat, width, grads, width);
  for (int64_t i = 0; i < rows; i++) {
    vec both = all(0);
    float *w = weights + i * width, *d = grads + i * width;
    for (int64_t j = 0; j < width; j += LANES) both += load(w + j) * load(d + j);
    float mean = sum(both);
    for (int64_t j = 0; j < width; j++) d[j] = w[j] * (d[j] - mean) * a->scale;
  }
  product(rows, head_dim, keys, grads, width, 1, key, a->key_stride,
          g->query + first * g->query_stride + head * head_dim, g->query_stride);
  product(keys, head_dim, rows, grads, 1, width, query, a->query_stride,
          g->key + first_key * g->key_stride + head * head_dim, g->key_stride);
  product(keys, head_dim, rows, weights, 1, width, grad, out_stride,
          g->value + first_key * g->value_stride + head * head_dim, g->value_stride);
}

int trmt_attention_backward(const Attention *a, const float *grad_out, const float *norms,
                            const Gradients *g) {
  int64_t width = whole_lanes(longest(a->key_starts, a->sentences));
  int64_t rows = longest(a->query_starts, a->sentences);
  int short_of_memory = 0;
#pragma omp parallel
  {
    float *space = scratch((a->head_dim + 2 * rows) * width);
    if (!space) {
#pragma omp atomic write
      short_of_memory = 1;
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < a->sentences * a->heads; item++)
      if (space) attention_head_backward(a, item / a->heads, item % a->heads, space, grad_out, norms, g);
    free(space);
  }
  return short_of_memory;
}
