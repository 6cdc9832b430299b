/* All that inference has in C, compiled together: products, an encoder, decoding steps, several steps of search. */

#include "products.c"
#include "decoder.c"
#include "encoder.c"
#include "multi_step.c"
