// Sizes the CPU kernels and their scratch computations agree on.
#pragma once

#include <cstdint>

namespace dyvte {

constexpr int64_t kDecodeChunk = 192;  // cached rows of one decode_attention task
constexpr int64_t kScoreRows = 4;      // query rows of token_score that share one pass over K
constexpr int64_t kLinearRows = 128;   // rows of x of linear that share one pass over the weight
constexpr int64_t kLinearFew = 2;      // up to so many, linear is bound by reading the weight and nothing else

}  // namespace dyvte
