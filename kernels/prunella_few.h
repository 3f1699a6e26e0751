// The C interface of the kernels for 1 to 8 tokens. Functions give 0, or a code of prunella.h.
//
// A weight that is not stored is never multiplied: NaN and infinity in x reach a sum only through stored weights.
// bf16 rounds the weights; the tier avx512bf16 rounds x as well, the others keep x in fp32.
// int8 has one scale a row (largest / 127) and quantises every token on the way in by its own largest number; codes are
// multiplied and added exactly, so every tier gives the same numbers. A token that is not finite stays in fp32.
#pragma once
#include "prunella.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PRUNELLA_BITMAP = 0, PRUNELLA_CSR = 1 };
enum { PRUNELLA_FP32 = 0, PRUNELLA_BF16 = 1, PRUNELLA_INT8 = 2 };

typedef struct prunella_few prunella_few;

// Pack rows (as in prunella_check, which is called here). CSR has no int8 and at most 65536 columns.
PRUNELLA_API int prunella_few_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                      const float* values, int32_t kind, int32_t precision, prunella_few** made);
PRUNELLA_API void prunella_few_free(prunella_few* weight);
PRUNELLA_API int64_t prunella_few_bytes(const prunella_few* weight);

// y (tokens, m) = activation(x (tokens, k) W' + bias + residual). bias and residual may be null. activation: 0, 1 ReLU.
// y overlaps neither x nor residual. More than 8 tokens run as several passes. strict: 1 gives PRUNELLA_ODD_INPUT, and
// nothing in y, for x with a number that bf16 cannot hold, so that the caller can let dense code spread it.
PRUNELLA_API int prunella_few_linear(const prunella_few* weight, const float* x, int64_t tokens, const float* bias,
                        const float* residual, int32_t activation, int32_t strict, int32_t threads, float* y);

#ifdef __cplusplus
}
#endif
