// Every implementation of every kernel: CPU for each instruction set this machine has, and CUDA, emulated.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "dyvte/decode_attention.h"
#include "dyvte/decode_linear.h"
#include "dyvte/exit_head.h"
#include "dyvte/kv_compact.h"
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
#include "values.h"

#define DYVTE_TEST_ISA(isa)                                               \
  namespace dyvte::isa {                                                  \
  Status exit_head_cpu(const ExitHeadParams&, ParallelFor);               \
  Status rope_append_cpu(const RopeAppendParams&, ParallelFor);           \
  Status token_score_cpu(const TokenScoreParams&, ParallelFor);           \
  Status decode_attention_cpu(const DecodeAttentionParams&, ParallelFor); \
  Status rms_norm_cpu(const RmsNormParams&, ParallelFor);                 \
  Status silu_mul_cpu(const SiluMulParams&, ParallelFor);                 \
  Status layer_norm_cpu(const LayerNormParams&, ParallelFor);             \
  Status quick_gelu_cpu(const QuickGeluParams&, ParallelFor);             \
  Status linear_cpu(const LinearParams&, ParallelFor);                    \
  Status packed_linear_cpu(const PackedLinearParams&, ParallelFor);       \
  Status varlen_attention_cpu(const VarlenAttentionParams&, ParallelFor); \
  }

DYVTE_TEST_ISA(generic)
#if defined(__x86_64__)
DYVTE_TEST_ISA(avx2)
DYVTE_TEST_ISA(avx512)
namespace dyvte::avx512_bf16 {
Status linear_cpu(const LinearParams&, ParallelFor);
Status packed_linear_cpu(const PackedLinearParams&, ParallelFor);
}  // namespace dyvte::avx512_bf16
#endif

namespace dyvte::test {

struct Implementation {
  std::string name;
  bool cuda;
  Status (*exit_head)(const ExitHeadParams&, ParallelFor);
  Status (*kv_compact)(const KvCompactParams&, ParallelFor);
  Status (*rope_append)(const RopeAppendParams&, ParallelFor);
  Status (*token_score)(const TokenScoreParams&, ParallelFor);
  Status (*decode_attention)(const DecodeAttentionParams&, ParallelFor);
  Status (*rms_norm)(const RmsNormParams&, ParallelFor);
  Status (*silu_mul)(const SiluMulParams&, ParallelFor);
  Status (*layer_norm)(const LayerNormParams&, ParallelFor);
  Status (*quick_gelu)(const QuickGeluParams&, ParallelFor);
  Status (*linear)(const LinearParams&, ParallelFor);                     // CPU only
  Status (*packed_linear)(const PackedLinearParams&, ParallelFor);        // CPU only
  Status (*varlen_attention)(const VarlenAttentionParams&, ParallelFor);  // CPU only
};

template <class Params, Status (*kernel)(const Params&, void*)>
Status on_cuda(const Params& p, ParallelFor) {
  return kernel(p, nullptr);
}

#define DYVTE_TEST_CPU(isa)                                                                                        \
  Implementation {                                                                                                 \
    #isa, false, isa::exit_head_cpu, kv_compact_cpu, isa::rope_append_cpu, isa::token_score_cpu,                   \
        isa::decode_attention_cpu, isa::rms_norm_cpu, isa::silu_mul_cpu, isa::layer_norm_cpu, isa::quick_gelu_cpu, \
        isa::linear_cpu, isa::packed_linear_cpu, isa::varlen_attention_cpu                                         \
  }

inline std::vector<Implementation> implementations() {
  std::vector<Implementation> all{DYVTE_TEST_CPU(generic)};
#if defined(__x86_64__)
  if (cpu_isa() >= Isa::avx2) all.push_back(DYVTE_TEST_CPU(avx2));
  if (cpu_isa() >= Isa::avx512) all.push_back(DYVTE_TEST_CPU(avx512));
  if (cpu_isa() >= Isa::avx512_bf16) {
    all.push_back(DYVTE_TEST_CPU(avx512));
    all.back().name = "avx512_bf16";
    all.back().linear = avx512_bf16::linear_cpu;
    all.back().packed_linear = avx512_bf16::packed_linear_cpu;
  }
#endif
  all.push_back({"cuda", true, on_cuda<ExitHeadParams, exit_head_cuda>, on_cuda<KvCompactParams, kv_compact_cuda>,
                 on_cuda<RopeAppendParams, rope_append_cuda>, on_cuda<TokenScoreParams, token_score_cuda>,
                 on_cuda<DecodeAttentionParams, decode_attention_cuda>, on_cuda<RmsNormParams, rms_norm_cuda>,
                 on_cuda<SiluMulParams, silu_mul_cuda>, on_cuda<LayerNormParams, layer_norm_cuda>,
                 on_cuda<QuickGeluParams, quick_gelu_cuda>, nullptr, nullptr, nullptr});
  return all;
}

// Three threads at most, like torch's parallel_for: pieces of at least `grain`.
inline int32_t threaded_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* ctx) {
  const int64_t n = end - begin, pieces = std::max<int64_t>(1, std::min<int64_t>(3, n / std::max<int64_t>(1, grain)));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i)
    threads.emplace_back(body, begin + n * i / pieces, begin + n * (i + 1) / pieces, ctx);
  for (auto& t : threads) t.join();
  return 0;
}

// Runs `run(implementation) -> outputs` for all and compares with the first. `tolerance` is relative to the largest
// output near 1, and 0 asks for equal bits.
template <class Run>
void compare(const std::string& what, float tolerance, const Run& run) {
  std::vector<float> expected;
  for (const Implementation& implementation : implementations()) {
    const std::vector<float> got = run(implementation);
    if (expected.empty()) expected = got;
    for (size_t i = 0; i < expected.size(); ++i) {
      const float error = std::fabs(got[i] - expected[i]), bound = tolerance * std::fmax(1.0f, std::fabs(expected[i]));
      if (error <= bound) continue;  // false for NaN
      std::printf("FAILED %s: %s gives %g at %zu of %zu, %g expected\n", what.c_str(), implementation.name.c_str(),
                  got[i], i, expected.size(), expected[i]);
      std::exit(1);
    }
  }
}

inline void check(Status status, const char* what) {
  if (!status) return;
  std::printf("FAILED %s: %s\n", what, status);
  std::exit(1);
}

// One rounding of the output dtype.
inline float rounding(DType dtype) { return dtype == DType::f32 ? 4e-6f : dtype == DType::f16 ? 2e-3f : 1.6e-2f; }

}  // namespace dyvte::test
