/* Row-wise kernels; the fields of each operation are said in dense.c. */
#ifndef BRIM_DENSE_H
#define BRIM_DENSE_H
#include "rows.h"
brim_kernel brim_rms_norm, brim_add_rms_norm, brim_gated_activation, brim_gather_rows, brim_rope_and_cache;
#endif
