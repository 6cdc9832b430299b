/* One step of a Transformer's decoder, all layers of it, for one new token of each hypothesis.

   Composed of PyTorch's operations a step takes hundreds of calls, which for few rows is most of its time.
   trmt/arch/stepping.py has the same in plain PyTorch, and holds what is cached.

   Between the products, norms and attention compute in double precision and round to fp32 once. So whoever
   computes the same in another order (PyTorch, other vector lengths) gets the same fp32 numbers but for a
   rounding in many millions, and int8 products after it hardly ever see that one. */

#include "products.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { WIDE = 8, WIDEST_HEAD = 256 };

typedef double wide __attribute__((vector_size(8 * WIDE), aligned(8)));
typedef int64_t wide_bits __attribute__((vector_size(8 * WIDE), aligned(8)));
typedef float narrow __attribute__((vector_size(4 * WIDE), aligned(4)));

typedef struct {
  const float *weight, *bias; /* without bias it is the root mean square norm */
} Norm;

typedef struct {
  const Matrix *own, *own_out, *query, *cross_out, *inner, *outer;
} Layer;

typedef struct {
  int64_t layers, width, heads, feed; /* sizes */
  int64_t pre_norm, processor;
  double epsilon;
  float embedding_scale;
  const float *embedding; /* [V, D] */
  const float *positions; /* [longest, D] */
  const Layer *layer;
  const Norm *norms; /* of each sublayer in turn, and with pre_norm a last one */
} Network;

typedef struct {
  int64_t sentences, hypotheses, room, length; /* S, K, columns there is space for, source positions */
  const int64_t *tokens;                       /* [S, K] */
  const int64_t *position;                     /* [S], where this token stands */
  int32_t *table;                              /* [S, K, room]: which hypothesis made the ancestor's column */
  float *cache;                                /* [layers, 2, S, room, K, D]: keys, values */
  const float *memory;                         /* [S, 2 * layers, L, D]: keys, values of the source */
  const float *mask;                           /* [S, L]: 0 where there is source */
  float *hidden;                               /* [S, K, D]: the result */
} Step;

/* Where the keys of one row are: `offset` from the first key, and from the first value. */
typedef struct {
  const float *keys, *values;
  const int64_t *offset;
  int64_t count;
} Seen;

INLINE wide widened(const float *p) { return __builtin_convertvector(*(const narrow *)p, wide); }

INLINE double total(wide v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

/* e to the x for x <= 0; what is below -708 counts as that. */
INLINE wide wide_exponential(wide x) {
  wide_bits low = x < -708.0;
  x = (wide)(((wide_bits)((wide){0} - 708.0) & low) | ((wide_bits)x & ~low));
  wide shifted = x * 1.4426950408889634 + 6755399441055744.0; /* its lowest bits are the whole number */
  wide n = shifted - 6755399441055744.0;
  wide r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  static const double terms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                 1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                 0.5,             1.0,            1.0};
  wide y = (wide){0} + 1.0 / 6227020800;
  for (int i = 0; i < 13; i++) y = y * r + terms[i];
  return y * (wide)(((wide_bits)shifted + 1023) << 52);
}

/* x += added where there is something to add; out = norm(x) */
INLINE void norm_row(const Network *n, const Norm *norm, float *x, const float *added, float *out) {
  int64_t width = n->width;
  wide sum = {0}, square = {0};
  if (added)
    for (int64_t i = 0; i < width; i++) x[i] += added[i];
  double mean = 0;
  if (norm->bias) {
    for (int64_t i = 0; i < width; i += WIDE) sum += widened(x + i);
    mean = total(sum) / width;
  }
  for (int64_t i = 0; i < width; i += WIDE) {
    wide d = widened(x + i) - mean;
    square += d * d;
  }
  double scale = 1.0 / sqrt(total(square) / width + n->epsilon);
  for (int64_t i = 0; i < width; i += WIDE) {
    wide y = (widened(x + i) - mean) * scale * widened(norm->weight + i);
    if (norm->bias) y += widened(norm->bias + i);
    *(narrow *)(out + i) = __builtin_convertvector(y, narrow);
  }
}

/* One head of one row; `weights` has space for all keys, rounded up to WIDE. */
INLINE void attend_head(const float *query, const Seen *seen, int64_t from, int64_t part, double *weights,
                        float *out) {
  double scale = 1.0 / sqrt((double)part), most = -INFINITY, sum = 0;
  wide q[WIDEST_HEAD / WIDE];
  for (int64_t p = 0; p < part; p += WIDE) q[p / WIDE] = widened(query + from + p);
  for (int64_t j = 0; j < seen->count; j++) {
    const float *key = seen->keys + seen->offset[j] + from;
    wide dot = {0};
    for (int64_t p = 0; p < part; p += WIDE) dot += q[p / WIDE] * widened(key + p);
    weights[j] = total(dot) * scale;
    most = weights[j] > most ? weights[j] : most;
  }
  for (int64_t j = seen->count; j % WIDE; j++) weights[j] = most;
  for (int64_t j = 0; j < seen->count; j += WIDE)
    *(wide *)(weights + j) = wide_exponential(*(wide *)(weights + j) - most);
  for (int64_t j = 0; j < seen->count; j++) sum += weights[j];
  for (int64_t p = 0; p < part; p += WIDE) q[p / WIDE] = (wide){0};
  for (int64_t j = 0; j < seen->count; j++) {
    const float *value = seen->values + seen->offset[j] + from;
    double weight = weights[j] / sum;
    for (int64_t p = 0; p < part; p += WIDE) q[p / WIDE] += weight * widened(value + p);
  }
  for (int64_t p = 0; p < part; p += WIDE)
    *(narrow *)(out + from + p) = __builtin_convertvector(q[p / WIDE], narrow);
}

INLINE void attend_row(const Network *n, const float *query, const Seen *seen, double *weights, float *out) {
  int64_t part = n->width / n->heads;
  for (int64_t head = 0; head < n->heads; head++) {
    if (part == 64) /* the usual one, with loops of known length */
      attend_head(query, seen, head * 64, 64, weights, out);
    else if (part == 32)
      attend_head(query, seen, head * 32, 32, weights, out);
    else
      attend_head(query, seen, head * part, part, weights, out);
  }
}

/* The same for each kind of processor. */
#define VARIANT(name, target)                                                                                 \
  static target void norm_##name(const Network *n, const Norm *norm, float *x, const float *added, float *out) { \
    norm_row(n, norm, x, added, out);                                                                         \
  }                                                                                                           \
  static target void attend_##name(const Network *n, const float *query, const Seen *seen, double *weights,     \
                                   float *out) {                                                              \
    attend_row(n, query, seen, weights, out);                                                                 \
  }
VARIANT(plain, )
#if defined(__x86_64__)
VARIANT(avx2, __attribute__((target("avx2"))))
VARIANT(avx512, __attribute__((target("avx2,avx512f,avx512dq,avx512vl,avx512bw"))))
#endif

static void normed(const Network *n, const Norm *norm, float *x, const float *added, float *out) {
#if defined(__x86_64__)
  if (n->processor >= AVX512_VNNI) return norm_avx512(n, norm, x, added, out);
  if (n->processor >= AVX2) return norm_avx2(n, norm, x, added, out);
#endif
  norm_plain(n, norm, x, added, out);
}

static void attended(const Network *n, const float *query, const Seen *seen, double *weights, float *out) {
#if defined(__x86_64__)
  if (n->processor >= AVX512_VNNI) return attend_avx512(n, query, seen, weights, out);
  if (n->processor >= AVX2) return attend_avx2(n, query, seen, weights, out);
#endif
  attend_plain(n, query, seen, weights, out);
}

/* The row's ancestors in the cache of a layer. */
static Seen look_back(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t sentence = row / s->hypotheses, count = s->position[sentence] + 1;
  int64_t all = s->sentences * s->room * s->hypotheses * n->width;
  const int32_t *table = s->table + row * s->room;
  for (int64_t c = 0; c < count; c++)
    offset[c] = ((sentence * s->room + c) * s->hypotheses + table[c]) * n->width;
  return (Seen){s->cache + 2 * layer * all, s->cache + (2 * layer + 1) * all, offset, count};
}

static Seen look_over(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t sentence = row / s->hypotheses, count = 0;
  const float *mask = s->mask + sentence * s->length;
  const float *keys = s->memory + (sentence * 2 * n->layers + 2 * layer) * s->length * n->width;
  for (int64_t l = 0; l < s->length; l++)
    if (mask[l] == 0) offset[count++] = l * n->width;
  return (Seen){keys, keys + s->length * n->width, offset, count};
}

/* Keys and values of the new tokens into the cache. */
static void store(const Network *n, const Step *s, int64_t layer, const float *merged) {
  int64_t width = n->width, all = s->sentences * s->room * s->hypotheses * width;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) {
    int64_t sentence = row / s->hypotheses, column = sentence * s->room + s->position[sentence];
    int64_t place = (column * s->hypotheses + row % s->hypotheses) * width;
    for (int part = 0; part < 2; part++)
      memcpy(s->cache + (2 * layer + part) * all + place, merged + (3 * row + 1 + part) * width, width * 4);
  }
}

static void attend_all(const Network *n, const Step *s, int64_t layer, const float *query, int64_t stride,
                       int back, float *out) {
  int64_t rows = s->sentences * s->hypotheses, most = s->room > s->length ? s->room : s->length;
#pragma omp parallel if (rows > 8)
  {
    double *weights = aligned_alloc(64, (most + 64) / 64 * 64 * 16);
    int64_t *offset = (int64_t *)(weights + (most + 64) / 64 * 64);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
      Seen seen = (back ? look_back : look_over)(n, s, layer, row, offset);
      attended(n, query + row * stride, &seen, weights, out + row * n->width);
    }
    free(weights);
  }
}

static void norm_all(const Network *n, int64_t rows, const Norm *norm, float *x, const float *added, float *out) {
#pragma omp parallel for schedule(static) if (rows > 32)
  for (int64_t row = 0; row < rows; row++)
    normed(n, norm, x + row * n->width, added ? added + row * n->width : 0, out + row * n->width);
}

static void embed(const Network *n, const Step *s, float *x) {
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) {
    const float *from = n->embedding + s->tokens[row] * n->width;
    const float *position = n->positions + s->position[row / s->hypotheses] * n->width;
    for (int64_t i = 0; i < n->width; i++) x[row * n->width + i] = from[i] * n->embedding_scale + position[i];
  }
}

void trmt_step(const Network *n, const Step *s) {
  int64_t rows = s->sentences * s->hypotheses, width = n->width;
  int64_t most = n->feed > 3 * width ? n->feed : 3 * width;
  float *x = aligned_alloc(64, (rows * (3 * width + most) * 4 + 63) / 64 * 64);
  float *found = x + rows * width, *added = found + rows * width, *inner = added + rows * width;
  float *normal = s->hidden; /* what a sublayer reads: with pre_norm apart from the sum `x` */
  embed(n, s, x);
  if (n->pre_norm)
    norm_all(n, rows, n->norms, x, 0, normal);
  else
    memcpy(normal, x, rows * width * 4);
  for (int64_t row = 0; row < rows; row++)
    s->table[row * s->room + s->position[row / s->hypotheses]] = row % s->hypotheses;
  for (int64_t i = 0; i < 3 * n->layers; i++) {
    const Layer *layer = n->layer + i / 3;
    if (i % 3 == 0) {
      trmt_product(layer->own, normal, rows, inner, n->processor);
      store(n, s, i / 3, inner);
      attend_all(n, s, i / 3, inner, 3 * width, 1, found);
      trmt_product(layer->own_out, found, rows, added, n->processor);
    } else if (i % 3 == 1) {
      trmt_product(layer->query, normal, rows, inner, n->processor);
      attend_all(n, s, i / 3, inner, width, 0, found);
      trmt_product(layer->cross_out, found, rows, added, n->processor);
    } else {
      trmt_product(layer->inner, normal, rows, inner, n->processor);
      trmt_product(layer->outer, inner, rows, added, n->processor);
    }
    norm_all(n, rows, n->norms + i + n->pre_norm, n->pre_norm ? x : normal, added, normal);
  }
  free(x);
}
