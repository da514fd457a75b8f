/* Linear layers over quantised weights; the fields of each operation are said in quantized.c. */
#ifndef BRIM_QUANTIZED_H
#define BRIM_QUANTIZED_H
#include "blocks.h"
brim_kernel brim_quantized_linear, brim_quantized_embed;
int64_t brim_quantized_scratch(void);
int64_t brim_quantized_shared(void);
#endif
