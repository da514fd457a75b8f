/* Linear layers over packed weights; the fields of each operation are said in linear.c. */
#ifndef BRIM_LINEAR_H
#define BRIM_LINEAR_H
#include "tile.h"
brim_kernel brim_linear, brim_pack, brim_embed;
int64_t brim_linear_scratch(void);
#endif
