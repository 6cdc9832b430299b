/* One step of a Transformer's decoder, all layers of it, for one new token of each hypothesis.

   Composed of PyTorch's operations a step takes hundreds of calls, which for few rows is most of its time.
   trmt/native/stepping.py has the same in plain PyTorch, and holds what is cached.

   Between the products, norms and attention compute in double precision and round to fp32 once. So whoever
   computes the same in another order (PyTorch, other vector lengths) gets the same fp32 numbers but for a
   rounding in many millions, and int8 products after it hardly ever see that one. */

#include "products.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
  int64_t places;                              /* sentences that the cache has space for */
  int64_t *tokens;                             /* [S, K] */
  int64_t *position;                           /* [S], where this token stands */
  int32_t *table;                              /* [S, K, room]: which hypothesis made the ancestor's column */
  const int64_t *place;                        /* [S], which of these places each one has */
  float *cache;                                /* [layers, 2, places, room, K, D]: keys, values */
  const int64_t *source;                       /* [S], which of the sources each one has */
  const float *memory;                         /* [.., 2 * layers, L, D]: keys, values of the source */
  const float *mask;                           /* [.., L]: 0 where there is source */
  float *hidden;                               /* [S, K, D]: the result */
} Step;

/* Where the keys of one row are: `offset` from the first key, and from the first value. */
typedef struct {
  const float *keys, *values;
  const int64_t *offset;
  int64_t count;
} Seen;

/* What attention needs for one row: [D] sums, [heads, keys] weights. */
typedef struct {
  double *sums, *weights;
  int64_t keys;
} Room;

enum { AHEAD = 1 << 10 }; /* numbers that are on their way while others are read, measured */

/* Asks for what is going to be read after row `at` of keys, then values, then the keys of the next one. */
INLINE void fetch(const Seen *seen, const Seen *next, int64_t at, int64_t width) {
  int64_t count = seen->count;
  const float *row;
  at += AHEAD / width + 1;
  if (at < count)
    row = seen->keys + seen->offset[at];
  else if (at < 2 * count)
    row = seen->values + seen->offset[at - count];
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

static void normed(const Network *n, const Norm *norm, float *x, const float *added, float *out) {
#if defined(__x86_64__)
  if (n->processor >= AVX512_VNNI) return avx512_norm_row(n, norm, x, added, out);
  if (n->processor >= AVX2) return avx2_norm_row(n, norm, x, added, out);
#endif
  plain_norm_row(n, norm, x, added, out);
}

static void attended(const Network *n, const float *query, const Seen *seen, const Seen *next,
                     const Room *room, float *out) {
#if defined(__x86_64__)
  if (n->processor >= AVX512_VNNI) return avx512_attend_row(n, query, seen, next, room, out);
  if (n->processor >= AVX2) return avx2_attend_row(n, query, seen, next, room, out);
#endif
  plain_attend_row(n, query, seen, next, room, out);
}

/* The row's ancestors in the cache of a layer. */
static Seen look_back(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t sentence = row / s->hypotheses, count = s->position[sentence] + 1;
  int64_t all = s->places * s->room * s->hypotheses * n->width;
  const int32_t *table = s->table + row * s->room;
  for (int64_t c = 0; c < count; c++)
    offset[c] = ((s->place[sentence] * s->room + c) * s->hypotheses + table[c]) * n->width;
  return (Seen){s->cache + 2 * layer * all, s->cache + (2 * layer + 1) * all, offset, count};
}

static Seen look_over(const Network *n, const Step *s, int64_t layer, int64_t row, int64_t *offset) {
  int64_t source = s->source[row / s->hypotheses], count = 0;
  const float *mask = s->mask + source * s->length;
  const float *keys = s->memory + (source * 2 * n->layers + 2 * layer) * s->length * n->width;
  for (int64_t l = 0; l < s->length; l++)
    if (mask[l] == 0) offset[count++] = l * n->width;
  return (Seen){keys, keys + s->length * n->width, offset, count};
}

/* Keys and values of the new tokens into the cache. */
static void store(const Network *n, const Step *s, int64_t layer, const float *merged) {
  int64_t width = n->width, all = s->places * s->room * s->hypotheses * width;
  for (int64_t row = 0; row < s->sentences * s->hypotheses; row++) {
    int64_t sentence = row / s->hypotheses, column = s->place[sentence] * s->room + s->position[sentence];
    int64_t place = (column * s->hypotheses + row % s->hypotheses) * width;
    for (int part = 0; part < 2; part++)
      memcpy(s->cache + (2 * layer + part) * all + place, merged + (3 * row + 1 + part) * width, width * 4);
  }
}

static Seen look(const Network *n, const Step *s, int64_t layer, int64_t row, int back, int64_t *offset) {
  return (back ? look_back : look_over)(n, s, layer, row, offset);
}

static void attend_some(const Network *n, const Step *s, int64_t layer, const float *query, int64_t stride,
                        int back, float *out, int64_t from, int64_t to) {
  int64_t most = ((s->room > s->length ? s->room : s->length) + 7) / 8 * 8;
  double *sums = aligned_alloc(64, (n->width + (n->heads + 2) * most + 7) / 8 * 8 * sizeof(double));
  Room room = {sums, sums + n->width, most};
  int64_t *offsets = (int64_t *)(room.weights + n->heads * most);
  Seen seen = look(n, s, layer, from, back, offsets + from % 2 * most);
  for (int64_t row = from; row < to; row++) {
    Seen next = {0};
    if (row + 1 < to) next = look(n, s, layer, row + 1, back, offsets + (row + 1) % 2 * most);
    attended(n, query + row * stride, &seen, &next, &room, out + row * n->width);
    seen = next;
  }
  free(sums);
}

static void attend_all(const Network *n, const Step *s, int64_t layer, const float *query, int64_t stride,
                       int back, float *out) {
  int64_t rows = s->sentences * s->hypotheses, share = share_of(rows, 8);
  if (share >= rows) return attend_some(n, s, layer, query, stride, back, out, 0, rows);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += share)
    attend_some(n, s, layer, query, stride, back, out, row, row + share < rows ? row + share : rows);
}

static void norm_some(const Network *n, const Norm *norm, float *x, const float *added, float *out, int64_t from,
                      int64_t to) {
  int64_t width = n->width;
  for (int64_t row = from; row < to; row++)
    normed(n, norm, x + row * width, added ? added + row * width : 0, out + row * width);
}

static void norm_all(const Network *n, int64_t rows, const Norm *norm, float *x, const float *added, float *out) {
  int64_t share = share_of(rows, 32);
  if (share >= rows) return norm_some(n, norm, x, added, out, 0, rows);
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += share)
    norm_some(n, norm, x, added, out, row, row + share < rows ? row + share : rows);
}

static void embed_row(const Network *n, int64_t token, int64_t position, float *x) {
  const float *from = n->embedding + token * n->width, *place = n->positions + position * n->width;
  for (int64_t i = 0; i < n->width; i++) x[i] = from[i] * n->embedding_scale + place[i];
}

void trmt_step(const Network *n, const Step *s) {
  int64_t rows = s->sentences * s->hypotheses, width = n->width;
  int64_t most = n->feed > 3 * width ? n->feed : 3 * width;
  float *x = aligned_alloc(64, (rows * (3 * width + most) * 4 + 63) / 64 * 64);
  float *found = x + rows * width, *added = found + rows * width, *inner = added + rows * width;
  float *normal = s->hidden; /* what a sublayer reads: with pre_norm apart from the sum `x` */
  for (int64_t row = 0; row < rows; row++)
    embed_row(n, s->tokens[row], s->position[row / s->hypotheses], x + row * width);
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

/* Hypothesis k of a sentence goes on from the history of parents[k]. */
void trmt_reorder(const int64_t *parents, int64_t sentences, int64_t hypotheses, int64_t room, int32_t *table) {
  int64_t size = hypotheses * room;
  int32_t *before = malloc((size + 1) * sizeof(int32_t));
  for (int64_t s = 0; s < sentences; s++, parents += hypotheses, table += size) {
    memcpy(before, table, size * sizeof(int32_t));
    for (int64_t k = 0; k < hypotheses; k++)
      if (parents[k] != k) memcpy(table + k * room, before + parents[k] * room, room * sizeof(int32_t));
  }
  free(before);
}
