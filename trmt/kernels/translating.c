/* All that translating has in C, compiled together: products, steps of a decoder made of them, chains of steps. */

#include "products.c"
#include "step.c"
#include "chain.c"
