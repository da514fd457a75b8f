/* GGUF blocks to floats; the fields of the operation are said in dequantize.c. */
#ifndef BRIM_DEQUANTIZE_H
#define BRIM_DEQUANTIZE_H
#include "rows.h"
brim_kernel brim_dequantize;
#endif
