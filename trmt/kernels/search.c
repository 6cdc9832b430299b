/* The highest scores of each row, where they are, and what the row's exponentials add up to.

   trmt/decode/choosing.py has the same in plain PyTorch, which reads a row six times and writes it twice. */

#include <math.h>
#include <stdint.h>

enum { LANES = 16, CHUNK = 128 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));

static inline lanes larger(lanes a, lanes b) {
  bits chosen = a > b;
  return (lanes)((chosen & (bits)a) | (~chosen & (bits)b));
}

/* exp(x) for x up to 0, by the polynomial of Cephes; 0 below what has full precision. */
static inline lanes exponential(lanes x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to a whole number */
  lanes shifted = x * 1.44269504f + magic;
  lanes whole = shifted - magic;
  lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  lanes y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  bits power = ((bits)shifted - 0x4b400000 + 127) << 23;
  bits kept = ~(x < -87.0f); /* what is no number stays none */
  return (lanes)((bits)(y * (lanes)power) & kept);
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
    for (; at + LANES <= end; at += LANES) part += exponential(*(const lanes *)(scores + at) - most);
    for (int lane = 0; lane < LANES; lane++) sum += part[lane];
  }
  for (; at < count; at++) sum += exp((double)scores[at] - most);
  return sum;
}

/* Keep the list of the `count` highest in order; of equal ones the first that came. */
static void enter(float score, int64_t id, int64_t count, float *best, int64_t *ids) {
  if (!(score > best[count - 1])) return;
  int64_t place = count - 1;
  for (; place > 0 && score > best[place - 1]; place--) {
    best[place] = best[place - 1];
    ids[place] = ids[place - 1];
  }
  best[place] = score;
  ids[place] = id;
}

static void one_row(const float *scores, int64_t vocabulary, int64_t count, float *best, int64_t *ids,
                    float *log_sum) {
  int64_t chunks = (vocabulary + CHUNK - 1) / CHUNK;
  float most[chunks];
  for (int64_t place = 0; place < count; place++) best[place] = -INFINITY, ids[place] = place;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    int64_t begin = chunk * CHUNK;
    most[chunk] = highest(scores + begin, vocabulary - begin < CHUNK ? vocabulary - begin : CHUNK);
    enter(most[chunk], chunk, count, best, ids);
  }
  float needed = best[count - 1], first = best[0]; /* so many chunks have a score as high as that */
  for (int64_t place = 0; place < count; place++) best[place] = -INFINITY, ids[place] = place;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    if (most[chunk] < needed) continue;
    int64_t end = (chunk + 1) * CHUNK < vocabulary ? (chunk + 1) * CHUNK : vocabulary;
    for (int64_t id = chunk * CHUNK; id < end; id++) enter(scores[id], id, count, best, ids);
  }
  *log_sum = (float)(log(exponentials(scores, vocabulary, first)) + first);
}

void trmt_highest(const float *scores, int64_t rows, int64_t vocabulary, int64_t count, float *best,
                  int64_t *ids, float *log_sum) {
#pragma omp parallel for if (rows * vocabulary > 65536)
  for (int64_t row = 0; row < rows; row++)
    one_row(scores + row * vocabulary, vocabulary, count, best + row * count, ids + row * count,
            log_sum + row);
}
