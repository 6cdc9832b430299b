/* Several steps of search in one call: the decoder, the logits, what may not come next, the search itself.

   The loop in trmt/decoding/engine.py does one such step with calls from Python, which for small networks take longer
   than what they call. */

#include <math.h>

/* What may not come next, as Masks in trmt/decoding/masks.py has it. */
typedef struct {
  int64_t bans, eos, longest;
  const int64_t *banned; /* [bans] */
  const int64_t *least;  /* [S], tokens before the end */
  const int64_t *prefix; /* [S, longest], -1 behind each */
} Rules;

/* One step of a search: `parents` and `next` say which hypotheses go on with which tokens. */
typedef int Advance(const void *search, const float *logits, int64_t vocabulary, int64_t *parents, int64_t *next);

typedef struct {
  const Network *network;
  const Step *step;
  const Matrix *readout;
  Advance *advance;
  const void *search;
  const int64_t *length; /* [S], of the search */
  const uint8_t *done;   /* [S], of the search */
  int64_t reorders;
  float *logits;    /* [S, K, outputs of the readout] */
  int64_t *parents; /* [S, K] */
  Rules rules;
} Search;

static void mask(const Rules *r, int64_t sentence, int64_t length, float *logits, int64_t vocabulary) {
  for (int64_t i = 0; i < r->bans; i++) logits[r->banned[i]] = -INFINITY;
  if (length < r->least[sentence]) logits[r->eos] = -INFINITY;
  int64_t forced = length < r->longest ? r->prefix[sentence * r->longest + length] : -1;
  if (forced < 0) return;
  for (int64_t i = 0; i < vocabulary; i++) logits[i] = -INFINITY;
  logits[forced] = 0; /* certain, though it may be banned elsewhere */
}

/* Whether every id that may not come, or has to, is one that has a logit. */
static int rules_within(const Rules *r, int64_t sentences, int64_t vocabulary) {
  int good = within(r->eos, vocabulary);
  for (int64_t i = 0; i < r->bans; i++) good &= within(r->banned[i], vocabulary);
  for (int64_t i = 0; i < sentences * r->longest; i++) good &= r->prefix[i] < vocabulary;
  return good;
}

static int64_t count_done(const Search *c) {
  int64_t count = 0;
  for (int64_t s = 0; s < c->step->sentences; s++) count += c->done[s];
  return count;
}

/* Up to `most` steps, until `enough` sentences are done; returns how many, or minus what a kernel returned. */
int64_t trmt_steps(const Search *c, int64_t most, int64_t enough) {
  const Step *s = c->step;
  int64_t rows = s->sentences * s->hypotheses, taken = 0, vocabulary = c->readout->outputs;
  if (!rules_within(&c->rules, s->sentences, vocabulary)) return -OUT_OF_RANGE;
  while (taken < most && count_done(c) < enough) {
    int failed = trmt_step(c->network, s);
    if (failed) return -failed; /* `hidden` was not written */
    failed |= trmt_product(c->readout, s->hidden, rows, c->logits, c->network->processor);
    for (int64_t row = 0; row < rows; row++) {
      int64_t sentence = row / s->hypotheses;
      mask(&c->rules, sentence, c->length[sentence], c->logits + row * vocabulary, vocabulary);
    }
    failed |= c->advance(c->search, c->logits, vocabulary, c->parents, s->tokens);
    for (int64_t sentence = 0; sentence < s->sentences; sentence++) s->position[sentence]++;
    if (!failed && c->reorders) failed |= trmt_reorder(c->network, s, c->parents);
    if (failed) return -failed;
    taken++;
  }
  return taken;
}
