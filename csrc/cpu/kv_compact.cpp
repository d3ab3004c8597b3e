// Pure data movement through memmove, so compiled once and not per instruction set.
#include "dyvte/kv_compact.h"

#include <cstring>

namespace dyvte {
namespace {

// The row kept as number i is keep[i] >= i, so going upwards no source is overwritten before it is read. Runs of rows
// that are neighbours at both ends move at once.
void compact_slot(const KvCompactParams& p, int64_t slot) {
  const int32_t* keep = p.keep + p.keep_cu[slot];
  const int32_t* table = p.block_table + slot * p.max_pages;
  const int64_t n = p.keep_cu[slot + 1] - p.keep_cu[slot], page = p.pool.page;
  for (int64_t i = 0; i < n;) {
    const int64_t from = keep[i];
    int64_t run = 1;
    while (i + run < n && keep[i + run] == from + run && (i + run) % page && (from + run) % page) ++run;
    if (from != i) {
      const int64_t dst = (table[i / page] * page + i % page) * p.row_bytes;
      const int64_t src = (table[from / page] * page + from % page) * p.row_bytes;
      char* pools[] = {static_cast<char*>(p.pool.k), static_cast<char*>(p.pool.v)};
      for (char* pool : pools) std::memmove(pool + dst, pool + src, run * p.row_bytes);
    }
    i += run;
  }
  p.lens[slot] = static_cast<int32_t>(n);
}

}  // namespace

Status kv_compact_cpu(const KvCompactParams& p, ParallelFor parallel_for) {
  const int64_t bytes_per_slot = p.slots ? p.keep_cu[p.slots] / p.slots * p.row_bytes : 0;
  const int64_t grain = 1 + 262144 / (bytes_per_slot + 1);
  auto body = [](int64_t begin, int64_t end, void* ctx) {
    for (int64_t slot = begin; slot < end; ++slot) compact_slot(*static_cast<const KvCompactParams*>(ctx), slot);
  };
  void* ctx = const_cast<KvCompactParams*>(&p);
  if (p.slots <= grain) {
    body(0, p.slots, ctx);
  } else {
    parallel_for(0, p.slots, grain, body, ctx);
  }
  return nullptr;
}

}  // namespace dyvte
