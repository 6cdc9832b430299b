/* All that translating has in C, compiled together: products, and steps of a decoder made of them. */

#include "products.c"
#include "step.c"
