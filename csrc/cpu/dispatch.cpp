// Each CPU kernel exists once per instruction set; the first call picks one.
#include "dyvte/decode_attention.h"
#include "dyvte/exit_head.h"
#include "dyvte/layer_norm.h"
#include "dyvte/linear.h"
#include "dyvte/packed_linear.h"
#include "dyvte/quick_gelu.h"
#include "dyvte/rms_norm.h"
#include "dyvte/rope_append.h"
#include "dyvte/silu_mul.h"
#include "dyvte/token_score.h"
#include "dyvte/varlen_attention.h"
#include "isa.h"

#if defined(__x86_64__)
#define DYVTE_PICK(name) (cpu_isa() >= Isa::avx512 ? avx512::name : cpu_isa() == Isa::avx2 ? avx2::name : generic::name)
#define DYVTE_PICK_BF16(name) (cpu_isa() == Isa::avx512_bf16 ? avx512_bf16::name : DYVTE_PICK(name))
#else
#define DYVTE_PICK(name) generic::name
#define DYVTE_PICK_BF16(name) generic::name
#endif

#define DYVTE_KERNEL(name, Params, pick)                   \
  namespace generic {                                      \
  Status name(const Params&, ParallelFor);                 \
  }                                                        \
  namespace avx2 {                                         \
  Status name(const Params&, ParallelFor);                 \
  }                                                        \
  namespace avx512 {                                       \
  Status name(const Params&, ParallelFor);                 \
  }                                                        \
  namespace avx512_bf16 {                                  \
  Status name(const Params&, ParallelFor);                 \
  }                                                        \
  Status name(const Params& p, ParallelFor parallel_for) { \
    static const auto kernel = pick(name);                 \
    return kernel(p, parallel_for);                        \
  }

namespace dyvte {

DYVTE_KERNEL(exit_head_cpu, ExitHeadParams, DYVTE_PICK)
DYVTE_KERNEL(rope_append_cpu, RopeAppendParams, DYVTE_PICK)
DYVTE_KERNEL(token_score_cpu, TokenScoreParams, DYVTE_PICK)
DYVTE_KERNEL(decode_attention_cpu, DecodeAttentionParams, DYVTE_PICK)
DYVTE_KERNEL(varlen_attention_cpu, VarlenAttentionParams, DYVTE_PICK)
DYVTE_KERNEL(linear_cpu, LinearParams, DYVTE_PICK_BF16)
DYVTE_KERNEL(packed_linear_cpu, PackedLinearParams, DYVTE_PICK_BF16)
DYVTE_KERNEL(rms_norm_cpu, RmsNormParams, DYVTE_PICK)
DYVTE_KERNEL(silu_mul_cpu, SiluMulParams, DYVTE_PICK)
DYVTE_KERNEL(layer_norm_cpu, LayerNormParams, DYVTE_PICK)
DYVTE_KERNEL(quick_gelu_cpu, QuickGeluParams, DYVTE_PICK)

}  // namespace dyvte
