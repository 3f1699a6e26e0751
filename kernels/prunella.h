// The C interface of the kernels: plain pointers, no torch, no Python. Functions give 0, or one of the codes below.
// src/prunella/runtime/kernels/signatures.py is generated from this file: after a change run kernels/generate.py.
#pragma once
#include <stdint.h>

#define PRUNELLA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum {
  PRUNELLA_OK = 0,
  PRUNELLA_BAD_ARGUMENT = 1,  // a size or an option that no kernel has
  PRUNELLA_BAD_STARTS = 2,    // row starts do not rise from 0 to the number of nonzeros
  PRUNELLA_BAD_INDEX = 3,     // a column outside, or columns of a row that do not rise
  PRUNELLA_NO_MEMORY = 4,
  PRUNELLA_NO_TIER = 5,       // this processor cannot run the tier
  PRUNELLA_NOT_FINITE = 6,    // NaN or infinity in a weight that is to become int8
  PRUNELLA_ODD_INPUT = 7,     // a token with NaN, infinity or nearly, where the caller wants to know
};

// Layouts of prunella_many_pack, and what is applied to a sum.
enum {
  PRUNELLA_ROWS = 0,
  PRUNELLA_GROUPS = 1,
  PRUNELLA_BLOCK16 = 2,
  PRUNELLA_BLOCK8 = 3,
  PRUNELLA_BLOCK4 = 4,
  PRUNELLA_PAIRS = 5,
};
enum {
  PRUNELLA_NONE = 0,
  PRUNELLA_RELU = 1,
  PRUNELLA_GELU = 2,
  PRUNELLA_SILU = 3,
  PRUNELLA_RELU6 = 4,
  PRUNELLA_HARDSWISH = 5,
};

typedef struct prunella_many prunella_many;

typedef struct {
  int64_t channels, height, width, batch;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t last;  // 1: the channels are the last axis
} prunella_image;

// Changes with every change of this interface: a library of another number is not used.
#define PRUNELLA_ABI 10
PRUNELLA_API int prunella_abi(void);

// Tiers: names that this processor can run, joined by commas; the one in use; choose another ("" for the best).
PRUNELLA_API const char* prunella_tiers(void);
PRUNELLA_API const char* prunella_tier(void);
PRUNELLA_API int prunella_use(const char* name);

// Whether rows of a matrix m x k are well formed: starts (m + 1), columns rising inside a row. O(nonzeros).
PRUNELLA_API int prunella_check(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns);

// Pack rows checked by prunella_check. kind: 0 rows, 1 groups, 2 16x1, 3 8x1, 4 4x1, 5 rows by pairs of nonzeros.
// side: rows side by side (1, 2, 4; for kinds 0, 1 and 5). precision: 0 fp32, 1 x is rounded to bf16 (sums and values
// stay fp32; takes an even tile). Kind 5 has only the latter, and rounds its values to bf16 too.
PRUNELLA_API int prunella_many_pack(int64_t m, int64_t k, int64_t nnz, const int64_t* starts, const int64_t* columns,
                       const float* values, int32_t kind, int32_t side, int32_t depth,
                                    int32_t precision, prunella_many** made);
PRUNELLA_API void prunella_many_free(prunella_many* weight);
PRUNELLA_API int64_t prunella_many_bytes(const prunella_many* weight);

// y (tokens, m) = activation(x (tokens, k) W' + bias + residual). bias and residual may be null. activation: 0, 1 ReLU,
// 2 GELU (by the error function), 3 SiLU, 4 ReLU6, 5 Hardswish.
// tile: vectors of tokens side by side; 0, for kind 2: its 16 rows are the lanes (for an image, and in bf16, 2 instead).
// strict: 1 gives PRUNELLA_ODD_INPUT, and nothing of use in y, where x has a number that bf16 cannot hold.
PRUNELLA_API int prunella_many_linear(const prunella_many* weight, const float* x, int64_t tokens, const float* bias,
                         const float* residual, int32_t activation, int32_t strict, int32_t tile,
                                      int32_t threads, float* y);

// The same over the patches of images; W is (m, channels * kernel_h * kernel_w). y has the layout of x.
PRUNELLA_API int prunella_many_conv(const prunella_many* weight, const prunella_image* image, const float* x, const float* bias,
                       const float* residual, int32_t activation, int32_t strict, int32_t tile,
                                    int32_t threads, float* y);

// One convolution of several, strict. x, residual and y: floats from the beginning of their places; residual_place -1:
// none. y may be the residual itself.
typedef struct {
  const prunella_many* weight;
  const prunella_image* image;
  const float* bias;
  int64_t x, residual, y;
  int32_t x_place, residual_place, y_place, activation, tile;
} prunella_step;

// Convolutions one after another; places: memory for the inputs, the outputs and what is in between. Ends with the first
// code that is not 0: outputs are then of no use.
PRUNELLA_API int prunella_many_chain(const prunella_step* steps, int32_t count, float* const* places, int32_t threads);

#ifdef __cplusplus
}
#endif
