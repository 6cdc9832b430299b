/* One decoding step of a Transformer's decoder, all layers of it, for one new token of each hypothesis.

   Composed of PyTorch's operations a step takes hundreds of calls, which for few rows is most of its time. The same
   in plain PyTorch is `step` in trmt/nets/transformer.py. Instead of self-attention a layer can have a simpler
   simple recurrent unit (`ssru`, trmt/nets/ssru.py).

   Between the products, norms, attention and recurrence compute in double precision and round to fp32 once. So an
   implementation that adds in another order (PyTorch, other vector lengths) gets the same fp32 numbers but for a
   rounding in many millions, and int8 products after it hardly ever differ for that one.

   Sizes and shapes were checked where the structures were filled (transformer.py). Ids and positions, which change
   with each call, are checked here. */

#include "products.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef struct {
  const float *weight, *bias; /* without bias it is RMSNorm */
} Norm;

typedef struct {
  const Matrix *self_in, *self_out, *cross_query, *cross_out, *inner, *outer; /* an SSRU has no self_out */
} Layer;

typedef struct {
  int64_t layers, width, heads, feed_forward; /* sizes; width is the hidden size */
  int64_t pre_norm, ssru, processor;
  int64_t vocabulary, max_positions; /* rows of the tables of embeddings and positions */
  double epsilon;
  float embedding_scale;
  const float *embedding; /* [vocabulary, D] */
  const float *positions; /* [max_positions, D] */
  const Layer *layer;
  const Norm *norms; /* of each sublayer in turn, and with pre_norm a last one */
} Network;

typedef struct {
  int64_t sentences, hypotheses, columns, length; /* S, K, target positions there is space for, source positions */
  int64_t slots, sources;                         /* sentences that the cache has space for, and the memory */
  int64_t *tokens;                                /* [S, K] */
  int64_t *position;                              /* [S], of these tokens */
  int32_t *ancestors;                             /* [S, K, columns]: which hypothesis made the ancestor's column */
  const int64_t *slot;                            /* [S], of each sentence in the cache */
  float *cache;        /* [layers, 2, slots, columns, K, D]: keys, values; of an SSRU cells [layers, slots, K, D] */
  const int64_t *source;                          /* [S], which of the sources each sentence has */
  const float *memory;                            /* [.., 2 * layers, L, D]: cross-attention keys, values */
  const float *mask;                              /* [.., L]: 0 where there is source */
  float *hidden;                                  /* [S, K, D]: the result */
} Step;

/* The keys that one row attends to: their offsets from the first key, and from the first value. */
typedef struct {
  const float *keys, *values;
  const int64_t *offset;
  int64_t count;
} Keys;

/* Scratch memory of attention for one row: [D] sums, [heads, keys] weights. */
typedef struct {
  double *sums, *weights;
  int64_t keys;
} Scratch;

enum { AHEAD = 1 << 10 }; /* numbers that are fetched while others are read, measured */

/* Prefetches what is read after row `at` of keys, then values, then the keys of the next one. */
INLINE void fetch(const Keys *keys, const Keys *next, int64_t at, int64_t width) {
  int64_t count = keys->count;
  const float *row;
  at += AHEAD / width + 1;
  if (at < count)
    row = keys->keys + keys->offset[at];
  else if (at < 2 * count)
    row = keys->values + keys->offset[at - count];
  else if (at - 2 * count < next->count)
    row = next->keys + next->offset[at - 2 * count];
  else
    return;
  for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + i);
}

#define NAME(x) plain_##x
#define TARGET
#define WIDE 2
#define WIDENED(p) __builtin_convertvector(*(const plain_narrow *)(p), plain_wide)
#define NARROWED(v) __builtin_convertvector(v, plain_narrow)
#define FUSED(a, b, c) ((a) * (b) + (c))
#define TOTAL(v) ((v)[0] + (v)[1])
#include "rows.h"
#undef NAME
#undef TARGET
#undef WIDE
#undef WIDENED
#undef NARROWED
#undef FUSED
#undef TOTAL

#if defined(__x86_64__)
#define NAME(x) avx2_##x
#define TARGET __attribute__((target("avx2,fma")))
#define WIDE 4
#define WIDENED(p) ((avx2_wide)_mm256_cvtps_pd(_mm_loadu_ps(p)))
#define NARROWED(v) ((avx2_narrow)_mm256_cvtpd_ps(v))
#define FUSED(a, b, c) ((avx2_wide)_mm256_fmadd_pd(a, b, c))
#define TOTAL(v) (((v)[0] + (v)[2]) + ((v)[1] + (v)[3]))
#include "rows.h"
#undef NAME
#undef TARGET
#undef WIDE
#undef WIDENED
#undef NARROWED
#undef FUSED
#undef TOTAL

#define NAME(x) avx512_##x
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512dq,avx512vl,avx512bw")))
#define WIDE 8
#define WIDENED(p) ((avx512_wide)_mm512_cvtps_pd(_mm256_loadu_ps(p)))
#define NARROWED(v) ((avx512_narrow)_mm512_cvtpd_ps(v))
#define FUSED(a, b, c) ((avx512_wide)_mm512_fmadd_pd(a, b, c))
#define TOTAL(v) _mm512_reduce_add_pd(v)
#include "rows.h"
#undef NAME
#undef TARGET
#undef WIDE
#undef WIDENED
#undef NARROWED
#undef FUSED
#undef TOTAL
#endif

#if defined(__x86_64__)
#define DISPATCH(n, function, ...)                                             \
  do {                                                                         \
    if ((n)->processor >= AVX512_VNNI) avx512_##function(__VA_ARGS__);         \
    else if ((n)->processor >= AVX2) avx2_##function(__VA_ARGS__);             \
    else plain_##function(__VA_ARGS__);                                        \
  } while (0)
#else
#define DISPATCH(n, function, ...) plain_##function(__VA_ARGS__)
#endif

/* The ancestors of a row in the KV cache of a layer. */
static Keys self_keys(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t sentence = row / s->hypotheses, count = s->position[sentence] + 1;
  int64_t all = s->slots * s->columns * s->hypotheses * n->width;
  const int32_t *ancestors = s->ancestors + row * s->columns;
  for (int64_t c = 0; c < count; c++)
    offset[c] = ((s->slot[sentence] * s->columns + c) * s->hypotheses + ancestors[c]) * n->width;
  return (Keys){s->cache + 2 * layer * all, s->cache + (2 * layer + 1) * all, offset, count};
}

/* The source of a row. */
static Keys cross_keys(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t source = s->source[row / s->hypotheses], count = 0;
  const float *mask = s->mask + source * s->length;
  const float *keys = s->memory + (source * 2 * n->layers + 2 * layer) * s->length * n->width;
  for (int64_t l = 0; l < s->length; l++)
    if (mask[l] == 0) offset[count++] = l * n->width;
  return (Keys){keys, keys + s->length * n->width, offset, count};
}

/* Keys and values of the new tokens into the cache. */
static void store(const Network *n, const Step *s, int64_t layer, const float *qkv) {
  int64_t width = n->width, all = s->slots * s->columns * s->hypotheses * width;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) {
    int64_t sentence = row / s->hypotheses, column = s->slot[sentence] * s->columns + s->position[sentence];
    int64_t at = (column * s->hypotheses + row % s->hypotheses) * width;
    for (int kv = 0; kv < 2; kv++)
      memcpy(s->cache + (2 * layer + kv) * all + at, qkv + (3 * row + 1 + kv) * width, width * 4);
  }
}

static Keys keys_of(const Network *n, const Step *s, int64_t layer, int64_t row, int cross, int64_t *offset) {
  return (cross ? cross_keys : self_keys)(n, s, layer, row, offset);
}

static int attend_some(const Network *n, const Step *s, int64_t layer, const float *query, int64_t stride,
                        int cross, float *out, int64_t from, int64_t to) {
  int64_t most = ((s->columns > s->length ? s->columns : s->length) + 7) / 8 * 8;
  double *sums = aligned_alloc(64, (n->width + (n->heads + 2) * most + 7) / 8 * 8 * sizeof(double));
  if (!sums) return OUT_OF_MEMORY;
  Scratch scratch = {sums, sums + n->width, most};
  int64_t *offsets = (int64_t *)(scratch.weights + n->heads * most);
  Keys keys = keys_of(n, s, layer, from, cross, offsets + from % 2 * most);
  for (int64_t row = from; row < to; row++) {
    Keys next = {0};
    if (row + 1 < to) next = keys_of(n, s, layer, row + 1, cross, offsets + (row + 1) % 2 * most);
    DISPATCH(n, attend_row, n, query + row * stride, &keys, &next, &scratch, out + row * n->width);
    keys = next;
  }
  free(sums);
  return 0;
}

static int attend(const Network *n, const Step *s, int64_t layer, const float *query, int64_t stride, int cross,
                   float *out) {
  int64_t rows = s->sentences * s->hypotheses, share = share_of(rows, 8);
  if (share >= rows) return attend_some(n, s, layer, query, stride, cross, out, 0, rows);
  int failed = 0;
#pragma omp parallel for schedule(static) reduction(| : failed)
  for (int64_t row = 0; row < rows; row += share)
    failed |= attend_some(n, s, layer, query, stride, cross, out, row, row + share < rows ? row + share : rows);
  return failed;
}

/* The recurrence of an SSRU: the cells of a layer are updated in place, their relu goes to `out`. */
static void recur(const Network *n, const Step *s, int64_t layer, const float *gate_input, float *out) {
  int64_t width = n->width;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) {
    int64_t slot = s->slot[row / s->hypotheses], hypothesis = row % s->hypotheses;
    float *cell = s->cache + ((layer * s->slots + slot) * s->hypotheses + hypothesis) * width;
    DISPATCH(n, recur_row, width, gate_input + 2 * row * width, cell, out + row * width);
  }
}

static void norm_some(const Network *n, const Norm *norm, float *x, const float *added, float *out, int64_t from,
                      int64_t to) {
  int64_t width = n->width;
  for (int64_t row = from; row < to; row++)
    DISPATCH(n, norm_row, n, norm, x + row * width, added ? added + row * width : 0, out + row * width);
}

/* x += added where there is something to add; out = norm(x) */
static void add_norm(const Network *n, int64_t rows, const Norm *norm, float *x, const float *added, float *out) {
  int64_t share = share_of(rows, 32);
  if (share >= rows) return norm_some(n, norm, x, added, out, 0, rows);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += share)
    norm_some(n, norm, x, added, out, row, row + share < rows ? row + share : rows);
}

static void embed_row(const Network *n, int64_t token, int64_t position, float *x) {
  const float *from = n->embedding + token * n->width, *at = n->positions + position * n->width;
  for (int64_t i = 0; i < n->width; i++) x[i] = from[i] * n->embedding_scale + at[i];
}

static int within(int64_t number, int64_t count) { return 0 <= number && number < count; }

/* Self-attention over the KV cache, or the recurrence in its place. */
static int self_sublayer(const Network *n, const Step *s, int64_t index, const float *x, float *inner, float *out,
                         float *added) {
  const Layer *layer = n->layer + index;
  int64_t rows = s->sentences * s->hypotheses;
  int failed = trmt_product(layer->self_in, x, rows, inner, n->processor);
  if (n->ssru) return recur(n, s, index, inner, added), failed;
  store(n, s, index, inner);
  failed |= attend(n, s, index, inner, 3 * n->width, 0, out);
  return failed | trmt_product(layer->self_out, out, rows, added, n->processor);
}

/* Whether every id and position of a step has its row, and every sentence its slots. */
static int step_within(const Network *n, const Step *s) {
  int64_t positions = !n->ssru && s->columns < n->max_positions ? s->columns : n->max_positions;
  int good = 1;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) good &= within(s->tokens[row], n->vocabulary);
  for (int64_t sentence = 0; sentence < s->sentences; sentence++)
    good &= within(s->position[sentence], positions) & within(s->slot[sentence], s->slots) &
            within(s->source[sentence], s->sources);
  return good;
}

int trmt_step(const Network *n, const Step *s) {
  if (!step_within(n, s)) return OUT_OF_RANGE;
  int64_t rows = s->sentences * s->hypotheses, width = n->width;
  int64_t most = n->feed_forward > 3 * width ? n->feed_forward : 3 * width;
  float *x = aligned_alloc(64, (rows * (3 * width + most) * 4 + 63) / 64 * 64);
  if (!x) return OUT_OF_MEMORY;
  float *out = x + rows * width, *added = out + rows * width, *inner = added + rows * width;
  int failed = 0;
  float *normed = s->hidden; /* the input of a sublayer: with pre_norm apart from the sum `x` */
  for (int64_t row = 0; row < rows; row++)
    embed_row(n, s->tokens[row], s->position[row / s->hypotheses], x + row * width);
  if (n->pre_norm)
    add_norm(n, rows, n->norms, x, 0, normed);
  else
    memcpy(normed, x, rows * width * 4);
  for (int64_t row = 0; row < rows && !n->ssru; row++)
    s->ancestors[row * s->columns + s->position[row / s->hypotheses]] = row % s->hypotheses;
  for (int64_t i = 0; i < 3 * n->layers; i++) {
    const Layer *layer = n->layer + i / 3;
    if (i % 3 == 0) {
      failed |= self_sublayer(n, s, i / 3, normed, inner, out, added);
    } else if (i % 3 == 1) {
      failed |= trmt_product(layer->cross_query, normed, rows, inner, n->processor);
      failed |= attend(n, s, i / 3, inner, width, 1, out);
      failed |= trmt_product(layer->cross_out, out, rows, added, n->processor);
    } else {
      failed |= trmt_product(layer->inner, normed, rows, inner, n->processor);
      failed |= trmt_product(layer->outer, inner, rows, added, n->processor);
    }
    add_norm(n, rows, n->norms + i + n->pre_norm, n->pre_norm ? x : normed, added, normed);
  }
  free(x);
  return failed;
}

/* Rows of a block go on from the rows of their parents. */
static void reorder_block(const int64_t *parents, int64_t count, void *block, int64_t bytes, void *before) {
  memcpy(before, block, count * bytes);
  for (int64_t k = 0; k < count; k++)
    if (parents[k] != k) memcpy((char *)block + k * bytes, (char *)before + parents[k] * bytes, bytes);
}

/* Hypothesis k of a sentence goes on from the history of parents[k]. */
int trmt_reorder(const Network *n, const Step *s, const int64_t *parents) {
  int good = 1;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) good &= within(parents[row], s->hypotheses);
  for (int64_t sentence = 0; sentence < s->sentences; sentence++) good &= within(s->slot[sentence], s->slots);
  if (!good) return OUT_OF_RANGE;
  int64_t count = s->hypotheses, ancestors = s->columns * sizeof(int32_t), cells = n->width * sizeof(float);
  void *before = malloc(count * (ancestors > cells ? ancestors : cells) + 1);
  if (!before) return OUT_OF_MEMORY;
  for (int64_t sentence = 0; sentence < s->sentences; sentence++, parents += count) {
    if (!n->ssru) reorder_block(parents, count, s->ancestors + sentence * count * s->columns, ancestors, before);
    for (int64_t layer = 0; layer < n->layers && n->ssru; layer++)
      reorder_block(parents, count, s->cache + (layer * s->slots + s->slot[sentence]) * count * n->width, cells,
                    before);
  }
  free(before);
  return 0;
}
