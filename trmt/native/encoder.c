/* A Transformer's encoder in one call, and the cross-attention keys and values of its output.

   Sentences stand in a row, so that nothing is computed for padding. The same in plain PyTorch is `encode` in
   trmt/nets/transformer.py; both round as in decoder.c. */

enum { KV_ROWS = 128 }; /* rows whose keys and values are made at a time */

typedef struct {
  int64_t sentences, length, tokens; /* S; L, of the longest; N */
  const int64_t *ids, *starts; /* [N], [S + 1] */
  float *memory, *mask;        /* [S, blocks, L, D], [S, L]: as in Step */
} Sources;

static int attend_sentence(const Network *n, const Sources *t, const float *qkv, float *out, int64_t s) {
  int64_t first = t->starts[s], count = t->starts[s + 1] - first;
  int64_t head_dim = n->width / n->heads, space = (count + 7) / 8 * 8;
  double *scratch = aligned_alloc(64, ((2 * head_dim + 1) * space + head_dim + 7) / 8 * 8 * sizeof(double));
  if (!scratch) return OUT_OF_MEMORY;
  for (int64_t head = 0; head < n->heads; head++) {
    const float *query = qkv + first * 3 * n->width + head * head_dim;
    float *to = out + first * n->width + head * head_dim;
    DISPATCH(n, attend_sentence, n->width, head_dim, query, count, scratch, to);
  }
  free(scratch);
  return 0;
}

static int attend_sentences(const Network *n, const Sources *t, const float *qkv, float *out) {
  int failed = 0;
  if (threads_for(t->starts[t->sentences], 32) > 1) {
#pragma omp parallel for schedule(dynamic) reduction(| : failed)
    for (int64_t s = 0; s < t->sentences; s++) failed |= attend_sentence(n, t, qkv, out, s);
  } else
    for (int64_t s = 0; s < t->sentences; s++) failed |= attend_sentence(n, t, qkv, out, s);
  return failed;
}

static void embed_sources(const Network *n, const Sources *t, float *x) {
  for (int64_t s = 0; s < t->sentences; s++)
    for (int64_t row = t->starts[s]; row < t->starts[s + 1]; row++)
      embed_row(n, t->ids[row], row - t->starts[s], x + row * n->width);
}

/* Some rows' keys and values into the memory. */
static void lay_out(const Network *n, const Sources *t, int64_t blocks, const float *kv, int64_t from, int64_t to) {
  int64_t width = n->width, s = 0;
  for (int64_t row = from; row < to; row++) {
    while (t->starts[s + 1] <= row) s++;
    float *at = t->memory + (s * blocks * t->length + row - t->starts[s]) * width;
    for (int64_t block = 0; block < blocks; block++)
      memcpy(at + block * t->length * width, kv + ((row - from) * blocks + block) * width, width * 4);
  }
}

static void clear_padding(const Network *n, const Sources *t, int64_t blocks) {
  for (int64_t s = 0; s < t->sentences; s++) {
    int64_t count = t->starts[s + 1] - t->starts[s], missing = t->length - count;
    for (int64_t l = 0; l < t->length; l++) t->mask[s * t->length + l] = l < count ? 0 : -INFINITY;
    for (int64_t block = 0; block < blocks; block++)
      memset(t->memory + ((s * blocks + block) * t->length + count) * n->width, 0, missing * n->width * 4);
  }
}

/* Whether every id has its row, and every sentence its space and positions. */
static int sources_within(const Network *n, const Sources *t) {
  int64_t longest = t->length < n->max_positions ? t->length : n->max_positions;
  int good = t->starts[0] == 0;
  for (int64_t s = 0; s < t->sentences && good; s++) {
    good &= within(t->starts[s + 1] - t->starts[s], longest + 1);
    for (int64_t row = t->starts[s]; row < t->starts[s + 1] && good; row++) good &= within(t->ids[row], n->vocabulary);
  }
  return good && t->starts[t->sentences] == t->tokens;
}

int trmt_encode(const Network *n, const Matrix *cross_kv, const Sources *t) {
  if (!sources_within(n, t)) return OUT_OF_RANGE;
  int64_t rows = t->starts[t->sentences], width = n->width, blocks = cross_kv->outputs / width;
  int64_t most = n->feed_forward > 3 * width ? n->feed_forward : 3 * width;
  int64_t some = rows < KV_ROWS ? rows : KV_ROWS;
  int64_t inner_size = rows * most > some * cross_kv->outputs ? rows * most : some * cross_kv->outputs;
  float *x = aligned_alloc(64, ((4 * rows * width + inner_size) * 4 + 63) / 64 * 64);
  if (!x) return OUT_OF_MEMORY;
  int failed = 0;
  float *out = x + rows * width, *added = out + rows * width, *normed = added + rows * width;
  float *inner = normed + rows * width;
  if (!n->pre_norm) normed = x;
  embed_sources(n, t, x);
  if (n->pre_norm) add_norm(n, rows, n->norms, x, 0, normed);
  for (int64_t i = 0; i < 2 * n->layers; i++) {
    const Layer *layer = n->layer + i / 2;
    if (i % 2 == 0) {
      failed |= trmt_product(layer->self_in, normed, rows, inner, n->processor);
      failed |= attend_sentences(n, t, inner, out);
      failed |= trmt_product(layer->self_out, out, rows, added, n->processor);
    } else {
      failed |= trmt_product(layer->inner, normed, rows, inner, n->processor);
      failed |= trmt_product(layer->outer, inner, rows, added, n->processor);
    }
    add_norm(n, rows, n->norms + i + n->pre_norm, x, added, normed);
  }
  for (int64_t row = 0; row < rows; row += KV_ROWS) {
    int64_t to = row + KV_ROWS < rows ? row + KV_ROWS : rows;
    failed |= trmt_product(cross_kv, normed + row * width, to - row, inner, n->processor);
    lay_out(n, t, blocks, inner, row, to);
  }
  clear_padding(n, t, blocks);
  free(x);
  return failed;
}
