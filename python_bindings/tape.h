// Kernel calls of one step on a CPU, to be made again without torch, Python or its lock: what a graph is on CUDA.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "dyvte/common.h"

namespace dyvte::bind {

// What the recorded ops return is in `arena`, which outlives the tape; addresses are handed out once.
struct Tape {
  std::vector<std::function<Status()>> calls;
  char* arena;
  int64_t size, used = 0;

  Tape(void* data, int64_t bytes) : arena(static_cast<char*>(data)), size(bytes) {}

  // Null where the arena is full. Then `used` is more than `size`, and the tape must not run.
  void* take(int64_t bytes) {
    const int64_t at = used;
    used += (bytes + 63) / 64 * 64;
    return used > size ? nullptr : arena + at;
  }
};

// The tape that ops of this thread go to, or null.
inline thread_local Tape* recording = nullptr;

}  // namespace dyvte::bind
