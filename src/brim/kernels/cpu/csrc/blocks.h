/* Quantised weights as GGUF stores them, in another order of the same bytes. Owns that order: storing blocks and reading them.
 *
 * A panel is `width` rows of the matrix (16, 32, 48 or 64: lanes), and holds their blocks one after the other. Of each block:
 * every field of the file's block for all lanes side by side (d, then m or dmin where there is one, then bytes of scales), then
 * its sub-blocks of 32 elements: words [.][lanes] of 4 bytes, each the same 4 consecutive elements (a quad) of 8.
 *   8 bits: word q is quad q, each element plus 128 (so none is negative).
 *   4 bits: word q holds quad q in the low halves of its bytes, quad q + 4 in the high ones.
 *   the fifth bit, before those: bit q of each byte belongs to quad q.
 *   bits five and six: two words; bits 2i and 2i + 1 of word h belong to quad 4h + i.
 * The value of an element is scale * (element - offset) + least. */
#ifndef BRIM_BLOCKS_H
#define BRIM_BLOCKS_H
#include "panels.h"

enum block_scales {
    SCALE_F16,    /* f16 scale */
    SCALE_LEAST,  /* f16 scale, f16 least */
    SCALE_NESTED, /* f16 d, f16 dmin, 12 bytes: six bits of scale and of least for each sub-block */
    SCALE_HALVES, /* f16 d, 16 x int8: a scale for each half of a sub-block */
};

typedef struct {
    int ggml_type;
    int bytes;       /* of one block of one row */
    int header;      /* of them before the elements */
    int subs;        /* sub-blocks of 32 elements */
    int bits, extra; /* 8 or 4 bits in words, and the bits above them: 0, 1 or 2 */
    int offset;
    int scales;
} brim_form;

/* NULL: no such type */
const brim_form *brim_form_of(int ggml_type);

INLINE int64_t block_bytes_of(const brim_form *form, int64_t lanes, int64_t depth) {
    return depth / (32 * form->subs) * form->bytes * lanes;
}
INLINE int64_t sub_bytes_of(const brim_form *form) { return (form->bytes - form->header) / form->subs; }

enum { CHUNK_SUBS = 8 };

/* Some sub-blocks of some lanes, ready for products: elements as bytes, scales and leasts as floats. */
typedef struct {
    const char *w;                   /* [subs][8 quads][lanes] words, at these strides in bytes */
    int64_t sub_stride, quad_stride;
    const float *scale;              /* [subs][lanes], or [2 * subs][lanes] for halves */
    const float *least;              /* [subs][lanes], NULL: none */
} brim_slice;

/* Memory that reading a chunk of up to CHUNK_SUBS sub-blocks needs. */
typedef struct {
    _Alignas(64) uint32_t words[CHUNK_SUBS * 8 * PANEL];
    _Alignas(64) float scale[2 * CHUNK_SUBS * PANEL];
    _Alignas(64) float least[CHUNK_SUBS * PANEL];
} brim_slice_room;

/* Sub-blocks [sub, sub + subs) of lanes 16 * group .. 16 * (group + groups) of a panel of `width` lanes.
 * ahead: as much memory as all lanes of the slice take, wanted next; touched where elements are unpacked here. Or NULL. */
brim_slice brim_read_slice(
    const brim_form *form, const char *panel, int64_t width, int64_t group, int64_t groups, int64_t sub, int64_t subs,
    const char *ahead, brim_slice_room *room);

brim_kernel brim_pack_blocks;
#endif
