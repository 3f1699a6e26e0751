// The C interface of the kernels that multiply in int8, for many tokens. Functions give 0, or a code of prunella.h.
//
// Weights are in blocks of four neighboring columns and 1, 2 or 4 neighboring rows. A block with any nonzero is stored
// whole. Every row has a scale, largest / 127, and codes from -127 to 127.
// x becomes codes from 0 to 255: code = round(x / scale) + zero, held to that range, ties to even. In a dynamic call
// every token has its own: high = max(x, 0), low = min(x, 0), scale = high / 255 - low / 255, zero = round(-low / scale).
// Codes are multiplied and added exactly, so all tiers give the same sums.
#pragma once
#include "prunella.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct prunella_dot prunella_dot;

// Pack rows (as in prunella_check, which is called here). side: rows of a block: 1, 2 or 4. depth: columns of the panel
// that one pass reads, a multiple of 4. At most 65536 columns, so that no sum overflows.
PRUNELLA_API int prunella_dot_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                      const float* values, int32_t side, int32_t depth, prunella_dot** made);
PRUNELLA_API void prunella_dot_free(prunella_dot* weight);
PRUNELLA_API int64_t prunella_dot_bytes(const prunella_dot* weight);

// y (tokens, m) = activation(x (tokens, k) W' + bias + residual). bias and residual may be null. activation: as for
// prunella_many_linear. tile: vectors of tokens side by side: 1 to 4. scale: of x; 0 is a dynamic call, which ignores
// zero. Gives PRUNELLA_ODD_INPUT, and nothing of use in y, where x has a number that bf16 cannot hold.
PRUNELLA_API int prunella_dot_linear(const prunella_dot* weight, const float* x, int64_t tokens, const float* bias,
                        const float* residual, int32_t activation, float scale, int32_t zero, int32_t tile,
                                     int32_t threads, float* y);

#ifdef __cplusplus
}
#endif
