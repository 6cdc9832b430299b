/* The kernels for activations of type REAL, which training.c includes once for each type. GET and PUT turn a
   number to and from fp32, LOAD and STORE a vector. */

/* out = dropout(x) */
static void NAME(dropout_rows)(const REAL *x, REAL *out, int64_t from, int64_t to, int64_t width, uint64_t seed,
                               uint32_t threshold, float scale) {
  for (int64_t row = from; row < to; row++) {
    uint32_t key = row_key(seed, row);
    const REAL *xr = x + row * width;
    REAL *outr = out + row * width;
    for (int64_t i = 0; i < width; i += LANES) STORE(outr + i, LOAD(xr + i) * kept(key, i, threshold, scale));
  }
}

void NAME(trmt_dropout)(const REAL *x, REAL *out, int64_t rows, int64_t width, uint64_t seed, uint32_t threshold,
                        float scale) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    NAME(dropout_rows)(x, out, from, end_of(from, rows), width, seed, threshold, scale);
}

/* sum = x + dropout(y); out = norm(sum) * weight + bias. Without `bias` it is the root mean square norm.
   `statistics` receives mean and reciprocal deviation of each row. */
static void NAME(add_norm_rows)(const Shape *s, const REAL *x, const REAL *y, const float *weight,
                                const float *bias, REAL *added, REAL *out, float *statistics, int64_t from,
                                int64_t to) {
  int64_t width = s->width;
  for (int64_t row = from; row < to; row++) {
    const REAL *xr = x + row * width, *yr = y + row * width;
    REAL *ar = added + row * width, *outr = out + row * width;
    uint32_t key = row_key(s->seed, row);
    vec total = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
      vec v = LOAD(yr + i);
      if (s->threshold) v *= kept(key, i, s->threshold, s->scale);
      STORE(ar + i, LOAD(xr + i) + v);
      total += LOAD(ar + i); /* as it was rounded: the backward pass has nothing else */
    }
    float mean = bias ? sum(total) / width : 0.0f;
    for (int64_t i = 0; i < width; i += LANES) {
      vec v = LOAD(ar + i) - mean;
      squares += v * v;
    }
    float r = 1.0f / sqrtf(sum(squares) / width + s->epsilon);
    statistics[2 * row] = mean, statistics[2 * row + 1] = r;
    for (int64_t i = 0; i < width; i += LANES) {
      vec v = (LOAD(ar + i) - mean) * r * load(weight + i);
      STORE(outr + i, bias ? v + load(bias + i) : v);
    }
  }
}

void NAME(trmt_add_norm)(const Shape *s, const REAL *x, const REAL *y, const float *weight, const float *bias,
                         REAL *added, REAL *out, float *statistics) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < s->rows; from += ROWS)
    NAME(add_norm_rows)(s, x, y, weight, bias, added, out, statistics, from, end_of(from, s->rows));
}

/* The gradients of the above: of x and, where dropout makes it another, of y; of weight and bias as one
   row [2, width] of `partial` for each block of rows. `grad_added` may be null. */
static void NAME(add_norm_backward_rows)(const Shape *s, const REAL *grad_out, const REAL *grad_added,
                                         const REAL *added, const float *weight, const float *statistics,
                                         int centred, REAL *grad_x, REAL *grad_y, float *partial, int64_t from,
                                         int64_t to) {
  int64_t width = s->width;
  memset(partial, 0, 2 * width * sizeof(float));
  for (int64_t row = from; row < to; row++) {
    const REAL *gr = grad_out + row * width, *ar = added + row * width;
    REAL *gx = grad_x + row * width;
    float mean = statistics[2 * row], r = statistics[2 * row + 1];
    vec total = all(0), aligned = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
      vec normed = (LOAD(ar + i) - mean) * r, grad = LOAD(gr + i), g = grad * load(weight + i);
      total += g;
      aligned += g * normed;
      store(partial + i, load(partial + i) + grad * normed);
      store(partial + width + i, load(partial + width + i) + grad);
    }
    float s1 = centred ? sum(total) / width : 0.0f, s2 = sum(aligned) / width * r;
    uint32_t key = row_key(s->seed, row);
    for (int64_t i = 0; i < width; i += LANES) {
      vec g = r * (LOAD(gr + i) * load(weight + i) - s1 - (LOAD(ar + i) - mean) * s2);
      if (grad_added) g += LOAD(grad_added + row * width + i);
      STORE(gx + i, g);
      if (s->threshold) STORE(grad_y + row * width + i, g * kept(key, i, s->threshold, s->scale));
    }
  }
}

void NAME(trmt_add_norm_backward)(const Shape *s, const REAL *grad_out, const REAL *grad_added,
                                  const REAL *added, const float *weight, const float *statistics, int centred,
                                  REAL *grad_x, REAL *grad_y, float *partial) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < s->rows; from += ROWS)
    NAME(add_norm_backward_rows)(s, grad_out, grad_added, added, weight, statistics, centred, grad_x, grad_y,
                                 partial + from / ROWS * 2 * s->width, from, end_of(from, s->rows));
}

/* x = x + bias, in place; then relu if wanted. */
static void NAME(add_bias_rows)(REAL *x, const float *bias, int64_t width, int relu, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; row++) {
    REAL *xr = x + row * width;
    for (int64_t i = 0; i < width; i += LANES) {
      vec v = LOAD(xr + i) + load(bias + i);
      STORE(xr + i, relu ? where(v < 0, all(0), v) : v); /* keeps NaN, so that nothing goes unnoticed */
    }
  }
}

void NAME(trmt_add_bias)(REAL *x, const float *bias, int64_t rows, int64_t width, int relu) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    NAME(add_bias_rows)(x, bias, width, relu, from, end_of(from, rows));
}

/* The gradient of the bias, as one row of `partial` for each block of rows. With relu's result `out`,
   gradients are first set to 0 where it is 0, which gives `masked`. */
static void NAME(bias_backward_rows)(const REAL *grad, const REAL *out, REAL *masked, int64_t width,
                                     float *partial, int64_t from, int64_t to) {
  memset(partial, 0, width * sizeof(float));
  for (int64_t row = from; row < to; row++)
    for (int64_t i = 0; i < width; i += LANES) {
      vec g = LOAD(grad + row * width + i);
      if (out) {
        g = where(LOAD(out + row * width + i) == 0, all(0), g);
        STORE(masked + row * width + i, g);
      }
      store(partial + i, load(partial + i) + g);
    }
}

void NAME(trmt_bias_backward)(const REAL *grad, const REAL *out, REAL *masked, int64_t rows, int64_t width,
                              float *partial) {
#pragma omp parallel for schedule(static)
  for (int64_t from = 0; from < rows; from += ROWS)
    NAME(bias_backward_rows)(grad, out, masked, width, partial + from / ROWS * width, from, end_of(from, rows));
}

/* Label-smoothed cross-entropy of some rows of logits, which become its gradient. `losses` receives for
   each row the negative log likelihood and the mean over the vocabulary of the same. `space` is for a row of
   exponentials, which bf16 could not keep without rounding. */
static void NAME(cross_entropy_rows)(REAL *logits, const int64_t *target, float *losses, float *space,
                                     int64_t width, float smoothing, int64_t from, int64_t to) {
  for (int64_t row = from; row < to; row++) {
    REAL *x = logits + row * width;
    if (target[row] < 0) { /* padding */
      memset(x, 0, width * sizeof(REAL));
      losses[2 * row] = losses[2 * row + 1] = 0;
      continue;
    }
    int64_t whole = width / LANES * LANES;
    vec high = all(GET(x[0])), total = all(0), exponents = all(0);
    for (int64_t i = 0; i < whole; i += LANES) {
      vec v = LOAD(x + i);
      high = larger(v, high);
      total += v;
    }
    float most = largest(high), sum_logits = sum(total);
    for (int64_t i = whole; i < width; i++) {
      float v = GET(x[i]);
      sum_logits += v, most = v > most ? v : most;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
      vec e = exponential(LOAD(x + i) - most);
      exponents += e;
      store(space + i, e);
    }
    float sum_exponents = sum(exponents);
    for (int64_t i = whole; i < width; i++) sum_exponents += space[i] = expf(GET(x[i]) - most);
    float log_sum = logf(sum_exponents), factor = 1.0f / sum_exponents, spread = smoothing / width;
    float picked = GET(x[target[row]]) - most;
    losses[2 * row] = log_sum - picked;
    losses[2 * row + 1] = log_sum + most - sum_logits / width;
    space[target[row]] -= (1.0f - smoothing) * sum_exponents;
    for (int64_t i = 0; i < whole; i += LANES) STORE(x + i, load(space + i) * factor - spread);
    for (int64_t i = whole; i < width; i++) x[i] = PUT(space[i] * factor - spread);
  }
}

/* Returns OUT_OF_RANGE and does nothing if a target is no column. */
int NAME(trmt_cross_entropy)(REAL *logits, const int64_t *target, float *losses, int64_t rows, int64_t width,
                             float smoothing) {
  for (int64_t row = 0; row < rows; row++)
    if (target[row] >= width) return OUT_OF_RANGE;
  int short_of_memory = 0;
#pragma omp parallel
  {
    float *space = scratch(width);
    if (!space) {
#pragma omp atomic write
      short_of_memory = OUT_OF_MEMORY;
    }
#pragma omp for schedule(static)
    for (int64_t from = 0; from < rows; from += 8)
      if (space)
        NAME(cross_entropy_rows)(logits, target, losses, space, width, smoothing, from,
                                 from + 8 < rows ? from + 8 : rows);
    free(space);
  }
  return short_of_memory;
}

/* Attention: each head's rows are computed with in fp32, in memory that lies together. */

/* out [length, head_dim] = rows, which lie `stride` apart. */
INLINE void NAME(take)(const REAL *rows, int64_t stride, int64_t length, int64_t head_dim, float *out) {
  for (int64_t i = 0; i < length; i++)
    for (int64_t p = 0; p < head_dim; p += LANES) store(out + i * head_dim + p, LOAD(rows + i * stride + p));
}

/* The other way round. */
INLINE void NAME(give)(const float *x, int64_t length, int64_t head_dim, REAL *rows, int64_t stride) {
  for (int64_t i = 0; i < length; i++)
    for (int64_t p = 0; p < head_dim; p += LANES) STORE(rows + i * stride + p, load(x + i * head_dim + p));
}

/* out [head_dim, width] = rows [length, head_dim] transposed, with zeros behind `length`. */
INLINE void NAME(transpose)(const REAL *rows, int64_t stride, int64_t length, int64_t head_dim, float *out,
                            int64_t width) {
  for (int64_t j = 0; j < width; j += LANES)
    for (int64_t p = 0; p < head_dim; p += LANES) {
      vec square[LANES];
      for (int i = 0; i < LANES; i++)
        square[i] = j + i < length ? LOAD(rows + (j + i) * stride + p) : all(0);
      transpose_square(square);
      for (int i = 0; i < LANES; i++) store(out + (p + i) * width + j, square[i]);
    }
}

static void NAME(attention_head)(const Attention *a, int64_t sentence, int64_t head, float *space, REAL *out,
                                 float *norms) {
  int64_t first = a->query_starts[sentence], rows = a->query_starts[sentence + 1] - first;
  int64_t first_key = a->key_starts[sentence], keys = a->key_starts[sentence + 1] - first_key;
  int64_t head_dim = a->head_dim, width = whole_lanes(keys), out_stride = a->heads * head_dim;
  int64_t column = head * head_dim;
  float *flat = space, *other = flat + head_dim * width, *scores = other + head_dim * (rows + width);
  NAME(transpose)((const REAL *)a->key + first_key * a->key_stride + column, a->key_stride, keys, head_dim, flat,
                  width);
  NAME(take)((const REAL *)a->query + first * a->query_stride + column, a->query_stride, rows, head_dim, other);
  product(rows, width, head_dim, other, head_dim, 1, flat, width, scores, width);
  softmax(scores, rows, keys, width, a, norms + first * a->heads + head, a->heads, 0);
  NAME(take)((const REAL *)a->value + first_key * a->value_stride + column, a->value_stride, keys, head_dim, flat);
  product(rows, head_dim, keys, scores, width, 1, flat, head_dim, other, head_dim);
  NAME(give)(other, rows, head_dim, out + first * out_stride + column, out_stride);
}

int NAME(trmt_attention)(const Attention *a, REAL *out, float *norms) {
  int64_t width = whole_lanes(longest(a->key_starts, a->sentences));
  int64_t rows = longest(a->query_starts, a->sentences);
  int short_of_memory = 0;
#pragma omp parallel
  {
    float *space = scratch(a->head_dim * (rows + 2 * width) + rows * width);
    if (!space) {
#pragma omp atomic write
      short_of_memory = OUT_OF_MEMORY;
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < a->sentences * a->heads; item++)
      if (space) NAME(attention_head)(a, item / a->heads, item % a->heads, space, out, norms);
    free(space);
  }
  return short_of_memory;
}

static void NAME(attention_head_backward)(const Attention *a, int64_t sentence, int64_t head, float *space,
                                          const REAL *grad_out, const float *norms, const Gradients *g) {
  int64_t first = a->query_starts[sentence], rows = a->query_starts[sentence + 1] - first;
  int64_t first_key = a->key_starts[sentence], keys = a->key_starts[sentence + 1] - first_key;
  int64_t head_dim = a->head_dim, width = whole_lanes(keys), out_stride = a->heads * head_dim;
  int64_t column = head * head_dim;
  const REAL *key_rows = (const REAL *)a->key + first_key * a->key_stride + column;
  float *flat = space, *query = flat + head_dim * (rows + width), *grad = query + head_dim * rows;
  float *weights = grad + head_dim * rows, *grads = weights + rows * width;
  NAME(take)((const REAL *)a->query + first * a->query_stride + column, a->query_stride, rows, head_dim, query);
  NAME(take)(grad_out + first * out_stride + column, out_stride, rows, head_dim, grad);
  NAME(transpose)(key_rows, a->key_stride, keys, head_dim, flat, width);
  product(rows, width, head_dim, query, head_dim, 1, flat, width, weights, width);
  softmax(weights, rows, keys, width, a, (float *)norms + first * a->heads + head, a->heads, 1);
  NAME(transpose)((const REAL *)a->value + first_key * a->value_stride + column, a->value_stride, keys, head_dim,
                  flat, width);
  product(rows, width, head_dim, grad, head_dim, 1, flat, width, grads, width);
  for (int64_t i = 0; i < rows; i++) {
    vec both = all(0);
    float *w = weights + i * width, *d = grads + i * width;
    for (int64_t j = 0; j < width; j += LANES) both += load(w + j) * load(d + j);
    float mean = sum(both);
    for (int64_t j = 0; j < width; j++) d[j] = w[j] * (d[j] - mean) * a->scale;
  }
  product(keys, head_dim, rows, weights, 1, width, grad, head_dim, flat, head_dim);
  NAME(give)(flat, keys, head_dim, (REAL *)g->value + first_key * g->value_stride + column, g->value_stride);
  product(keys, head_dim, rows, grads, 1, width, query, head_dim, flat, head_dim);
  NAME(give)(flat, keys, head_dim, (REAL *)g->key + first_key * g->key_stride + column, g->key_stride);
  NAME(take)(key_rows, a->key_stride, keys, head_dim, flat);
  product(rows, head_dim, keys, grads, width, 1, flat, head_dim, query, head_dim);
  NAME(give)(query, rows, head_dim, (REAL *)g->query + first * g->query_stride + column, g->query_stride);
}

int NAME(trmt_attention_backward)(const Attention *a, const REAL *grad_out, const float *norms, const Gradients *g) {
  int64_t width = whole_lanes(longest(a->key_starts, a->sentences));
  int64_t rows = longest(a->query_starts, a->sentences);
  int short_of_memory = 0;
#pragma omp parallel
  {
    float *space = scratch(a->head_dim * (3 * rows + width) + 2 * rows * width);
    if (!space) {
#pragma omp atomic write
      short_of_memory = OUT_OF_MEMORY;
    }
#pragma omp for schedule(dynamic, 8)
    for (int64_t item = 0; item < a->sentences * a->heads; item++)
      if (space)
        NAME(attention_head_backward)(a, item / a->heads, item % a->heads, space, grad_out, norms, g);
    free(space);
  }
  return short_of_memory;
}

#undef REAL
#undef NAME
#undef GET
#undef PUT
#undef LOAD
#undef STORE
