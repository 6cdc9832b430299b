/* Norms and attention, in double precision; included once for each kind of processor.

   The file that includes it defines NAME, TARGET, WIDE (doubles of a vector), and
   WIDENED(p)      a vector of the WIDE floats at p
   NARROWED(v)     the same as floats
   FUSED(a, b, c)  a * b + c
   TOTAL(v)        the sum of a vector */

typedef double NAME(wide) __attribute__((vector_size(8 * WIDE), aligned(8)));
typedef int64_t NAME(wide_bits) __attribute__((vector_size(8 * WIDE), aligned(8)));
typedef float NAME(narrow) __attribute__((vector_size(4 * WIDE), aligned(4)));

/* e to the x for x <= 0; what is below -708 counts as that. */
INLINE TARGET NAME(wide) NAME(exponential)(NAME(wide) x) {
  NAME(wide_bits) low = x < -708.0;
  x = (NAME(wide))(((NAME(wide_bits))((NAME(wide)){0} - 708.0) & low) | ((NAME(wide_bits))x & ~low));
  NAME(wide) shifted = x * 1.4426950408889634 + 6755399441055744.0; /* its lowest bits are the integer */
  NAME(wide) n = shifted - 6755399441055744.0;
  NAME(wide) r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  static const double terms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                 1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,
                                 0.5,             1.0,            1.0};
  NAME(wide) y = (NAME(wide)){0} + 1.0 / 6227020800;
  for (int i = 0; i < 13; i++) y = FUSED(y, r, (NAME(wide)){0} + terms[i]);
  return y * (NAME(wide))(((NAME(wide_bits))shifted + 1023) << 52);
}

/* x += added where there is something to add; out = norm(x) */
static TARGET void NAME(norm_row)(const Network *n, const Norm *norm, float *x, const float *added, float *out) {
  int64_t width = n->width;
  NAME(wide) sum = {0}, square = {0};
  if (added)
    for (int64_t i = 0; i < width; i++) x[i] += added[i];
  double mean = 0;
  if (norm->bias) {
    for (int64_t i = 0; i < width; i += WIDE) sum += WIDENED(x + i);
    mean = TOTAL(sum) / width;
  }
  for (int64_t i = 0; i < width; i += WIDE) {
    NAME(wide) d = WIDENED(x + i) - mean;
    square = FUSED(d, d, square);
  }
  double scale = 1.0 / sqrt(TOTAL(square) / width + n->epsilon);
  for (int64_t i = 0; i < width; i += WIDE) {
    NAME(wide) y = (WIDENED(x + i) - mean) * scale * WIDENED(norm->weight + i);
    if (norm->bias) y += WIDENED(norm->bias + i);
    *(NAME(narrow) *)(out + i) = NARROWED(y);
  }
}

/* Softmax without the normalisation; returns the factor that normalises. There is space for `count`
   rounded up to WIDE. */
INLINE TARGET double NAME(softmax)(double *scores, int64_t count) {
  NAME(wide) high = (NAME(wide)){0} - INFINITY, sum = {0};
  for (int64_t j = count; j % WIDE; j++) scores[j] = -INFINITY;
  for (int64_t j = 0; j < count; j += WIDE) {
    NAME(wide) some = *(NAME(wide) *)(scores + j);
    NAME(wide_bits) above = some > high;
    high = (NAME(wide))((above & (NAME(wide_bits))some) | (~above & (NAME(wide_bits))high));
  }
  double most = high[0];
  for (int lane = 1; lane < WIDE; lane++) most = high[lane] > most ? high[lane] : most;
  for (int64_t j = 0; j < count; j += WIDE)
    sum += *(NAME(wide) *)(scores + j) = NAME(exponential)(*(NAME(wide) *)(scores + j) - most);
  return 1 / TOTAL(sum);
}

/* All heads of one row. Keys and values are read once, since they come from memory: each is read whole
   while later ones are prefetched. */
INLINE TARGET void NAME(attend)(const Network *n, const float *query, const Keys *keys, const Keys *next,
                                const Scratch *scratch, const int64_t head_dim, float *out) {
  int64_t width = n->width, count = keys->count;
  double scale = 1.0 / sqrt((double)head_dim), *sums = scratch->sums, factor[n->heads];
  for (int64_t i = 0; i < width; i += WIDE) *(NAME(wide) *)(sums + i) = WIDENED(query + i);
  for (int64_t j = 0; j < count; j++) {
    const float *key = keys->keys + keys->offset[j];
    fetch(keys, next, j, width);
    for (int64_t head = 0; head < n->heads; head++) {
      NAME(wide) dot = {0};
      for (int64_t p = head * head_dim; p < (head + 1) * head_dim; p += WIDE)
        dot = FUSED(*(NAME(wide) *)(sums + p), WIDENED(key + p), dot);
      scratch->weights[head * scratch->keys + j] = TOTAL(dot) * scale;
    }
  }
  for (int64_t head = 0; head < n->heads; head++)
    factor[head] = NAME(softmax)(scratch->weights + head * scratch->keys, count);
  memset(sums, 0, width * sizeof(double));
  for (int64_t j = 0; j < count; j++) {
    const float *value = keys->values + keys->offset[j];
    fetch(keys, next, count + j, width);
    for (int64_t head = 0; head < n->heads; head++) {
      NAME(wide) weight = (NAME(wide)){0} + scratch->weights[head * scratch->keys + j];
      for (int64_t p = head * head_dim; p < (head + 1) * head_dim; p += WIDE)
        *(NAME(wide) *)(sums + p) = FUSED(weight, WIDENED(value + p), *(NAME(wide) *)(sums + p));
    }
  }
  for (int64_t head = 0; head < n->heads; head++)
    for (int64_t p = head * head_dim; p < (head + 1) * head_dim; p += WIDE)
      *(NAME(narrow) *)(out + p) = NARROWED(*(NAME(wide) *)(sums + p) * factor[head]);
}

static TARGET void NAME(attend_row)(const Network *n, const float *query, const Keys *keys, const Keys *next,
                                    const Scratch *scratch, float *out) {
  int64_t head_dim = n->width / n->heads;
  if (head_dim == 64) /* the usual ones, with loops of known length */
    NAME(attend)(n, query, keys, next, scratch, 64, out);
  else if (head_dim == 32)
    NAME(attend)(n, query, keys, next, scratch, 32, out);
  else
    NAME(attend)(n, query, keys, next, scratch, head_dim, out);
}

/* One row of an SSRU: c = f * c + (1 - f) * x with f = sigmoid(gate), and out = relu(c). */
static TARGET void NAME(recur_row)(int64_t width, const float *gate_input, float *cell, float *out) {
  for (int64_t i = 0; i < width; i += WIDE) {
    NAME(wide) gate = WIDENED(gate_input + i), x = WIDENED(gate_input + width + i), c = WIDENED(cell + i);
    NAME(wide_bits) negative = gate < 0.0;
    NAME(wide) e = NAME(exponential)((NAME(wide))(((NAME(wide_bits))gate & negative) |
                                                  ((NAME(wide_bits))(-gate) & ~negative)));
    NAME(wide) one = (NAME(wide)){0} + 1.0, share = 1.0 / (1.0 + e);
    NAME(wide) f = (NAME(wide))(((NAME(wide_bits))(e * share) & negative) |
                                ((NAME(wide_bits))(one * share) & ~negative));
    c = f * c + (one - f) * x;
    NAME(narrow) rounded = NARROWED(c);
    *(NAME(narrow) *)(cell + i) = rounded;
    for (int lane = 0; lane < WIDE; lane++) out[i + lane] = rounded[lane] < 0 ? 0 : rounded[lane]; /* keeps NaN */
  }
}

/* `vectors` columns of out = a @ rows, times scale; several at once, since each is one chain of additions. */
INLINE TARGET void NAME(mix_columns)(const int vectors, const double *a, int64_t count, const double *rows,
                                     int64_t stride, double scale, double *out) {
  NAME(wide) sums[4] = {{0}};
  for (int64_t j = 0; j < count; j++)
    for (int v = 0; v < vectors; v++)
      sums[v] = FUSED((NAME(wide)){0} + a[j], *(NAME(wide) *)(rows + j * stride + v * WIDE), sums[v]);
  for (int v = 0; v < vectors; v++) *(NAME(wide) *)(out + v * WIDE) = sums[v] * scale;
}

static TARGET void NAME(mix)(const double *a, int64_t count, const double *rows, int64_t stride, double scale,
                             double *out) {
  int64_t at = 0;
  for (; at + 4 * WIDE <= stride; at += 4 * WIDE)
    NAME(mix_columns)(4, a, count, rows + at, stride, scale, out + at);
  for (; at + 2 * WIDE <= stride; at += 2 * WIDE)
    NAME(mix_columns)(2, a, count, rows + at, stride, scale, out + at);
  for (; at < stride; at += WIDE) NAME(mix_columns)(1, a, count, rows + at, stride, scale, out + at);
}

/* Self-attention of one head over a sentence. Queries, keys and values of a token lie `width` apart, and those
   of the next one behind them. There is space for (2 * head_dim + 1) * space + head_dim, where space is `count` up to
   a multiple of 8. */
static TARGET void NAME(attend_sentence)(int64_t width, int64_t head_dim, const float *merged, int64_t count,
                                         double *scratch, float *out) {
  int64_t space = (count + 7) / 8 * 8;
  double *keys = scratch, *values = keys + head_dim * space, *weights = values + head_dim * space, *one = weights + space;
  double scale = 1.0 / sqrt((double)head_dim);
  for (int64_t p = 0; p < head_dim; p++)
    for (int64_t j = 0; j < space; j++)
      keys[p * space + j] = j < count ? merged[(3 * j + 1) * width + p] : 0;
  for (int64_t j = 0; j < count; j++)
    for (int64_t p = 0; p < head_dim; p++) values[j * head_dim + p] = merged[(3 * j + 2) * width + p];
  for (int64_t i = 0; i < count; i++) {
    for (int64_t p = 0; p < head_dim; p++) one[p] = merged[3 * i * width + p];
    NAME(mix)(one, head_dim, keys, space, scale, weights);
    double factor = NAME(softmax)(weights, count);
    NAME(mix)(weights, count, values, head_dim, factor, one);
    for (int64_t p = 0; p < head_dim; p++) out[i * width + p] = (float)one[p];
  }
}
