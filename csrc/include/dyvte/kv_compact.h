// In-place compaction of a paged K/V cache: keep a sorted set of rows of each (layer, sequence).
#pragma once

#include "dyvte/common.h"

namespace dyvte {

struct KvCompactParams {
  KvPool pool;
  const int32_t* block_table;  // [slots, max_pages]; slots = layers * batch
  int32_t* lens;               // [slots], overwritten with the kept counts
  const int32_t* keep;         // packed row numbers, strictly ascending within a slot
  const int32_t* keep_cu;      // [slots + 1]
  int64_t slots, max_pages;
  int64_t row_bytes;  // heads * dim * element size
};

Status kv_compact_cpu(const KvCompactParams& p, ParallelFor parallel_for);
Status kv_compact_cuda(const KvCompactParams& p, void* stream);

}  // namespace dyvte
