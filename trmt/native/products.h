/* What the matrix products and those who call them from C share. */

#ifndef TRMT_PRODUCTS_H
#define TRMT_PRODUCTS_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { PANEL = 16 }; /* outputs whose weights lie together */

/* The weights of one product, [panels][depth / 4][16][4] of int8 or [panels][inputs][16] of float. What lies
   beyond `outputs` and `inputs` is zero. */
typedef struct {
  int64_t outputs, inputs;
  int64_t panels; /* outputs / 16, rounded up */
  int64_t depth;  /* of int8, inputs rounded up to 64; of float, inputs */
  int64_t is_int8, relu;
  const void *packed;
  const float *scale;   /* int8: what one unit of each output's weights stands for */
  const int32_t *shift; /* int8: 128 times the sum of each output's weights */
  const float *bias;    /* or null */
} Matrix;

enum { PLAIN, AVX2, AVX_VNNI, AVX512_VNNI, AMX }; /* processors, each with all that is before it in its line */

/* What a kernel returns: 0, or one or both of these, and then its results are not to be used. */
enum { OUT_OF_RANGE = 1, OUT_OF_MEMORY = 2 };

int trmt_processors(void);
int trmt_product(const Matrix *m, const float *x, int64_t rows, float *y, int processor);

#endif
