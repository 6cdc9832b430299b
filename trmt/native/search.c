/* Steps of search: the highest scores of each row, its log-sum-exp, and the hypotheses that follow.

   The same in plain PyTorch is in trmt/decoding, which reads a row of scores six times and writes it twice. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { LANES = 16, CHUNK = 128 };
enum { WORTH_THREADS = 1 << 16 }; /* scores */
enum { OUT_OF_MEMORY = 2 };       /* what a kernel returns that got no memory; else 0 */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));

static inline lanes larger(lanes a, lanes b) {
  bits chosen = a > b;
  return (lanes)((chosen & (bits)a) | (~chosen & (bits)b));
}

/* Two to the power of x, for x up to 0, by a polynomial; what is below -126 counts as that. */
static inline lanes power_of_two(lanes x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  bits low = x < -126.0f; /* NaN stays NaN */
  x = (lanes)((low & (bits)((lanes){0} - 126.0f)) | (~low & (bits)x));
  lanes shifted = x + magic;
  lanes rest = x - (shifted - magic);
  lanes y = rest * 1.54697320e-4f + 1.34004322e-3f;
  y = y * rest + 9.61802560e-3f;
  y = y * rest + 5.55032721e-2f;
  y = y * rest + 2.40226512e-1f;
  y = y * rest + 6.93147207e-1f;
  y = y * rest + 1.0f;
  return (lanes)((bits)y + ((bits)shifted << 23));
}

static float highest(const float *scores, int64_t count) {
  float most = -INFINITY;
  int64_t at = 0;
  if (count >= LANES) {
    lanes wide = *(const lanes *)scores;
    for (at = LANES; at + LANES <= count; at += LANES) wide = larger(*(const lanes *)(scores + at), wide);
    for (int lane = 0; lane < LANES; lane++) most = wide[lane] > most ? wide[lane] : most;
  }
  for (; at < count; at++) most = scores[at] > most ? scores[at] : most;
  return most;
}

/* In double from chunk to chunk, so that the sum of a large vocabulary is as good as that of a small one. */
static double exponentials(const float *scores, int64_t count, float most) {
  double sum = 0;
  int64_t at = 0;
  while (at + LANES <= count) {
    lanes part = {0};
    int64_t end = at + CHUNK < count ? at + CHUNK : count;
    for (; at + LANES <= end; at += LANES)
      part += power_of_two((*(const lanes *)(scores + at) - most) * 1.44269504f);
    for (int lane = 0; lane < LANES; lane++) sum += part[lane];
  }
  for (; at < count; at++) sum += exp((double)scores[at] - most);
  return sum;
}

/* Keep the list of the `count` highest in order; of equal ones the first that came. */
static void enter(float score, int64_t id, int64_t count, float *best, int64_t *ids) {
  if (!(score > best[count - 1])) return;
  int64_t rank = count - 1;
  for (; rank > 0 && score > best[rank - 1]; rank--) {
    best[rank] = best[rank - 1];
    ids[rank] = ids[rank - 1];
  }
  best[rank] = score;
  ids[rank] = id;
}

static void one_row(const float *scores, int64_t vocabulary, int64_t count, float *best, int64_t *ids,
                    float *log_sum) {
  int64_t chunks = (vocabulary + CHUNK - 1) / CHUNK;
  float most[chunks];
  for (int64_t rank = 0; rank < count; rank++) best[rank] = -INFINITY, ids[rank] = rank;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    int64_t begin = chunk * CHUNK;
    most[chunk] = highest(scores + begin, vocabulary - begin < CHUNK ? vocabulary - begin : CHUNK);
    enter(most[chunk], chunk, count, best, ids);
  }
  float needed = best[count - 1], first = best[0]; /* so many chunks have a score as high as that */
  for (int64_t rank = 0; rank < count; rank++) best[rank] = -INFINITY, ids[rank] = rank;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    if (most[chunk] < needed) continue;
    int64_t end = (chunk + 1) * CHUNK < vocabulary ? (chunk + 1) * CHUNK : vocabulary;
    for (int64_t id = chunk * CHUNK; id < end; id++) enter(scores[id], id, count, best, ids);
  }
  *log_sum = (float)(log(exponentials(scores, vocabulary, first)) + first);
}

/* Entering a parallel region alone takes as long as a row. */
static int several_threads(int64_t work) {
#ifdef _OPENMP
  return work > WORTH_THREADS && omp_get_max_threads() > 1;
#else
  (void)work;
  return 0;
#endif
}

void trmt_highest(const float *scores, int64_t rows, int64_t vocabulary, int64_t count, float *best,
                  int64_t *ids, float *log_sum) {
  if (several_threads(rows * vocabulary)) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++)
      one_row(scores + row * vocabulary, vocabulary, count, best + row * count, ids + row * count,
              log_sum + row);
  } else
    for (int64_t row = 0; row < rows; row++)
      one_row(scores + row * vocabulary, vocabulary, count, best + row * count, ids + row * count,
              log_sum + row);
}

/* Greedy search's hypotheses, as trmt/decoding/greedy.py has them, one of each sentence. */
typedef struct {
  int64_t sentences, max_tokens;
  const int64_t *max_length, *eos; /* [S] */
  int64_t *length, *count;    /* [S] */
  int64_t *tokens;            /* [S, max_tokens] */
  float *score;               /* [S] */
  uint8_t *ended, *done;      /* [S] */
} Lines;

/* Greedy.advance: the most probable token of each row is appended; `next` [S] are the tokens, `parents` [S] is zero. */
int trmt_advance_lines(const Lines *l, const float *scores, int64_t vocabulary, int64_t *parents,
                        int64_t *next) {
  float *best = malloc(2 * l->sentences * sizeof(float)), *sums = best + l->sentences;
  if (!best) return OUT_OF_MEMORY;
  trmt_highest(scores, l->sentences, vocabulary, 1, best, next, sums);
  for (int64_t s = 0; s < l->sentences; s++) {
    int64_t at = l->length[s] < l->max_tokens ? l->length[s] : l->max_tokens - 1; /* a finished sentence, until it is removed */
    parents[s] = 0;
    l->tokens[s * l->max_tokens + at] = next[s];
    l->length[s]++;
    if (!l->ended[s]) l->score[s] += best[s] - sums[s];
    uint8_t over = l->ended[s] || next[s] == l->eos[s];
    l->count[s] += !over;
    l->ended[s] = l->done[s] = over || l->length[s] >= l->max_length[s];
  }
  free(best);
  return 0;
}

/* Beam search's hypotheses, as trmt/decoding/beam.py has them. */
typedef struct {
  int64_t sentences, size, max_tokens, n_best;
  double length_penalty, rounding;
  const int64_t *max_length, *eos;                                /* [S] */
  int64_t *length, *ended;                                   /* [S] */
  int64_t *parents, *tokens;                                 /* [S, max_tokens, K] */
  float *score, *ended_score;                                /* [S, K] */
  int64_t *ended_length, *ended_index;                       /* [S, K] */
  uint8_t *done;                                             /* [S] */
} Beams;

/* As PyTorch's topk has it: NaN comes first, so that it shows. */
static inline int beats(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

/* The `size` highest totals of a sentence's size * size candidates, in order. */
static void survivors(int64_t size, const float *before, const float *best, const float *sums, float *score,
                      int64_t *from) {
  int64_t filled = 0;
  for (int64_t candidate = 0; candidate < size * size; candidate++) {
    float total = before[candidate / size] + (best[candidate] - sums[candidate / size]);
    if (filled == size && !beats(total, score[size - 1])) continue;
    int64_t rank = filled < size ? filled++ : size - 1;
    for (; rank > 0 && beats(total, score[rank - 1]); rank--) {
      score[rank] = score[rank - 1];
      from[rank] = from[rank - 1];
    }
    score[rank] = total;
    from[rank] = candidate;
  }
}

static double normalised(const Beams *b, double score, int64_t length) {
  return score / pow((5 + length) / 6.0, b->length_penalty);
}

/* The n_best-th of the normalised scores of what has ended; minus infinity while there are fewer. */
static double worst(const Beams *b, int64_t s) {
  double best[b->n_best];
  if (b->ended[s] < b->n_best) return -INFINITY;
  for (int64_t rank = 0; rank < b->n_best; rank++) best[rank] = -INFINITY;
  for (int64_t k = s * b->size; k < s * b->size + b->ended[s]; k++) {
    double score = normalised(b, b->ended_score[k], b->ended_length[k]);
    for (int64_t rank = 0; rank < b->n_best; rank++)
      if (score > best[rank]) {
        double lower = best[rank];
        best[rank] = score;
        score = lower;
      }
  }
  return best[b->n_best - 1];
}

/* Hypotheses that ended, at the limit all, move behind those that ended before; then, can any better one follow? */
static void end(const Beams *b, int64_t s, const int64_t *parents, const int64_t *next) {
  int64_t size = b->size, full = b->length[s] >= b->max_length[s], before = b->ended[s];
  float *score = b->score + s * size, most = -INFINITY;
  for (int64_t k = 0; k < size; k++) {
    if (k >= size - before || b->done[s]) score[k] = -INFINITY;
    int ends = next[k] == b->eos[s];
    if ((ends || full) && isfinite(score[k])) {
      int64_t rank = s * size + b->ended[s]++;
      b->ended_score[rank] = score[k];
      b->ended_length[rank] = b->length[s] + !ends;
      b->ended_index[rank] = ends ? parents[k] : k;
      score[k] = -INFINITY;
    }
    if (beats(score[k], most)) most = score[k];
  }
  double hope = normalised(b, most, b->max_length[s] + 1) * (1 - b->rounding);
  b->done[s] = b->done[s] || full || b->ended[s] >= size || worst(b, s) >= hope;
}

/* Beam.advance: `parents` and `next` [S, K] say which hypothesis goes on from which with which token. */
int trmt_advance_beams(const Beams *b, const float *scores, int64_t vocabulary, int64_t *parents,
                        int64_t *next) {
  int64_t size = b->size, rows = b->sentences * size;
  int64_t *ids = malloc((rows + 1) * size * sizeof(int64_t) + (rows * (size + 1) + size) * sizeof(float));
  if (!ids) return OUT_OF_MEMORY;
  int64_t *from = ids + rows * size;
  float *best = (float *)(from + size), *sums = best + rows * size, *score = sums + rows;
  trmt_highest(scores, rows, vocabulary, size, best, ids, sums);
  for (int64_t s = 0; s < b->sentences; s++) {
    int64_t first = s * size, any = b->ended[s] > 0;
    survivors(size, b->score + first, best + first * size, sums + first, score, from);
    int64_t at = b->length[s] < b->max_tokens ? b->length[s] : b->max_tokens - 1; /* a finished sentence, until it is removed */
    for (int64_t k = 0; k < size; k++) {
      int64_t history = (s * b->max_tokens + at) * size + k;
      b->score[first + k] = score[k];
      b->parents[history] = parents[first + k] = from[k] / size;
      b->tokens[history] = next[first + k] = ids[first * size + from[k]];
      any |= next[first + k] == b->eos[s];
    }
    b->length[s]++;
    if (any || b->length[s] >= b->max_length[s]) end(b, s, parents + first, next + first);
  }
  free(ids);
  return 0;
}
