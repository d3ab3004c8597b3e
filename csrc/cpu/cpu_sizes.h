// Sizes the CPU kernels and their scratch computations agree on.
#pragma once

#include <cstdint>

namespace dyvte {

constexpr int64_t kDecodeChunk = 128;  // cached rows of one decode_attention task
constexpr int64_t kScoreRows = 4;      // query rows of token_score that share one pass over K

}  // namespace dyvte
