/* The products on one type of processor; included once for each.

   The file that includes it defines NAME (adds the processor to a name), TARGET (what the compiler may use), LANES
   (floats of a vector), SHAPES (the blocks to cut a product into, rows and panels, large ones first), and

   ALL(f)         a vector of one number
   FMA(a, b, c)   a * b + c of vectors, rounded once where the kind can
   DOT(sum, x, w) adds to each of LANES sums the products of 4 bytes of x and 4 bytes of w
   FLIP           0x80 where DOT takes x as numbers from 0 on, else 0 */

#define PARTS (PANEL / LANES) /* vectors of a panel */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int8_t NAME(bytes) __attribute__((vector_size(4 * LANES), aligned(1)));
typedef int8_t NAME(lane_bytes) __attribute__((vector_size(LANES), aligned(1)));

/* Each row as integers from -127 to 127, and its scale. */
static TARGET void NAME(quantise)(const Quantised *q, const float *x, int64_t from, int64_t to, int flip) {
  int64_t inputs = q->inputs, depth = q->depth, whole = inputs / LANES * LANES;
  for (int64_t row = from; row < to; row++) {
    const float *restrict xr = x + row * inputs;
    int8_t *restrict out = q->values + row * depth;
    uint32_t most = 0;
    for (int64_t k = 0; k < inputs; k++) {
      uint32_t size = bits(xr[k]) & 0x7fffffff; /* as integers, so that NaN is above everything */
      most = size > most ? size : most;
    }
    float step = to_quantised(most, &q->scale[row]);
    for (int64_t k = 0; k < whole; k += LANES) { /* the lowest bits of the sum are the integer, half to even */
      NAME(ints) sum = (NAME(ints))(*(const NAME(floats) *)(xr + k) * step + 12582912.0f);
      *(NAME(lane_bytes) *)(out + k) = __builtin_convertvector(sum ^ flip, NAME(lane_bytes));
    }
    for (int64_t k = whole; k < inputs; k++) out[k] = (int8_t)(bits(xr[k] * step + 12582912.0f) ^ flip);
    memset(out + inputs, flip, depth - inputs);
    if (!step) memset(out, flip, depth); /* NaN times 0 is not 0 */
  }
}

TARGET INLINE void NAME(put)(const Matrix *m, NAME(floats) v, float *y, int64_t row, int64_t column) {
  if (m->bias) v += *(const NAME(floats) *)(m->bias + column);
  if (m->relu) v = (NAME(floats))((NAME(ints))v & ~(NAME(ints))(v < 0)); /* keeps NaN */
  y += row * m->outputs;
  if (column + LANES <= m->outputs)
    *(NAME(floats) *)(y + column) = v;
  else
    for (int i = 0; i < LANES && column + i < m->outputs; i++) y[column + i] = v[i];
}

TARGET INLINE void NAME(put_sums)(const Matrix *m, NAME(ints) sums, float scale, float *y, int64_t row,
                                  int64_t column, int flip) {
  if (flip) sums -= *(const NAME(ints) *)(m->shift + column);
  NAME(floats) v = __builtin_convertvector(sums, NAME(floats)) * scale;
  NAME(put)(m, v * *(const NAME(floats) *)(m->scale + column), y, row, column);
}

TARGET INLINE void NAME(int8_block)(const int rows, const int panels, const Matrix *m, const Quantised *q,
                                    float *y, int64_t row, int64_t panel) {
  const int8_t *x = q->values + row * m->depth;
  const int8_t *w = (const int8_t *)m->packed + panel * m->depth * PANEL;
  NAME(ints) sums[MOST_ROWS][MOST_PANELS * PARTS];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < panels * PARTS; v++) sums[r][v] = (NAME(ints)){0};
  for (int64_t k = 0; k < m->depth; k += 4) {
    NAME(bytes) wv[MOST_PANELS * PARTS];
    for (int v = 0; v < panels * PARTS; v++)
      wv[v] = *(const NAME(bytes) *)(w + v / PARTS * m->depth * PANEL + k * PANEL + v % PARTS * 4 * LANES);
    for (int r = 0; r < rows; r++) {
      int32_t xr;
      memcpy(&xr, x + r * m->depth + k, 4);
      for (int v = 0; v < panels * PARTS; v++) sums[r][v] = DOT(sums[r][v], xr, wv[v]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < panels * PARTS; v++)
      NAME(put_sums)(m, sums[r][v], q->scale[row + r], y, row + r, panel * PANEL + v * LANES, FLIP);
}

/* Each output is one chain of additions over `inputs`, so that a row never depends on its neighbours. */
TARGET INLINE void NAME(fp32_block)(const int rows, const int panels, const Matrix *m, const float *x,
                                    float *y, int64_t row, int64_t panel) {
  const float *w = (const float *)m->packed + panel * m->inputs * PANEL;
  NAME(floats) sums[MOST_ROWS][MOST_PANELS * PARTS];
  x += row * m->inputs;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < panels * PARTS; v++) sums[r][v] = (NAME(floats)){0};
  for (int64_t k = 0; k < m->inputs; k++) {
    NAME(floats) wv[MOST_PANELS * PARTS];
    for (int v = 0; v < panels * PARTS; v++)
      wv[v] = *(const NAME(floats) *)(w + v / PARTS * m->inputs * PANEL + k * PANEL + v % PARTS * LANES);
    for (int r = 0; r < rows; r++) {
      NAME(floats) xr = ALL(x[r * m->inputs + k]);
      for (int v = 0; v < panels * PARTS; v++) sums[r][v] = FMA(xr, wv[v], sums[r][v]);
    }
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < panels * PARTS; v++)
      NAME(put)(m, sums[r][v], y, row + r, panel * PANEL + v * LANES);
}

#define BLOCKS(kind, input)                                                            \
  for (int64_t row = 0; row < rows;) {                                                 \
    SHAPES(BLOCK_OF, kind, input)                                                      \
  }
#define BLOCK_OF(block_rows, block_panels, kind, input)                                \
  if (rows - row >= block_rows) {                                                      \
    int64_t panel = from;                                                              \
    for (; panel + block_panels <= to; panel += block_panels)                          \
      NAME(kind)(block_rows, block_panels, m, input, y, row, panel);                   \
    for (; panel < to; panel++) NAME(kind)(block_rows, 1, m, input, y, row, panel);    \
    row += block_rows;                                                                 \
    continue;                                                                          \
  }

static TARGET void NAME(int8_panels)(const Matrix *m, const Quantised *q, int64_t rows, float *y,
                                     int64_t from, int64_t to) {
  BLOCKS(int8_block, q)
}

static TARGET void NAME(fp32_panels)(const Matrix *m, const float *x, int64_t rows, float *y, int64_t from,
                                     int64_t to) {
  BLOCKS(fp32_block, x)
}

#undef BLOCK_OF
#undef BLOCKS
#undef PARTS
