// Which instruction set the CPU kernels use on this machine.
#pragma once

namespace dyvte {

enum class Isa { generic, avx2, avx512, avx512_bf16 };

// The best one this processor has; DYVTE_CPU_ISA=generic|avx2|avx512|avx512_bf16 in the environment lowers it (used by
// the tests).
Isa cpu_isa();
const char* cpu_isa_name();

}  // namespace dyvte
