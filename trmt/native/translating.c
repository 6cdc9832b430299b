/* All that translating has in C, compiled together: products, an encoder and steps of a decoder made of them,
   chains of steps. */

#include "products.c"
#include "step.c"
#include "read.c"
#include "chain.c"
