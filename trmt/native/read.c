/* The source read in one call: a Transformer's encoder, and of what it found the keys and values that the
   decoder looks at.

   Sentences stand in a row, so that nothing is computed for padding. trmt/native/reading.py has the same in
   plain PyTorch; both round as in step.c. */

enum { REMEMBERED = 128 }; /* rows whose keys and values are made at a time */

typedef struct {
  int64_t sentences, length;   /* S; L, of the longest */
  const int64_t *ids, *starts; /* [N], [S + 1] */
  float *memory, *mask;        /* [S, parts, L, D], [S, L]: as in Step */
} Text;

static void attended_sentence(const Network *n, const float *merged, int64_t count, float *out) {
  int64_t part = n->width / n->heads, space = (count + 7) / 8 * 8;
  double *room = aligned_alloc(64, ((2 * part + 1) * space + part) * sizeof(double));
  for (int64_t head = 0; head < n->heads; head++) {
    const float *query = merged + head * part;
#if defined(__x86_64__)
    if (n->processor >= AVX512_VNNI)
      avx512_attend_sentence(n->width, part, query, count, room, out + head * part);
    else if (n->processor >= AVX2)
      avx2_attend_sentence(n->width, part, query, count, room, out + head * part);
    else
#endif
      plain_attend_sentence(n->width, part, query, count, room, out + head * part);
  }
  free(room);
}

static void look_around(const Network *n, const Text *t, const float *merged, float *out, int64_t s) {
  int64_t first = t->starts[s], count = t->starts[s + 1] - first;
  attended_sentence(n, merged + first * 3 * n->width, count, out + first * n->width);
}

static void look_around_all(const Network *n, const Text *t, const float *merged, float *out) {
  if (threads_for(t->starts[t->sentences], 32) > 1) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t s = 0; s < t->sentences; s++) look_around(n, t, merged, out, s);
  } else
    for (int64_t s = 0; s < t->sentences; s++) look_around(n, t, merged, out, s);
}

static void embed_source(const Network *n, const Text *t, float *x) {
  for (int64_t s = 0; s < t->sentences; s++)
    for (int64_t row = t->starts[s]; row < t->starts[s + 1]; row++)
      embed_row(n, t->ids[row], row - t->starts[s], x + row * n->width);
}

/* Some rows' keys and values to their places. */
static void lay_out(const Network *n, const Text *t, int64_t parts, const float *both, int64_t from, int64_t to) {
  int64_t width = n->width, s = 0;
  for (int64_t row = from; row < to; row++) {
    while (t->starts[s + 1] <= row) s++;
    float *place = t->memory + (s * parts * t->length + row - t->starts[s]) * width;
    for (int64_t part = 0; part < parts; part++)
      memcpy(place + part * t->length * width, both + ((row - from) * parts + part) * width, width * 4);
  }
}

static void blank_padding(const Network *n, const Text *t, int64_t parts) {
  for (int64_t s = 0; s < t->sentences; s++) {
    int64_t count = t->starts[s + 1] - t->starts[s], missing = t->length - count;
    for (int64_t l = 0; l < t->length; l++) t->mask[s * t->length + l] = l < count ? 0 : -INFINITY;
    for (int64_t part = 0; part < parts; part++)
      memset(t->memory + ((s * parts + part) * t->length + count) * n->width, 0, missing * n->width * 4);
  }
}

void trmt_read(const Network *n, const Matrix *memory, const Text *t) {
  int64_t rows = t->starts[t->sentences], width = n->width, parts = memory->outer / width;
  int64_t most = n->feed > 3 * width ? n->feed : 3 * width, some = rows < REMEMBERED ? rows : REMEMBERED;
  int64_t inner_size = rows * most > some * memory->outer ? rows * most : some * memory->outer;
  float *x = aligned_alloc(64, ((4 * rows * width + inner_size) * 4 + 63) / 64 * 64);
  float *found = x + rows * width, *added = found + rows * width, *normal = added + rows * width;
  float *inner = normal + rows * width;
  if (!n->pre_norm) normal = x;
  embed_source(n, t, x);
  if (n->pre_norm) norm_all(n, rows, n->norms, x, 0, normal);
  for (int64_t i = 0; i < 2 * n->layers; i++) {
    const Layer *layer = n->layer + i / 2;
    if (i % 2 == 0) {
      trmt_product(layer->own, normal, rows, inner, n->processor);
      look_around_all(n, t, inner, found);
      trmt_product(layer->own_out, found, rows, added, n->processor);
    } else {
      trmt_product(layer->inner, normal, rows, inner, n->processor);
      trmt_product(layer->outer, inner, rows, added, n->processor);
    }
    norm_all(n, rows, n->norms + i + n->pre_norm, x, added, normal);
  }
  for (int64_t row = 0; row < rows; row += REMEMBERED) {
    int64_t to = row + REMEMBERED < rows ? row + REMEMBERED : rows;
    trmt_product(memory, normal + row * width, to - row, inner, n->processor);
    lay_out(n, t, parts, inner, row, to);
  }
  blank_padding(n, t, parts);
  free(x);
}
