// Scratch floats the CPU kernels need; the same for every instruction set.
#include "cpu_sizes.h"
#include "dyvte/decode_attention.h"
#include "dyvte/exit_head.h"
#include "dyvte/linear.h"
#include "dyvte/token_score.h"

namespace dyvte {

int64_t exit_head_cpu_scratch(const ExitHeadParams& p) { return p.batch * (p.n_states * p.d + p.inner + 1); }

int64_t decode_attention_cpu_scratch(const DecodeAttentionParams& p) {
  const int64_t chunks = (p.max_len + kDecodeChunk - 1) / kDecodeChunk;
  return chunks > 1 ? p.batch * p.heads_q * chunks * (p.pool.dim + 2) : 0;
}

// Per K/V head: a row of double sums and kScoreRows rows of scores, each as long as all keys together.
int64_t token_score_cpu_scratch(const TokenScoreParams& p) { return p.heads_kv * (2 + kScoreRows) * p.rows_k; }

// x of one pass: as floats, when it is not already, or in panels of up to 7 rows more.
int64_t linear_cpu_scratch(const LinearParams& p) {
  if (p.dtype == DType::f32 && p.rows <= kLinearFew) return 0;
  return ((p.rows < kLinearRows ? p.rows : kLinearRows) + 7) * ((p.k + 7) / 8 * 8);
}

}  // namespace dyvte
